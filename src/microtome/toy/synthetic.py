"""Synthetic data for dictionaries: activations made from known features along known directions.

What a dictionary learns from them can be held against the truth, which no language model allows. Correlated features,
hierarchies and Zipf frequencies (`firing.py`) make the ways in which dictionaries go wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.common.config import require
from microtome.common.device import generator
from microtome.common.errors import InputError
from microtome.toy.features import Features
from microtome.toy.firing import Firing, Independent


@dataclass(frozen=True, eq=False)
class SyntheticData:
    """Activations Σ_i c_i directions_i + noise, of features that are drawn from `features` (one instance).

    `directions` are the ground truth, `[n_true, d]`; `noise` is the standard deviation of Gaussian noise in each
    dimension. Raises ConfigError where features and directions do not fit.
    """

    directions: Float[Tensor, "n_true d"]
    features: Features
    noise: float = 0.0

    def __post_init__(self) -> None:
        n = self.directions.shape[0]
        fits = (self.features.n_instances, self.features.n_features) == (1, n)
        got = f"{self.features.n_instances} instance(s) of {self.features.n_features} features"
        require(fits, "There must be a direction for each feature", got=got, expected=f"1 instance of {n}")
        require(self.noise >= 0, "noise must not be negative", got=self.noise)

    @classmethod
    def make(
        cls,
        n_true: int,
        d: int,
        *,
        density: float | Sequence[float] | Tensor,
        firing: Firing | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> "SyntheticData":
        """Random unit directions, and features of the given density (one number, or one for each feature)."""
        require(min(n_true, d) > 0, "n_true and d must be positive", got=(n_true, d))
        drawn = torch.randn(n_true, d, generator=generator(seed, "true directions"))
        densities = torch.as_tensor(density, dtype=torch.float32)
        each = densities[None] if densities.ndim == 1 else densities
        features = Features(n_true, each, firing=firing or Independent())
        return cls(drawn / drawn.norm(dim=1, keepdim=True), features, noise)

    @property
    def d(self) -> int:
        return self.directions.shape[1]

    @property
    def n_true(self) -> int:
        return self.directions.shape[0]

    def sample(
        self, n: int, rng: torch.Generator
    ) -> tuple[Float[Tensor, "{n} {self.d}"], Float[Tensor, "{n} {self.n_true}"]]:
        """`n` activations, and the codes (which feature how strongly) that they were made from."""
        codes = self.features.sample(n, rng)[0]
        activations = codes @ self.directions
        if self.noise:
            activations = activations + self.noise * torch.randn(activations.shape, generator=rng)
        return activations, codes


@dataclass(frozen=True, eq=False)
class Recovery:
    """How well learned directions match the true ones; leading axes are dictionaries side by side."""

    best: Float[Tensor, "*n n_true"]
    """The cosine of each true direction with its nearest learned one."""
    threshold: float

    @property
    def found(self) -> Bool[Tensor, "*n n_true"]:
        return self.best > self.threshold

    @property
    def mean_max_cosine(self) -> Float[Tensor, "*n"]:
        return self.best.mean(dim=-1)

    @property
    def full(self) -> Bool[Tensor, "*n"]:
        """Whether every true direction was found."""
        return self.found.all(dim=-1)


def recovery(
    truth: Float[Tensor, "*n n_true d"], learned: Float[Tensor, "*n n_learned d_learned"], *, threshold: float = 0.95
) -> Recovery:
    """The nearest learned direction of each true one, by signed cosine: the opposite direction is no match. Lengths do not
    matter. A learned direction may match two true ones only if those are that near to each other.

    Raises InputError where the dimensions differ.
    """
    if truth.shape[-1] != learned.shape[-1]:
        raise InputError("The directions differ in length", got=learned.shape[-1], expected=truth.shape[-1])
    unit = [w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12) for w in (truth, learned)]
    return Recovery((unit[0] @ unit[1].transpose(-1, -2)).amax(dim=-1), threshold)
