"""How near a dictionary's output comes to what it should give: everything that needs only activations.

FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all text tokens (y = x for an autoencoder), the mean taken over the same tokens; the
same by output point; cosine; ‖ŷ‖ / ‖y‖; L0; how often each latent fires.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import InputError
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.intervals import interval
from microtome.dictionary.moments import Moments, UnitSums
from microtome.dictionary.surface import Read, SparseDictionary

_OUTLIER_DIMENSIONS = 2
_DENSE, _FREQUENT = 0.1, 0.01


@dataclass(frozen=True, kw_only=True)
class PointFit:
    """One output point of a dictionary: its FVU, and how much of the variance of all points lies there."""

    name: str
    fvu: float
    variance: float


class Reconstruction:
    """The sums of one dictionary, and the figures that come of them."""

    def __init__(self, dictionary: SparseDictionary, n_units: int) -> None:
        self.dictionary = dictionary
        self.text, self.everywhere = Moments(dictionary.d_out), Moments(dictionary.d_out)
        self.units = UnitSums(n_units, dictionary.d_out)
        self.fired = torch.zeros(dictionary.d_sae, dtype=torch.int64)
        self.widths: list[int] = []

    def add(self, read: Read, is_text: Bool[Tensor, "batch pos"], unit: Int[Tensor, " batch"]) -> None:
        """Add the activations of a batch; `unit` is each sequence's."""
        x, y = read.x(self.dictionary).flatten(0, 1), read.y(self.dictionary).flatten(0, 1)
        self.widths = [read.at((name,)).shape[-1] for name in self.dictionary.origin.outputs]
        codes = self.dictionary.encode(x)
        decoded = self.dictionary.decode(codes, x).float()
        self.everywhere.add(y, decoded)
        text = is_text.flatten().to(y.device)
        of_row = unit[:, None].expand(is_text.shape).flatten()[text.cpu()]
        kept = SparseCodes(codes.indices[text], codes.values[text], codes.d_sae)
        self._add_text(y[text], decoded[text], kept, of_row)

    def _add_text(
        self, y: Float[Tensor, "row d_out"], decoded: Float[Tensor, "row d_out"], codes: SparseCodes, unit: Tensor
    ) -> None:
        self.text.add(y, decoded)
        self.fired += torch.bincount(codes.indices[codes.values > 0], minlength=self.dictionary.d_sae).cpu()
        self.units.add_vectors(y, unit)
        per_row = {
            "n": torch.ones(len(y)),
            "l0": codes.l0,
            "cosine": functional.cosine_similarity(y, decoded),
            "norm_ratio": decoded.norm(dim=1) / y.norm(dim=1),
            "square": y.double().square().sum(1),
            "error": (y - decoded).double().square().sum(1),
        }
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
            **{name: float(self.units[name].sum() / n) for name in ("l0", "cosine", "norm_ratio")},
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            **self._outliers(),
            "fvu_all_positions": self.everywhere.fvu(),
            "points": self._points(),
            "n_dead": dead,
            "dead_fraction": dead / self.dictionary.d_sae,
            "n_dense": int((density > _DENSE).sum()),
            "n_frequent": int((density > _FREQUENT).sum()),
            "n_tokens": n,
            "density_edges": edges,
            "density_counts": counts,
            "intervals": self._intervals(),
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

    def _points(self) -> tuple[PointFit, ...]:
        error, variance = self.text.error.split(self.widths), self.text.variance.split(self.widths)
        total = float(self.text.variance.sum())
        return tuple(
            PointFit(name=name, fvu=float(e.sum() / v.sum()), variance=float(v.sum()) / total)
            for name, e, v in zip(self.dictionary.origin.outputs, error, variance, strict=True)
        )

    def _intervals(self) -> dict[str, tuple[float, float]]:
        units = self.units
        found = {
            name: interval(lambda w, name=name: (w @ units[name]) / (w @ units["n"]), units.n_units)  # type: ignore[misc]
            for name in ("l0", "cosine", "norm_ratio")
        }
        return {**found, "fvu": interval(units.fvu, units.n_units)}


def density_histogram(fired: Int[Tensor, " d_sae"], n_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Counts of latents by log10 of the fraction of tokens on which they fire (dead ones in no bin), and the edges of
    the bins."""
    density = (fired[fired > 0].double() / n_tokens).log10()
    edges = torch.linspace(-7.0, 0.0, 57, dtype=torch.float64)
    counts = torch.histogram(density.clamp(-7.0, 0.0), edges).hist.long()
    return tuple(counts.tolist()), tuple(edges.tolist())
