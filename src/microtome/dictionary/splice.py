"""What the model loses when it runs on a dictionary's output: cross-entropy and KL of the next token.

Two passes for each batch. The clean run gives every input; then outputs are replaced, at text tokens only (BOS and
separators keep what they have): all that a dictionary writes at once, or (of one that writes several points) one point
alone. Which, a `Splice` says. So a transcoder, a crosscoder of several points, or a cross-layer transcoder is measured as
an autoencoder is. Beside each stand a run with zeros there and one with the mean over the data set: zeros are far from
anything that the model knows and flatter the score, the mean is the fairer rest state.

There the inputs are the clean run's. Of dictionaries with several layers a third pass is the replacement model
(`replacement.py`), in which each layer reads what the layers before it have made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.dictionary.intervals import drawn_weights, percentiles
from microtome.dictionary.moments import UnitSums
from microtome.dictionary.replacement import as_replacement, replacement_logits
from microtome.dictionary.surface import Read, SparseDictionary, points
from microtome.model import HookedModel
from microtome.model.hook_point import HookFn, HookPoint
from microtome.model.prompts import Prompts

Outputs = tuple[str, ...]
ABLATIONS = ("zero", "mean")
FIGURES = (
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "ce_recovered", "ce_recovered_mean"),
    *("kl_spliced", "kl_zero", "kl_mean", "kl_recovered", "kl_recovered_mean", "top1_spliced"),
)
REPLACED = ("ce_replaced", "delta_ce_replaced", "kl_replaced", "top1_replaced")


def spliced(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"] | Prompts,
    parts: Mapping[str, Float[Tensor, "*batch_pos _"]],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits with, at each hook point that `parts` names, its tensor (one vector for all, or one for each position) wherever
    `where` holds."""
    return model.run_with_hooks(
        tokens, [(name, _replacing(part.expand(*where.shape, -1), where)) for name, part in parts.items()]
    )


def parts_of(
    model: HookedModel, outputs: Outputs, y: Float[Tensor, "*batch_pos d_out"]
) -> dict[str, Float[Tensor, "*batch_pos _"]]:
    """y as what it is at each of the points `outputs`."""
    widths = [width_at(model, name) for name in outputs] if len(outputs) > 1 else [y.shape[-1]]
    return dict(zip(outputs, y.split(widths, -1), strict=True))


def width_at(model: HookedModel, name: str) -> int:
    """The width of a hook point, heads flattened."""
    return model.activations(torch.zeros(1, 1, dtype=torch.long), name)[name][0, 0].numel()


def _replacing(part: Float[Tensor, "batch pos d"], where: Bool[Tensor, "batch pos"]) -> HookFn:
    def hook(activation: Tensor, _: HookPoint) -> Tensor:
        here = where.to(activation.device)
        edited = activation.clone()
        edited[here] = part.to(activation)[here].view_as(activation[here])
        return edited

    return hook


@dataclass(frozen=True)
class Splice:
    """What is replaced together: these points, which dictionary number `of` writes."""

    of: int
    points: Outputs

    @classmethod
    def all_of(cls, dictionaries: Sequence[SparseDictionary], *, each_point: bool) -> "list[Splice]":
        """Of each dictionary all its outputs at once; with `each_point`, each of several alone too."""
        found = [cls(i, dictionary.origin.outputs) for i, dictionary in enumerate(dictionaries)]
        if each_point:
            found += [cls(whole.of, (name,)) for whole in list(found) for name in whole.points if len(whole.points) > 1]
        return found

    @property
    def key(self) -> str:
        """Under which name its sums are kept."""
        return _key(f"spliced {self.of}", self.points)


