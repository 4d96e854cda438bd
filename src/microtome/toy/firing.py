"""Which features fire together. A firing rule turns each feature's density into yes or no for a batch of inputs.

Every rule keeps each feature's marginal probability at its density, whatever the features do together; so models that are
trained under two rules differ by the rule alone. (Drawing two anticorrelated features one after the other, as is often done,
gives p(1 − p) instead of p.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.common.config import require
from microtome.common.errors import ConfigError

Density = Float[Tensor, "instance feature"]
Fires = Bool[Tensor, "instance batch feature"]


@runtime_checkable
class Firing(Protocol):
    """A rule. `check` raises ConfigError for densities that the rule cannot keep; `__call__` draws `n` inputs."""

    def check(self, density: Density) -> None: ...

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires: ...


def _uniform(density: Density, n: int, columns: int, rng: torch.Generator) -> Float[Tensor, "instance batch column"]:
    return torch.rand(len(density), n, columns, generator=rng, device=density.device)


@dataclass(frozen=True)
class Independent:
    """Each feature fires by itself."""

    def check(self, density: Density) -> None:
        """Any density will do."""

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        return _uniform(density, n, density.shape[1], rng) < density[:, None]


@dataclass(frozen=True)
class Together:
    """Consecutive groups of `size` features fire together (correlated features). Where their densities differ, the rarer
    ones fire in a part of the cases in which the more frequent ones do."""

    size: int = 2

    def check(self, density: Density) -> None:
        _check_groups(density, self.size)

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        one = _uniform(density, n, density.shape[1] // self.size, rng)
        return one.repeat_interleave(self.size, dim=-1) < density[:, None]


@dataclass(frozen=True)
class Apart:
    """Of consecutive groups of `size` features at most one fires at a time (anticorrelated features)."""

    size: int = 2

    def check(self, density: Density) -> None:
        _check_groups(density, self.size)
        most = float(density.unflatten(1, (-1, self.size)).sum(-1).max())
        require(
            most <= 1 + 1e-6,
            "Features of which one fires at a time must have densities that add up to 1 at most",
            got=round(most, 4),
        )

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        one = _uniform(density, n, density.shape[1] // self.size, rng).repeat_interleave(self.size, dim=-1)
        ends = density.unflatten(1, (-1, self.size)).cumsum(-1).flatten(1)
        result: Tensor = (one < ends[:, None]) & (one >= (ends - density)[:, None])
        return result


@dataclass(frozen=True)
class Hierarchy:
    """A child fires only where its parent does. `parents[i]` is the parent of feature i, or −1; it comes before i."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for i, parent in enumerate(self.parents):
            require(-1 <= parent < i, f"The parent of feature {i} must be −1 or come before it", got=parent)

    def check(self, density: Density) -> None:
        require(
            len(self.parents) == density.shape[1],
            "There must be a parent for each feature",
            got=len(self.parents),
            expected=density.shape[1],
        )
        for i, parent in enumerate(self.parents):
            fits = parent < 0 or bool((density[:, i] <= density[:, parent] + 1e-6).all())
            require(fits, f"Feature {i} cannot fire more often than its parent {parent}")

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        drawn, columns = _uniform(density, n, density.shape[1], rng), list[Tensor]()
        for i, parent in enumerate(self.parents):
            if parent < 0:
                columns.append(drawn[..., i] < density[:, None, i])
            else:
                given = density[:, i] / density[:, parent].clamp_min(1e-12)
                columns.append(columns[parent] & (drawn[..., i] < given[:, None]))
        return torch.stack(columns, dim=-1)


