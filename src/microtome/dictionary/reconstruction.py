"""How near a dictionary's output comes to what it should give: everything that needs only activations.

FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all text tokens (y = x for an autoencoder), the mean taken over the same tokens; cosine;
‖ŷ‖ / ‖y‖; all three by output point too; L0, where latents have layers in each; how often each latent fires.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import InputError
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.intervals import interval
from microtome.dictionary.moments import Moments, UnitSums, is_sink
from microtome.dictionary.surface import Read, SparseDictionary, latents_by_input

_OUTLIER_DIMENSIONS = 2
_DENSE, _FREQUENT = 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class PointFit:
    """One output point of a dictionary: how near the output comes there, and how much of the variance of all points lies
    there. Of several points, `loss` has what the model loses with this one alone replaced: the figures of `Evaluation` from
    `ce_clean` to `kl_recovered_mean`, by name (nothing where they were not measured). `intervals` as in `Evaluation`."""

    name: str
    fvu: float
    variance: float
    cosine: float
    norm_ratio: float
    loss: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class LayerLatents:
    """The latents of a cross-layer transcoder, or of a set of dictionaries, that read the input `name`."""

    name: str
    n_latents: int
    l0: float
    n_dead: int


@dataclass(frozen=True)
class _Part:
    """An output point: its columns of y, and what is behind the names of its sums."""

    name: str
    columns: slice
    of: str


class Reconstruction:
    """The sums of one dictionary, and the figures that come of them."""

    def __init__(self, dictionary: SparseDictionary, n_units: int) -> None:
        self.dictionary = dictionary
        self.text, self.everywhere, self.without_sinks = (Moments(dictionary.d_out) for _ in range(3))
        self.units = UnitSums(n_units, dictionary.d_out)
        self.fired = torch.zeros(dictionary.d_sae, dtype=torch.int64)
        self.parts: list[_Part] = []

    def add(self, read: Read, is_text: Bool[Tensor, "batch pos"], unit: Int[Tensor, " batch"]) -> None:
        """Add the activations of a batch; `unit` is each sequence's."""
        rows, y = read.rows(self.dictionary).flatten(0, 1), read.y(self.dictionary).flatten(0, 1)
        self.parts = self.parts or _parts(self.dictionary.origin.outputs, read)
        codes = self.dictionary.encode(rows)
        decoded = self.dictionary.decode(codes, rows).float()
        self.everywhere.add(y, decoded)
        text = is_text.flatten().to(y.device)
        of_row = unit[:, None].expand(is_text.shape).flatten()[text.cpu()]
        kept = SparseCodes(codes.indices[text], codes.values[text], codes.d_sae)
        self._add_text(y[text], decoded[text], kept, of_row)

    def _add_text(
        self, y: Float[Tensor, "row d_out"], decoded: Float[Tensor, "row d_out"], codes: SparseCodes, unit: Tensor
    ) -> None:
        self.text.add(y, decoded)
        usual = ~is_sink(y)
        self.without_sinks.add(y[usual], decoded[usual])
        self.fired += torch.bincount(codes.indices[codes.values != 0], minlength=self.dictionary.d_sae).cpu()
        self.units.add_vectors(y, unit)
        per_row = {"n": torch.ones(len(y)), "l0": codes.l0, **_closeness(y, decoded, "")}
        for part in self.parts if len(self.parts) > 1 else ():
            per_row |= _closeness(y[:, part.columns], decoded[:, part.columns], part.of)
        for name, values in per_row.items():
            self.units.add(name, values, unit)

    def figures(self) -> dict[str, Any]:
        """The fields of `Evaluation` that need no model behind the activations, and their `intervals`. Raises InputError
        where there was no text."""
        n = self.text.n
        if n == 0:
            raise InputError("There are no text tokens to evaluate on", fix="Use more text")
        fvu = self.text.fvu()
        counts, edges = density_histogram(self.fired, n)
        dead = int((self.fired == 0).sum())
        density = self.fired.double() / n
        return {
            **{name: self._mean(name) for name in ("l0", "cosine", "norm_ratio")},
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            **self._outliers(),
            "fvu_without_sinks": self.without_sinks.fvu(),
            "n_sinks": n - self.without_sinks.n,
            "fvu_all_positions": self.everywhere.fvu(),
            "points": tuple(self._point(part) for part in self.parts),
            "layers": self._layers(),
            "n_dead": dead,
            "dead_fraction": dead / self.dictionary.d_sae,
            "n_dense": int((density > _DENSE).sum()),
            "n_frequent": int((density > _FREQUENT).sum()),
            "n_tokens": n,
            "density_edges": edges,
            "density_counts": counts,
            "intervals": {"l0": interval(self._l0, self.units.n_units), **self._intervals()},
        }

    def _outliers(self) -> dict[str, Any]:
        variance = self.text.variance
        outliers = variance.topk(min(_OUTLIER_DIMENSIONS, len(variance) - 1)).indices
        kept = torch.ones(len(variance), dtype=torch.bool)
        kept[outliers] = False
        return {
            "fvu_without_outliers": self.text.fvu(kept),
            "outlier_dimensions": tuple(sorted(outliers.tolist())),
            "outlier_variance": float(variance[outliers].sum() / variance.sum()),
        }

    def means(self) -> dict[str, Float[Tensor, " d"]]:
        """The mean of y at each output point."""
        return {part.name: self.text.mean.float()[part.columns] for part in self.parts}

    def _point(self, part: _Part) -> PointFit:
        error, variance = (values[part.columns].sum() for values in (self.text.error, self.text.variance))
        return PointFit(
            name=part.name,
            fvu=float(error / variance),
            variance=float(variance / self.text.variance.sum()),
            cosine=self._mean(f"cosine{part.of}"),
            norm_ratio=self._mean(f"norm_ratio{part.of}"),
            intervals=self._intervals(part.of, part.columns),
        )

    def _layers(self) -> tuple[LayerLatents, ...]:
        found = [(name, self.fired[latents]) for name, latents in latents_by_input(self.dictionary)]
        return tuple(
            LayerLatents(
                name=name, n_latents=len(fired), l0=float(fired.sum() / self.text.n), n_dead=int((fired == 0).sum())
            )
            for name, fired in found
        )

    def _l0(self, weights: Float[Tensor, "draws unit"]) -> Float[Tensor, " draws"]:
        return (weights @ self.units["l0"]) / (weights @ self.units["n"])

    def _mean(self, name: str) -> float:
        return float(self.units[name].sum() / self.text.n)

    def _intervals(self, of: str = "", columns: slice = slice(None)) -> dict[str, tuple[float, float]]:
        """Of FVU, cosine and norm ratio at one output point, or of all together."""
        units = self.units
        found = {
            name: interval(lambda w, key=name + of: (w @ units[key]) / (w @ units["n"]), units.n_units)  # type: ignore[misc]
            for name in ("cosine", "norm_ratio")
        }
        return {**found, "fvu": interval(lambda w: units.fvu(w, of, columns), units.n_units)}


