"""Phase diagrams: whether one feature more is ignored, stored in superposition, or given a dimension of its own.

m hidden dimensions, n = m + 1 features; all but the last have importance 1, the last one the relative importance. For n = 2,
m = 1 the border of superposition is known: see `boundary`. Elhage et al. 2022, “Superposition as a phase change”.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.common.config import require
from microtome.common.progress import Progress
from microtome.toy.features import Features
from microtome.toy.geometry import REPRESENTED, cosines, interference
from microtome.toy.models import ToyConfig
from microtome.toy.training import TrainToyConfig
from microtome.toy.trials import trials

Phase = Literal["ignored", "superposition", "dedicated"]
PHASES: tuple[Phase, ...] = ("ignored", "superposition", "dedicated")


def antipodal_loss(density: float, ratio: float) -> float:
    """Σ_i I_i E(x_i − x'_i)² of W = [1, −1], b = 0, importances 1 and `ratio`: only when both fire is anything lost,
    E min(x_1, x_2)² = 1/6 for each."""
    return density**2 * (1 + ratio) / 6


def dedicated_loss(density: float, ratio: float) -> float:
    """The same where the less important feature is dropped and its output is its mean p/2: the variance p/3 − p²/4 is lost,
    times the lower importance."""
    return min(ratio, 1.0) * (density / 3 - density**2 / 4)


def boundary(ratio: float) -> float:
    """The density below which W = [1, −1], b = 0 loses less than dropping a feature: 4r/(2 + 5r) for a relative importance
    r ≤ 1; above 1 the two features change places. Where `antipodal_loss` = `dedicated_loss`.

    Trained models store both features a little beyond it, because their W and b are free. Raises ConfigError unless
    `ratio` > 0.
    """
    require(ratio > 0, "A relative importance is positive", got=ratio)
    r = min(ratio, 1 / ratio)
    return 4 * r / (2 + 5 * r)


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """The best of several models for each density (row) and relative importance (column)."""

    densities: tuple[float, ...]
    ratios: tuple[float, ...]
    W: Float[Tensor, "density ratio hidden feature"]
    losses: Float[Tensor, "density ratio seed"]
    """On one sample for each cell, the same for all its seeds."""

    @property
    def norms(self) -> Float[Tensor, "density ratio"]:
        """‖W_i‖² of the last feature."""
        return self.W[..., -1].square().sum(dim=-1)

    @property
    def overlap(self) -> Float[Tensor, "density ratio"]:
        """Σ_{j≠i} (Ŵ_i · W_j)² of the last feature: 0 apart, about 1 in superposition."""
        return interference(self.W)[..., -1]

    @property
    def phases(self) -> Int[Tensor, "density ratio"]:
        """Which of PHASES each cell is in, as its number."""
        stored = self.norms > REPRESENTED
        return torch.where(stored, torch.where(self.overlap > REPRESENTED, 1, 2), 0)

    @property
    def antipodal(self) -> Tensor:
        """Whether the last feature and another lie opposite each other, both represented: booleans `[density, ratio]`."""
        norms = self.W.square().sum(dim=-2)
        opposite = cosines(self.W)[..., -1, :-1] < -0.9
        both = (norms[..., :-1] > REPRESENTED) & (norms[..., -1:] > REPRESENTED)
        return (opposite & both).any(dim=-1)


def phase_diagram(
    densities: Sequence[float],
    ratios: Sequence[float],
    *,
    n_hidden: int = 1,
    seeds: int = 8,
    train: TrainToyConfig | None = None,
    n_test: int = 20_000,
    progress: Progress | None = None,
) -> PhaseDiagram:
    """Train `seeds` ReLU-output models for each density and relative importance, all side by side, and keep the one with the
    lowest loss. (A single model often stops at a worse solution: of eight, one to six find the antipodal pair.)"""
    require(len(densities) > 0 and len(ratios) > 0, "A diagram needs densities and ratios")
    grid, n_features, train = (len(densities), len(ratios)), n_hidden + 1, train or TrainToyConfig()
    density = torch.tensor(densities)[:, None].expand(grid).flatten()
    importance = torch.ones(*grid, n_features)
    importance[..., -1] = torch.tensor(ratios)
    done = trials(
        ToyConfig(n_features=n_features, n_hidden=n_hidden, seed=train.seed),
        Features(n_features, density, len(density)),
        seeds,
        train,
        importance=importance.flatten(0, 1),
        n_test=n_test,
        progress=progress,
    )
    W, losses = done.best.W_in.detach().unflatten(0, grid), done.losses.unflatten(0, grid)
    return PhaseDiagram(tuple(densities), tuple(ratios), W, losses)
