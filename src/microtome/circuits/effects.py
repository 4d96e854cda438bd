"""`Effects`: a value for each place of a grid and each prompt, as every sweep and attribution gives it, with intervals.

The grid has named axes (layer, position, head …) with a label for each place. Means over prompts come with bootstrap
intervals: prompts are drawn with replacement, and the interval holds the middle of the means of the draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import InputError


@dataclass(frozen=True)
class Axis:
    """One axis of a grid and the label of each place on it."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """`values[..., i]` is the effect on prompt i. `what` says what the numbers are, with their unit; `clean` and `corrupt`
    are the metric of each prompt without any intervention, where they were measured."""

    values: Float[Tensor, "*grid prompts"]
    axes: tuple[Axis, ...]
    what: str
    clean: Float[Tensor, " prompts"] | None = None
    corrupt: Float[Tensor, " prompts"] | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        got, sizes = tuple(self.values.shape[:-1]), tuple(len(axis.labels) for axis in self.axes)
        if got != sizes:
            raise InputError("The axes of effects do not fit their values", got=got, expected=sizes)

    @property
    def mean(self) -> Float[Tensor, "*grid"]:
        """The mean over prompts."""
        return self.values.mean(-1)

    def interval(
        self, confidence: float = 0.95, *, draws: int = 1000, seed: int = 0
    ) -> tuple[Float[Tensor, "*grid"], Float[Tensor, "*grid"]]:
        """The bootstrap interval (low, high) of the mean over prompts."""
        return bootstrap(self.values, confidence, draws=draws, seed=seed)

    def top(self, k: int = 10, *, by_size: bool = True) -> list[tuple[tuple[str, ...], float]]:
        """The k places with the largest mean, by its absolute value unless `by_size` is False: (labels, mean). Raises InputError
        for a k below 1."""
        if k < 1:
            raise InputError("There is nothing to list", got=f"the top {k}", expected="1 or more")
        flat = self.mean.flatten()
        order = (flat.abs() if by_size else flat).argsort(descending=True, stable=True)[:k]
        places = torch.unravel_index(order, self.mean.shape)
        return [
            (tuple(axis.labels[int(at[i])] for axis, at in zip(self.axes, places, strict=True)), float(flat[order[i]]))
            for i in range(len(order))
        ]

    @property
    def change(self) -> "Effects":
        """What each intervention changes: the values less those of the clean run. Raises InputError where these were not
        measured."""
        if self.clean is None:
            raise InputError("The metric of the clean run is not among these effects", got=self.what)
        return self.relabelled(f"change of the {self.what}", self.values - self.clean)

    def relabelled(self, what: str, values: Tensor) -> "Effects":
        """Other values on the same grid."""
        return replace(self, what=what, values=values)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain lists, with means and 95 % intervals."""
        low, high = self.interval()
        return {
            "what": self.what,
            "axes": [{"name": axis.name, "labels": list(axis.labels)} for axis in self.axes],
            "mean": self.mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "values": self.values.tolist(),
            "clean": None if self.clean is None else self.clean.tolist(),
            "corrupt": None if self.corrupt is None else self.corrupt.tolist(),
            "notes": list(self.notes),
        }


def bootstrap(
    values: Float[Tensor, "*grid prompts"], confidence: float = 0.95, *, draws: int = 1000, seed: int = 0
) -> tuple[Float[Tensor, "*grid"], Float[Tensor, "*grid"]]:
    """The percentile bootstrap interval of the mean over the last axis (Efron & Tibshirani 1993, ch. 13).

    Raises InputError for a confidence outside 0 to 1 or no draws. One prompt gives an interval of no width.
    """
    if not 0 < confidence < 1 or draws < 1:
        raise InputError(
            "No such interval", got=f"confidence {confidence}, {draws} draws", expected="0 < confidence < 1"
        )
    means = resampled(values, draws=draws, seed=seed)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype, device=means.device), dim=-1)
    return low.to(values.dtype), high.to(values.dtype)


def resampled(
    values: Float[Tensor, "*grid prompts"], *, draws: int = 1000, seed: int = 0
) -> Float[Tensor, "*grid draws"]:
    """The means over prompts drawn with replacement, once for each draw; all of a grid share the draws."""
    n = values.shape[-1]
    chosen = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n).scatter_add_(1, chosen, torch.ones(draws, n)) / n
    return values.double() @ weights.T.double().to(values.device)


def layer_axis(n_layers: int) -> Axis:
    return Axis("layer", numbers(n_layers))


def head_axis(n_heads: int) -> Axis:
    return Axis("head", numbers(n_heads))


def position_axis(strings: Sequence[str]) -> Axis:
    """Positions labelled `0 The`, `1 cat` …, so that equal tokens stay apart."""
    return Axis("position", tuple(f"{i} {text}" for i, text in enumerate(strings)))


def numbers(n: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(n))
