"""`microtome bench train`: FVU with and without attention sinks, and of two sides at the same L0.

A *sink* is a held-out row whose squared norm is above ten times the median row's. A few of them can carry half of the
variance that FVU divides by, so each FVU is also given without them (`fvu_without_sinks`).

FVU falls as L0 rises, so it is compared at equal L0. TopK and BatchTopK have it by themselves. For ReLU and JumpReLU our
side is trained again, untimed, with other λ, until its L0 lie on both sides of the peer's and near it (`curve`); our FVU
at the peer's L0 is the straight line between the two nearest, in log L0 and log FVU (`fvu_at`). Where the peer's L0 is out of
reach there is no ratio.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

KINDS = ("fvu", "fvu_without_sinks")
_SAME = 1.01  # L0 this near stand for each other
_NEAR = 1.25  # a bracket this narrow is narrow enough
_BEYOND = 1.08  # how far beyond the wanted L0 a training aims, to bracket it
_FLATTEST, _STEEPEST = -0.25, -4.0


@dataclass(frozen=True)
class Point:
    """A training's λ (zero for architectures without), its L0, and its FVU of both kinds."""

    coefficient: float
    l0: float
    fvu: float
    fvu_without_sinks: float


def fvu_at(points: Sequence[Point], l0: float, kind: str) -> float | None:
    """The FVU at this L0; None where L0 is out of the points' reach."""
    below, above = _neighbours(points, l0)
    if below is None or above is None:
        near = [p for p in points if l0 / _SAME <= p.l0 <= l0 * _SAME]
        return float(getattr(near[0], kind)) if near else None
    low, high = float(getattr(below, kind)), float(getattr(above, kind))
    if above.l0 == below.l0:
        return low
    share = math.log(l0 / _positive(below.l0)) / math.log(above.l0 / _positive(below.l0))
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def curve(first: Point, l0: float, train: Callable[[float], Point], most: int) -> list[Point]:
    """`first` and up to `most` further trainings, each with a λ whose L0 should be near the one wanted. It ends early where λ
    no longer moves L0, and does not begin where there is no such L0."""
    points = [first]
    if not l0 > 0:  # all dead, or diverged
        return points
    while len(points) <= most and not _settled(points, l0):
        points.append(train(next_coefficient(points, l0)))
        if 1 / _SAME <= _positive(points[-1].l0) / _positive(points[-2].l0) <= _SAME:
            break
    return points


def _settled(points: Sequence[Point], l0: float) -> bool:
    """Whether points lie on both sides of L0, close together or one of them right there."""
    below, above = _neighbours(points, l0)
    if below is None or above is None:
        return False
    return above.l0 <= _NEAR * below.l0 or above.l0 <= _SAME * l0 or l0 <= _SAME * below.l0


def next_coefficient(points: Sequence[Point], l0: float) -> float:
    """The λ for the L0 that is wanted (or a little beyond it, while all points lie on one side of it): log L0 as a straight
    line in log λ through the two nearest points; through one, L0 ∝ 1/λ."""
    below, above = _neighbours(points, l0)
    aim = l0 / _BEYOND if below is None else l0 * _BEYOND if above is None else l0
    near = sorted(points, key=lambda p: abs(math.log(_positive(p.l0) / l0)))
    nearest, slope = near[0], -1.0
    others = [p for p in near[1:] if p.coefficient != nearest.coefficient]
    if others:
        rise = math.log(_positive(others[0].l0) / _positive(nearest.l0))
        slope = rise / math.log(others[0].coefficient / nearest.coefficient)
        slope = min(_FLATTEST, max(_STEEPEST, slope))
    return nearest.coefficient * math.exp(math.log(aim / _positive(nearest.l0)) / slope)


def _neighbours(points: Sequence[Point], l0: float) -> tuple[Point | None, Point | None]:
    """The nearest points with at most and with at least this L0."""
    below = max((p for p in points if p.l0 <= l0), key=lambda p: p.l0, default=None)
    above = min((p for p in points if p.l0 >= l0), key=lambda p: p.l0, default=None)
    return below, above


def _positive(l0: float) -> float:
    return max(l0, 1e-3)
