"""Intervals by the bootstrap: units (sequences, texts, words, prompts) are drawn with replacement, again and again.

Every figure here is a ratio of sums over units; a mean is one whose denominators are 1. Where a measurement was made
with several seeds, each draw takes the same units for all of them, since they are the same texts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 1000
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure, the ends of its 95 % bootstrap interval, and its value with each seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...] = ()

    @classmethod
    def of_ratio(
        cls, numerator: Float[Tensor, "seed unit"], denominator: Float[Tensor, "seed unit"], *, seed: int = 0
    ) -> "Estimate":
        """Σ numerator / Σ denominator, its mean over seeds; a unit that a seed left out has zeros. NaN where no seed has
        a denominator other than 0."""
        ratios = numerator.double().sum(1) / denominator.double().sum(1)
        drawn = drawn_weights(numerator.shape[1], seed=seed)
        draws = ((drawn @ numerator.double().T) / (drawn @ denominator.double().T)).nanmean(1)
        low, high = percentiles(draws)
        return cls(float(ratios.nanmean()), low, high, tuple(ratios.tolist()))

    @classmethod
    def of_mean(cls, values: Float[Tensor, "seed unit"], *, seed: int = 0) -> "Estimate":
        """The mean over units and seeds; NaN marks a unit that a seed left out."""
        there = ~values.isnan()
        return cls.of_ratio(values.nan_to_num(), there.double(), seed=seed)


def drawn_weights(n_units: int, *, draws: int = DRAWS, seed: int = 0) -> Float[Tensor, "draws unit"]:
    """How often each unit is in each draw of `n_units` with replacement (Efron & Tibshirani 1993, ch. 6). One unit alone does
    not show how units differ: NaN."""
    if n_units == 1:
        return torch.full((draws, 1), torch.nan, dtype=torch.float64)
    chosen = torch.randint(n_units, (draws, n_units), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(draws, n_units, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(draws, n_units, dtype=torch.float64)
    )


def percentiles(draws: Float[Tensor, " draws"]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the draws, those that gave no number left out; NaN if none did."""
    finite = draws[draws.isfinite()]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = torch.quantile(finite, torch.tensor(_TAILS, dtype=finite.dtype))
    return float(low), float(high)


def interval(
    figure: Callable[[Float[Tensor, "draws unit"]], Float[Tensor, " draws"]], n_units: int, *, seed: int = 0
) -> tuple[float, float]:
    """The interval of any figure of weighted units."""
    return percentiles(figure(drawn_weights(n_units, seed=seed)))
