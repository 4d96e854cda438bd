"""Synthetic features: what a toy model is trained on. A source gives batches `[instance, batch, feature]`.

`Features` draws fresh inputs: which features fire (`firing.py`), and how strongly. `FixedData` gives the same points each
time, as in the study of data-set double descent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.config import require
from microtome.toy.firing import Firing, Independent, as_density

Batch = Float[Tensor, "instance batch feature"]
Magnitude = Literal["unit", "signed"]


@runtime_checkable
class Source(Protocol):
    """Where batches come from."""

    @property
    def n_instances(self) -> int: ...

    @property
    def n_features(self) -> int: ...

    def sample(self, n: int, rng: torch.Generator) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Features:
    """`n_features` features for each of `n_instances` models side by side.

    `density` is how often a feature fires (1 − S in the paper): one number, `[instance]`, or `[instance, feature]`.
    `magnitude` is uniform on [0, 1] (`"unit"`) or on [−1, 1] (`"signed"`, for the absolute-value model). Elhage et al. 2022,
    “Experiment setup”. Raises ConfigError for densities that do not fit or that the firing rule cannot keep.
    """

    n_features: int
    density: float | Sequence[float] | Sequence[Sequence[float]] | Tensor
    n_instances: int = 1
    firing: Firing = field(default_factory=Independent)
    magnitude: Magnitude = "unit"
    densities: Float[Tensor, "instance feature"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(min(self.n_features, self.n_instances) > 0, "n_features and n_instances must be positive")
        require(self.magnitude in ("unit", "signed"), "magnitude is 'unit' or 'signed'", got=repr(self.magnitude))
        density = as_density(self.density, self.n_instances, self.n_features)
        self.firing.check(density)
        object.__setattr__(self, "densities", density)

    def sample(self, n: int, rng: torch.Generator) -> Batch:
        """`n` fresh inputs for each instance."""
        fires = self.firing(self.densities, n, rng)
        size = torch.rand(fires.shape, generator=rng)
        if self.magnitude == "signed":
            size = 2 * size - 1
        return size.mul_(fires)


@dataclass(frozen=True, eq=False)
class FixedData:
    """The same `points` `[instance, point, feature]` each time; `n` is then the number of points."""

    points: Batch

    @property
    def n_instances(self) -> int:
        return self.points.shape[0]

    @property
    def n_features(self) -> int:
        return self.points.shape[2]

    def sample(self, n: int, rng: torch.Generator) -> Batch:
        """All points. Raises ConfigError for another number of them."""
        require(n == self.points.shape[1], "A fixed data set is taken whole", got=n, expected=self.points.shape[1])
        return self.points


def unit_norm(batch: Batch) -> Batch:
    """Each input divided by its length; an input in which nothing fires stays zero."""
    result: Tensor = batch / batch.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return result


def fixed_data(features: Features, n_points: int, rng: torch.Generator, *, normalise: bool = True) -> FixedData:
    """`n_points` inputs drawn once, of length 1 if `normalise`; none of them is empty.

    Raises ConfigError where features fire so rarely that a hundred draws do not fill the set.
    """
    chosen = features.sample(n_points, rng)
    for _ in range(100):
        empty = ~chosen.any(dim=-1)
        if not bool(empty.any()):
            break
        chosen = torch.where(empty[..., None], features.sample(n_points, rng), chosen)
    require(bool(chosen.any(dim=-1).all()), "Features fire too rarely to fill a data set", got=features.density)
    return FixedData(unit_norm(chosen) if normalise else chosen)