def _parts(outputs: tuple[str, ...], read: Read) -> list[_Part]:
    widths = read.widths(outputs)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    several = len(outputs) > 1
    return [
        _Part(name, slice(end - width, end), f" {i}" if several else "")
        for i, (name, width, end) in enumerate(zip(outputs, widths, ends, strict=True))
    ]


def _closeness(y: Float[Tensor, "row d"], decoded: Float[Tensor, "row d"], of: str) -> dict[str, Float[Tensor, " row"]]:
    """What is summed of each row; `of` comes behind the names."""
    return {
        f"cosine{of}": functional.cosine_similarity(y, decoded),
        f"norm_ratio{of}": decoded.norm(dim=1) / y.norm(dim=1),
        f"square{of}": y.double().square().sum(1),
        f"error{of}": (y - decoded).double().square().sum(1),
    }


def density_histogram(fired: Int[Tensor, " d_sae"], n_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Counts of latents by log10 of the fraction of tokens on which they fire (dead ones in no bin), and the edges of
    the bins."""
    density = (fired[fired > 0].double() / n_tokens).log10()
    edges = torch.linspace(-7.0, 0.0, 57, dtype=torch.float64)
    counts = torch.histogram(density.clamp(-7.0, 0.0), edges).hist.long()
    return tuple(counts.tolist()), tuple(edges.tolist())
