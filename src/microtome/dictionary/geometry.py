"""How the decoder's directions lie to each other: each latent's nearest neighbour by cosine, against chance.

Chance is exact, not drawn: for F independent directions, uniform on the sphere in d dimensions, one cosine has the density
∝ (1 − t²)^((d − 3) / 2), and the nearest of the F − 1 others lies below t with probability P(cos < t)^(F − 1). So
latents that split one concept, or copy each other, show as cosines that chance does not give.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import InputError
from microtome.dictionary.surface import SparseDictionary, decoder_rows

THRESHOLDS = (0.5, 0.9)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EDGES = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Cosines between decoder rows. `nearest_*` are of each latent's largest cosine to another; `random_*` the same for
    directions drawn at random. `above` and `random_above` are the shares of latents whose nearest lies above 0.5 and 0.9.
    `quantiles` at 5, 25, 50, 75 and 95 %. Rows of zeros (`n_zero`) are left out."""

    n_latents: int
    n_zero: int
    nearest_mean: float
    random_mean: float
    quantiles: tuple[float, ...]
    above: dict[str, float]
    random_above: dict[str, float]
    norm_mean: float
    norm_min: float
    norm_max: float
    histogram_edges: tuple[float, ...] = field(repr=False)
    histogram_counts: tuple[int, ...] = field(repr=False)


def geometry(dictionary: SparseDictionary) -> Geometry:
    """The cosine structure of the decoder. Raises InputError for one with fewer than two rows that are not zero."""
    rows = decoder_rows(dictionary)
    norms = rows.norm(dim=1)
    units = unit_rows(rows)
    if len(units) < 2:
        raise InputError(
            "Cosines need two latents with a direction", got=f"{len(units)} decoder rows that are not zero"
        )
    nearest = best_cosines(units, units, but_self=True).double().cpu()
    mean, random_above = random_nearest(len(units), rows.shape[1])
    return Geometry(
        n_latents=len(rows),
        n_zero=len(rows) - len(units),
        nearest_mean=float(nearest.mean()),
        random_mean=mean,
        quantiles=tuple(nearest.quantile(torch.tensor(_QUANTILES, dtype=nearest.dtype)).tolist()),
        above={str(t): float((nearest > t).double().mean()) for t in THRESHOLDS},
        random_above=random_above,
        norm_mean=float(norms.mean()),
        norm_min=float(norms.min()),
        norm_max=float(norms.max()),
        histogram_edges=tuple(_EDGES.tolist()),
        histogram_counts=tuple(torch.histogram(nearest.clamp(-1, 1), _EDGES).hist.long().tolist()),
    )


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "kept d"]:
    """The rows that are not zero, scaled to unit norm."""
    norms = rows.norm(dim=1, keepdim=True)
    alive = norms[:, 0] > 0
    units: Tensor = rows[alive] / norms[alive]
    return units


def best_cosines(
    of: Float[Tensor, "n d"], among: Float[Tensor, "m d"], *, but_self: bool = False, chunk: int = 1024
) -> Float[Tensor, " n"]:
    """For each unit row of `of`, the largest cosine to one of `among`; with `but_self`, both are the same rows and a row is
    not compared with itself."""
    best = []
    for start in range(0, len(of), chunk):
        cosines = of[start : start + chunk] @ among.T
        if but_self:
            cosines.diagonal(start).fill_(-torch.inf)
        best.append(cosines.max(1).values)
    return torch.cat(best)


def random_nearest(n: int, d: int, *, points: int = 200_001) -> tuple[float, dict[str, float]]:
    """For n uniform random directions in d dimensions: the mean of the nearest neighbour's cosine, and the share above
    each threshold. Integrated over the angle, whose density sin^(d − 2) has no pole."""
    if d < 2:  # all cosines are 1 or −1
        alone = 0.5 ** (n - 1)
        return 1 - 2 * alone, {str(threshold): 1 - alone for threshold in THRESHOLDS}
    angle = torch.linspace(0.0, torch.pi, points, dtype=torch.float64)
    nearer = torch.cumulative_trapezoid(angle.sin().clamp_min(0) ** (d - 2), angle)
    nearer = torch.cat([nearer.new_zeros(1), nearer])
    none_nearer = (1 - nearer / nearer[-1]).clamp_min(0) ** (n - 1)
    mean = float(1 - torch.trapezoid(none_nearer * angle.sin(), angle))
    shares = {str(t): float(1 - none_nearer[torch.searchsorted(angle, math.acos(t))]) for t in THRESHOLDS}
    return mean, shares
