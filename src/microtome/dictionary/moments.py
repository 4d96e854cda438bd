"""Sums in double precision, taken while activations stream by: over everything (`Moments`), and by unit (`UnitSums`) for
intervals.

A unit is one sequence; of very many sequences, neighbouring ones make a unit together, so that memory has a bound.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MOST_UNITS = 1024
_SINK = 10.0


def is_sink(y: Float[Tensor, "row d"]) -> Bool[Tensor, " row"]:
    """Attention sinks: the rows whose squared norm is above ten times the median of these rows."""
    squares = y.float().square().sum(1)
    sinks: Tensor = squares > _SINK * squares.median()
    return sinks


class Moments:
    """Streaming sums in double precision, per dimension, of x, x² and (x − x̂)²."""

    def __init__(self, d: int) -> None:
        self.n = 0
        self.sum, self.square, self.error = (torch.zeros(d, dtype=torch.float64) for _ in range(3))

    def add(self, x: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"]) -> None:
        x64, difference = x.double(), (x - reconstruction).double()
        self.n += len(x)
        self.sum += x64.sum(0).cpu()
        self.square += x64.square().sum(0).cpu()
        self.error += difference.square().sum(0).cpu()

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """x̄ per dimension."""
        return self.sum / max(self.n, 1)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Σ(x − x̄)² per dimension."""
        return self.square - self.sum.square() / max(self.n, 1)

    def fvu(self, kept: Bool[Tensor, " d"] | None = None) -> float:
        """The fraction of variance unexplained, over all dimensions or those `kept`; NaN where nothing varies."""
        error, variance = (self.error, self.variance) if kept is None else (self.error[kept], self.variance[kept])
        return float(error.sum() / variance.sum())


class UnitSums:
    """Named sums for each unit, and the sums of y per dimension that an interval of FVU needs."""

    def __init__(self, n_units: int, d: int = 0) -> None:
        self.n_units = n_units
        self.vector = torch.zeros(n_units, d, dtype=torch.float64)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Float[Tensor, " row"], unit: Int[Tensor, " row"]) -> None:
        """Add one value of each row to its unit."""
        sums = self._sums.setdefault(name, torch.zeros(self.n_units, dtype=torch.float64))
        sums.index_add_(0, unit.cpu(), values.double().cpu())

    def add_vectors(self, y: Float[Tensor, "row d"], unit: Int[Tensor, " row"]) -> None:
        """Add each row to its unit's vector."""
        self.vector.index_add_(0, unit.cpu(), y.double().cpu())

    def __getitem__(self, name: str) -> Float[Tensor, " unit"]:
        return self._sums.get(name, torch.zeros(self.n_units, dtype=torch.float64))

    def fvu(
        self, weights: Float[Tensor, "draws unit"], of: str = "", columns: slice = slice(None)
    ) -> Float[Tensor, " draws"]:
        """FVU of units counted so often, from the sums `n`, `square` (‖y‖²), `error` (‖y − ŷ‖²) and the vectors. Of some
        `columns` of y alone: from the sums whose names have `of` behind them."""
        n, mean_part = weights @ self["n"], (weights @ self.vector[:, columns]).square().sum(1)
        return (weights @ self[f"error{of}"]) / (weights @ self[f"square{of}"] - mean_part / n)


def units_of(n_sequences: int) -> Int[Tensor, " sequence"]:
    """The unit of each sequence."""
    n_units = min(n_sequences, _MOST_UNITS)
    return torch.arange(n_sequences) * n_units // max(n_sequences, 1)
