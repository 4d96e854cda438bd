"""The geometry of features: how much of a dimension each has, how they lie to each other, and the ideal shapes.

Everything takes `W [..., hidden, feature]`, as `ToyModel.W_in` is, with any leading axes. Source: Elhage et al. 2022, “The
geometry of superposition”.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import InputError, unknown_name

REPRESENTED = 0.5
"""A feature with ‖W_i‖² above this counts as represented."""


def dimensionality(W: Float[Tensor, "*n hidden feature"]) -> Float[Tensor, "*n feature"]:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²: which share of a dimension feature i has for itself; 0 for a feature of length 0.

    0 ≤ D_i ≤ 1, and Σ_i D_i ≤ rank(W): with S = WWᵀ and w = W_i, (w·w)² ≤ (w·Sw)(w·S⁺w) by Cauchy–Schwarz, so
    D_i ≤ w·S⁺w, and those add up to the trace of S⁺S, which is the rank.
    """
    norm2 = W.square().sum(dim=-2)
    overlap2 = (W.transpose(-1, -2) @ W).square().sum(dim=-1)  # ‖W_i‖² times the formula's denominator
    there = norm2 > 1e-12
    return torch.where(there, norm2.square() / torch.where(there, overlap2, 1.0), 0.0)


def dimensions_per_feature(W: Float[Tensor, "*n hidden feature"]) -> Float[Tensor, "*n"]:
    """D* = m / ‖W‖²_F: hidden dimensions for each represented feature."""
    return W.shape[-2] / W.square().sum(dim=(-1, -2)).clamp_min(1e-12)


def interference(W: Float[Tensor, "*n hidden feature"]) -> Float[Tensor, "*n feature"]:
    """Σ_{j≠i} (Ŵ_i · W_j)²: how much of the others lies in feature i's direction (the paper's colour of a feature)."""
    norm = W.norm(dim=-2)
    overlap = W.transpose(-1, -2) @ W / norm.clamp_min(1e-6)[..., None]
    result: Tensor = overlap.square().sum(dim=-1) - overlap.diagonal(dim1=-1, dim2=-2).square()
    return result


def n_represented(W: Float[Tensor, "*n hidden feature"], threshold: float = REPRESENTED) -> Tensor:
    """How many features have ‖W_i‖² above the threshold: integers `[...]`."""
    return (W.square().sum(dim=-2) > threshold).sum(dim=-1)


def cosines(W: Float[Tensor, "*n hidden feature"]) -> Float[Tensor, "*n feature feature"]:
    """Ŵ_i · Ŵ_j."""
    unit = W / W.norm(dim=-2, keepdim=True).clamp_min(1e-12)
    result: Tensor = unit.transpose(-1, -2) @ unit
    return result


def angle_gaps(W: Float[Tensor, "two feature"], threshold: float = REPRESENTED) -> Float[Tensor, " represented"]:
    """The angles, in degrees, between neighbouring represented features of a plane, all the way round (they add up to 360).

    Raises InputError unless there are two hidden dimensions. With fewer than two features there are no gaps.
    """
    if W.ndim != 2 or W.shape[0] != 2:
        raise InputError(
            "Angles round the circle need two hidden dimensions", got=list(W.shape), expected="[2, feature]"
        )
    kept = W[:, W.square().sum(dim=0) > threshold]
    if kept.shape[1] < 2:
        return W.new_zeros(0)
    angles = torch.rad2deg(torch.atan2(kept[1], kept[0])).sort().values
    return torch.diff(angles, append=angles[:1] + 360)


# ---- shapes -------------------------------------------------------------------------------------------------------------


def polygon(n: int) -> Float[Tensor, "2 n"]:
    """A regular polygon's corners; D = 2/n for n ≥ 3 (two are a digon: one dimension)."""
    angles = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angles.cos(), angles.sin()])


def simplex(n: int) -> Float[Tensor, "m n"]:
    """`n` unit vectors as far from each other as can be, in n − 1 dimensions: digon, triangle, tetrahedron … D = (n − 1)/n."""
    centred = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(centred)
    corners = vectors[:, values > 0.5].T @ centred
    result: Tensor = corners / corners.norm(dim=0)
    return result


def square_antiprism() -> Float[Tensor, "3 8"]:
    """Two squares, one turned by 45°. Their distance is the one that makes the eight unit vectors a tight frame (height
    ±√⅓), which is where all D are 3/8."""
    radius, height = math.sqrt(2 / 3), math.sqrt(1 / 3)
    turn = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    side = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height * side])


_SHAPES = {
    "digon": lambda: simplex(2),
    "triangle": lambda: simplex(3),
    "tetrahedron": lambda: simplex(4),
    "square": lambda: polygon(4),
    "pentagon": lambda: polygon(5),
    "square antiprism": square_antiprism,
}
STICKY: Mapping[str, float] = MappingProxyType(
    {
        "own dimension": 1.0,
        "tetrahedron": 3 / 4,
        "triangle": 2 / 3,
        "digon": 1 / 2,
        "pentagon": 2 / 5,
        "square antiprism": 3 / 8,
    }
)
"""Dimensionalities at which trained features gather, by the shape that has them."""


def shape(name: str) -> Float[Tensor, "m n"]:
    """The unit vectors of an ideal shape, by its name. Raises ConfigError for another name."""
    if name not in _SHAPES:
        raise unknown_name("shape", name, _SHAPES)
    return _SHAPES[name]()


@dataclass(frozen=True)
class Group:
    """Represented features that interfere with each other and with no others: `features` in `rank` dimensions."""

    features: tuple[int, ...]
    rank: int

    @property
    def name(self) -> str:
        """`2 in 1` is a digon, `5 in 2` a pentagon, `8 in 3` a square antiprism."""
        return f"{len(self.features)} in {self.rank}"


def groups(W: Float[Tensor, "hidden feature"], *, least: float = 0.3, threshold: float = REPRESENTED) -> list[Group]:
    """The represented features of one model as groups: two belong together where |cosine| is above `least`, and so do those
    that they belong to. The rank counts the singular values above a tenth of the highest. Largest groups first."""
    there = W.square().sum(dim=0) > threshold
    near = (cosines(W).abs() > least) & there & there[:, None]
    left, found = set(there.nonzero().flatten().tolist()), list[Group]()
    while left:
        group, edge = set[int](), {min(left)}
        while edge:
            group |= edge
            edge = set(near[sorted(edge)].any(dim=0).nonzero().flatten().tolist()) - group
        left -= group
        values = torch.linalg.svdvals(W[:, sorted(group)])
        found.append(Group(tuple(sorted(group)), int((values > values[0] / 10).sum())))
    return sorted(found, key=lambda g: (-len(g.features), g.features))