class Function:
    """Cross-entropy and KL of several splices of dictionaries into one model, summed by unit; the clean run is made once for
    all, and each ablation once for all that replace the same points. `means` has the mean of y at each point."""

    def __init__(
        self,
        model: HookedModel,
        dictionaries: Sequence[SparseDictionary],
        splices: Sequence[Splice],
        means: Mapping[str, Float[Tensor, " _"]],
        n_units: int,
    ) -> None:
        self.model, self.dictionaries, self.splices, self.means = model, dictionaries, splices, means
        self.replacements = [as_replacement(model, dictionary) for dictionary in dictionaries]
        self.units = UnitSums(n_units)
        self.n = 0

    def add(
        self, tokens: Int[Tensor, "batch pos"], is_text: Bool[Tensor, "batch pos"], unit: Int[Tensor, " batch"]
    ) -> None:
        """Run one batch."""
        scored = is_text[:, 1:]
        of_row = unit[:, None].expand(is_text.shape)[:, 1:][scored.cpu()]
        logits, cache = self.model.run_with_cache(tokens, points(self.dictionaries))
        clean = logits[:, :-1][scored].float().log_softmax(-1)
        target = tokens[:, 1:][scored][:, None]
        del logits
        self.n += len(target)
        self.units.add("n", torch.ones(len(target)), of_row)
        self.units.add("ce_clean", -clean.gather(1, target)[:, 0], of_row)
        for name, edited_logits in self._runs(tokens, is_text, Read(cache)):
            edited = edited_logits[:, :-1][scored].float().log_softmax(-1)
            self.units.add(f"ce_{name}", -edited.gather(1, target)[:, 0], of_row)
            self.units.add(f"kl_{name}", (clean.exp() * (clean - edited)).sum(-1), of_row)
            self.units.add(f"top1_{name}", (clean.argmax(-1) == edited.argmax(-1)).float(), of_row)

    def _runs(
        self, tokens: Int[Tensor, "batch pos"], is_text: Bool[Tensor, "batch pos"], read: Read
    ) -> Iterator[tuple[str, Float[Tensor, "batch pos d_vocab"]]]:
        """The logits of each edited run, under the name of its sums."""
        for name, parts in self._replacements(read):
            yield name, spliced(self.model, tokens, parts, is_text)
        for i, dictionary in enumerate(self.replacements):
            if dictionary is not None:
                yield _replaced(i), replacement_logits(self.model, tokens, dictionary, is_text)

    def _replacements(self, read: Read) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for together in dict.fromkeys(splice.points for splice in self.splices):
            means = {name: self.means[name] for name in together}
            yield _key("zero", together), {name: torch.zeros_like(mean) for name, mean in means.items()}
            yield _key("mean", together), means
        for i, dictionary in enumerate(self.dictionaries):
            sequences, outputs = read.rows(dictionary), dictionary.origin.outputs
            rows = sequences.flatten(0, 1)
            y = dictionary.decode(dictionary.encode(rows), rows).view(*sequences.shape[:-1], -1)
            parts = dict(zip(outputs, y.split([len(self.means[name]) for name in outputs], -1), strict=True))
            for splice in self.splices:
                if splice.of == i:
                    yield splice.key, {name: parts[name] for name in splice.points}

    def figures(self, splice: Splice) -> dict[str, Any]:
        """`FIGURES` of a splice: means per token and fractions recovered; `n_function_tokens`; `intervals`. All None when
        nothing was run."""
        if self.n == 0:
            return {**dict.fromkeys(FIGURES), "n_function_tokens": 0, "intervals": {}}
        ablated = {name: _key(name, splice.points) for name in ABLATIONS}
        sums = {
            f"{kind}_{name}": self.units[f"{kind}_{key}"]
            for kind in ("ce", "kl")
            for name, key in {"clean": "clean", "spliced": splice.key, **ablated}.items()
            if (kind, name) != ("kl", "clean")
        }
        sums["top1_spliced"] = self.units[f"top1_{splice.key}"]
        values, intervals = self._with_intervals(lambda weights: self._figures(sums, weights), FIGURES)
        return {**values, "n_function_tokens": self.n, "intervals": intervals}

    def replaced(self, i: int) -> dict[str, Any]:
        """`REPLACED` of dictionary `i` and their `intervals`. All None when nothing was run, and of a dictionary that has
        no layers."""
        if self.n == 0 or self.replacements[i] is None:
            return {**dict.fromkeys(REPLACED), "intervals": {}}
        sums = {f"{kind}_replaced": self.units[f"{kind}_{_replaced(i)}"] for kind in ("ce", "kl", "top1")}
        sums["delta_ce_replaced"] = sums["ce_replaced"] - self.units["ce_clean"]
        values, intervals = self._with_intervals(lambda weights: self._means(sums, weights), REPLACED)
        return {**values, "intervals": intervals}

    def _with_intervals(
        self, figures: Callable[[Float[Tensor, "draws unit"]], Mapping[str, Tensor]], names: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """The figures of these names, and their intervals."""
        values, drawn = (figures(w) for w in (torch.ones(1, self.units.n_units), drawn_weights(self.units.n_units)))
        return {name: float(values[name][0]) for name in names}, {name: percentiles(drawn[name]) for name in names}

    def _means(
        self, sums: Mapping[str, Float[Tensor, " unit"]], weights: Float[Tensor, "draws unit"]
    ) -> dict[str, Float[Tensor, " draws"]]:
        """Means per token of units counted so often."""
        n = weights.double() @ self.units["n"]
        return {name: (weights.double() @ values) / n for name, values in sums.items()}

    def _figures(
        self, sums: Mapping[str, Float[Tensor, " unit"]], weights: Float[Tensor, "draws unit"]
    ) -> dict[str, Float[Tensor, " draws"]]:
        """Every figure of a splice, of units counted so often."""
        found = self._means(sums, weights)
        found["delta_ce"] = found["ce_spliced"] - found["ce_clean"]
        for ablation, suffix in (("zero", ""), ("mean", "_mean")):
            ce, kl = found[f"ce_{ablation}"], found[f"kl_{ablation}"]
            found[f"ce_recovered{suffix}"] = (ce - found["ce_spliced"]) / (ce - found["ce_clean"])
            found[f"kl_recovered{suffix}"] = (kl - found["kl_spliced"]) / kl
        return found


def _replaced(i: int) -> str:
    return f"replaced {i}"


def _key(what: str, together: Outputs) -> str:
    return f"{what} {' '.join(together)}"
