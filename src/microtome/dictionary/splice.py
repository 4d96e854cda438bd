"""What the model loses when it runs on a dictionary's output: cross-entropy and KL of the next token.

Two passes for each batch. The clean run gives every input; then all outputs are replaced at once, at text tokens only
(BOS and separators keep what they have). So a transcoder, or a crosscoder of several points, is measured as an
autoencoder is. Beside it stand a run with zeros there and one with the mean over the data set: zeros are far from
anything that the model knows and flatter the score, the mean is the fairer rest state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.dictionary.intervals import interval
from microtome.dictionary.moments import UnitSums
from microtome.dictionary.surface import Read, SparseDictionary, points
from microtome.model import HookedModel
from microtome.model.hook_point import HookFn, HookPoint
from microtome.model.prompts import Prompts

Outputs = tuple[str, ...]
ABLATIONS = ("zero", "mean")
FIGURES = (
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "ce_recovered", "ce_recovered_mean"),
    *("kl_spliced", "kl_zero", "kl_mean", "kl_recovered", "kl_recovered_mean"),
)


def spliced(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"] | Prompts,
    outputs: Outputs,
    y: Float[Tensor, "*batch_pos d_out"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits with `y` (one vector for all, or one for each position) at the points `outputs` wherever `where` holds."""
    widths = [width_at(model, name) for name in outputs] if len(outputs) > 1 else [y.shape[-1]]
    parts = dict(zip(outputs, y.expand(*where.shape, -1).split(widths, -1), strict=True))
    return model.run_with_hooks(tokens, [(name, _replacing(part, where)) for name, part in parts.items()])


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


class Function:
    """Cross-entropy and KL of several dictionaries on one model, summed by unit; the clean run is made once for all, and
    each ablation once for all that write the same points."""

    def __init__(
        self,
        model: HookedModel,
        dictionaries: Sequence[SparseDictionary],
        means: Mapping[Outputs, Float[Tensor, " d_out"]],
        n_units: int,
    ) -> None:
        self.model, self.dictionaries, self.means = model, dictionaries, means
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
        for name, outputs, y in self._replacements(Read(cache)):
            edited = spliced(self.model, tokens, outputs, y, is_text)[:, :-1][scored].float().log_softmax(-1)
            self.units.add(f"ce_{name}", -edited.gather(1, target)[:, 0], of_row)
            self.units.add(f"kl_{name}", (clean.exp() * (clean - edited)).sum(-1), of_row)

    def _replacements(self, read: Read) -> "list[tuple[str, Outputs, Tensor]]":
        found: list[tuple[str, Outputs, Tensor]] = []
        for outputs, mean in self.means.items():
            found += [(_key("zero", outputs), outputs, torch.zeros_like(mean)), (_key("mean", outputs), outputs, mean)]
        for i, dictionary in enumerate(self.dictionaries):
            x = read.x(dictionary)
            rows = x.flatten(0, 1)
            y = dictionary.decode(dictionary.encode(rows), rows).view(*x.shape[:-1], -1)
            found.append((f"spliced_{i}", dictionary.origin.outputs, y))
        return found

    def figures(self, i: int) -> dict[str, Any]:
        """The fields of `Evaluation` for dictionary `i`: means per token, fractions recovered, and `intervals`. All None
        when nothing was run."""
        if self.n == 0:
            return {**dict.fromkeys(FIGURES), "n_function_tokens": 0, "intervals": {}}
        outputs = self.dictionaries[i].origin.outputs
        names = {"clean": "clean", "spliced": f"spliced_{i}", **{name: _key(name, outputs) for name in ABLATIONS}}
        sums = {
            f"{kind}_{name}": self.units[f"{kind}_{key}"]
            for kind in ("ce", "kl")
            for name, key in names.items()
            if (kind, name) != ("kl", "clean")
        }
        n_units = self.units.n_units
        values = {name: float(figure[0]) for name, figure in self._figures(sums, torch.ones(1, n_units)).items()}
        intervals = {
            name: interval(lambda w, name=name: self._figures(sums, w)[name], n_units)  # type: ignore[misc]
            for name in FIGURES
        }
        return {**values, "n_function_tokens": self.n, "intervals": intervals}

    def _figures(
        self, sums: Mapping[str, Float[Tensor, " unit"]], weights: Float[Tensor, "draws unit"]
    ) -> dict[str, Float[Tensor, " draws"]]:
        """Every figure of units counted so often."""
        n = weights.double() @ self.units["n"]
        found = {name: (weights.double() @ values) / n for name, values in sums.items()}
        found["delta_ce"] = found["ce_spliced"] - found["ce_clean"]
        for ablation, suffix in (("zero", ""), ("mean", "_mean")):
            ce, kl = found[f"ce_{ablation}"], found[f"kl_{ablation}"]
            found[f"ce_recovered{suffix}"] = (ce - found["ce_spliced"]) / (ce - found["ce_clean"])
            found[f"kl_recovered{suffix}"] = (kl - found["kl_spliced"]) / kl
        return found


def _key(ablation: str, outputs: Outputs) -> str:
    return f"{ablation} {' '.join(outputs)}"