@dataclass(frozen=True, eq=False)
class Copula:
    """Any correlation (Gaussian copula): a feature fires where a normal variable lies below its density's quantile, and the
    normal variables have the given correlation matrix.

    Raises ConfigError for a matrix that is no correlation matrix.
    """

    correlation: Float[Tensor, "feature feature"]
    _factor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        c = self.correlation.double()
        sound = c.ndim == 2 and c.shape[0] == c.shape[1] and bool(torch.allclose(c, c.T, atol=1e-6))
        require(sound, "A correlation matrix is square and symmetric", got=f"shape {list(c.shape)}")
        require(bool(torch.allclose(c.diagonal(), torch.ones(len(c)).double(), atol=1e-6)), "Its diagonal must be 1")
        values, vectors = torch.linalg.eigh(c)
        if float(values.min()) < -1e-6:
            raise ConfigError("A correlation matrix has no negative eigenvalues", got=f"{float(values.min()):.3g}")
        object.__setattr__(self, "_factor", (vectors * values.clamp_min(0).sqrt()).float())

    def check(self, density: Density) -> None:
        n = density.shape[1]
        require(
            len(self.correlation) == n,
            "The correlation matrix must fit the features",
            got=len(self.correlation),
            expected=n,
        )

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        normal = torch.randn(len(density), n, density.shape[1], generator=rng, device=density.device)
        threshold = torch.special.ndtri(density.double()).float()
        result: Tensor = normal @ self._factor.T.to(density.device) < threshold[:, None]
        return result


@dataclass(frozen=True)
class Blocks:
    """Different rules for consecutive blocks of features: (rule, number of features) each, independent of each other."""

    parts: tuple[tuple[Firing, int], ...]

    @property
    def _sizes(self) -> list[int]:
        return [size for _, size in self.parts]

    def check(self, density: Density) -> None:
        n = density.shape[1]
        require(sum(self._sizes) == n, "The blocks must hold all features", got=sum(self._sizes), expected=n)
        for (rule, _), block in zip(self.parts, density.split(self._sizes, dim=1), strict=True):
            rule.check(block)

    def __call__(self, density: Density, n: int, rng: torch.Generator) -> Fires:
        blocks = density.split(self._sizes, dim=1)
        return torch.cat([rule(block, n, rng) for (rule, _), block in zip(self.parts, blocks, strict=True)], dim=-1)


def zipf(n: int, *, exponent: float = 1.0, highest: float = 0.5) -> Float[Tensor, " feature"]:
    """Densities that fall as a power of the rank: `highest` / rank**exponent, as words in a text do."""
    require(n > 0 and 0 < highest <= 1, "zipf needs n > 0 and a highest density in (0, 1]", got=(n, highest))
    return highest * torch.arange(1, n + 1).float() ** -exponent


def spaced(first: float, last: float, n: int) -> tuple[float, ...]:
    """`n` values from `first` to `last` with a constant ratio (both included): densities of a sweep."""
    require(first > 0 and last > 0 and n > 0, "A constant ratio needs positive ends", got=(first, last, n))
    step = math.log(last / first) / max(n - 1, 1)
    return tuple(first * math.exp(i * step) for i in range(n))


def _check_groups(density: Density, size: int) -> None:
    n = density.shape[1]
    require(size > 0 and n % size == 0, f"Groups of {size} must fill the features", got=f"{n} features")


def as_density(
    values: float | Sequence[float] | Sequence[Sequence[float]] | Tensor, n_instances: int, n_features: int
) -> Density:
    """`[instance, feature]` densities from one number, one for each instance, or all of them.

    Raises ConfigError for another shape, or values that are no probabilities.
    """
    given = torch.as_tensor(values, dtype=torch.float32)
    if given.ndim == 1:
        given = given[:, None]
    try:
        density = given.expand(n_instances, n_features).contiguous()
    except RuntimeError as error:
        raise ConfigError(
            "The densities do not fit",
            got=f"shape {list(torch.as_tensor(values).shape)}",
            expected=f"a number, [{n_instances}] (one for each instance) or [{n_instances}, {n_features}]",
        ) from error
    sound = bool(((density >= 0) & (density <= 1)).all())
    require(sound, "Densities are probabilities", got=f"{float(density.min()):.3g} to {float(density.max()):.3g}")
    return density
