"""Charts with axes of numbers: lines with bands, bars with error bars, scattered points."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from microtome.common.errors import InputError
from microtome.views.canvas import DASHES, MARKERS, Sheet
from microtome.views.figure import Figure
from microtome.views.numbers import Numbers, labels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Series:
    """One line: values `y` over `x` (0, 1, 2, … if not said), and an interval `low`–`high` around each if there is one.

    NaN leaves a gap. Raises InputError for lists of unequal length.
    """

    name: str
    y: Numbers
    _: KW_ONLY
    x: Numbers | None = None
    low: Numbers | None = None
    high: Numbers | None = None

    def __post_init__(self) -> None:
        y = plain(self.y, f"values of {self.name!r}", "point")
        x = plain(range(len(y)) if self.x is None else self.x, f"x of {self.name!r}", "point")
        if len(x) != len(y):
            raise InputError(f"x and y of {self.name!r} differ in length", got=f"{len(x)} and {len(y)}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        interval(self, len(y))


@dataclass(frozen=True)
class Lines(Figure):
    """Series as lines, each with its own colour and dashes, with a band where it has an interval.

    `at` are vertical lines, (x, what is there). Raises InputError where there is nothing to draw, or a log axis has values
    that are not positive.
    """

    kind: ClassVar[str] = "lines"
    series: Sequence[Series]
    _: KW_ONLY
    x_label: str = ""
    y_label: str = ""
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    at: Sequence[tuple[float, str]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", tuple(self.series))
        object.__setattr__(self, "at", tuple((float(x), str(name)) for x, name in self.at))
        if not self.series:
            raise InputError("There is no series to draw")
        for axis in ("x", "y"):
            drawn = [v for one in self.series for v in getattr(one, axis)]
            if getattr(self, f"{axis}_scale") == "log" and any(v <= 0 for v in drawn):
                raise InputError(f"A logarithmic {axis} axis shows positive values only", got=min(drawn))

    @property
    def inches(self) -> tuple[float, float]:
        return 6.4, 3.6

    def draw(self, sheet: Sheet) -> None:
        [axes] = sheet.axes()
        axes.grid(color=sheet.colours.grid, linewidth=0.6)
        for i, one in enumerate(self.series):
            colour, x = sheet.colours.series[i % len(sheet.colours.series)], np.asarray(one.x)
            dots = "o" if len(x) <= 40 else ""
            style = DASHES[i % len(DASHES)]
            axes.plot(x, np.asarray(one.y), color=colour, ls=style, marker=dots, ms=3, lw=1.6, label=one.name)
            if one.low is not None and one.high is not None:
                axes.fill_between(x, np.asarray(one.low), np.asarray(one.high), color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, xscale=self.x_scale, yscale=self.y_scale)
        for where, name in self.at:
            axes.axvline(where, color=sheet.colours.faint, lw=1, ls=":")
            axes.text(
                where,
                1.0,
                f" {name}",
                transform=axes.get_xaxis_transform(),
                va="top",
                fontsize=8,
                color=sheet.colours.faint,
            )
        if len(self.series) > 1:
            sheet.legend(axes)


@dataclass(frozen=True)
class Bars(Figure):
    """A bar for each label; `low` and `high` are the ends of its error bar. `groups` gives each bar a colour and a
    legend entry by its class. `horizontal` suits long labels.

    Raises InputError for lists of unequal length.
    """

    kind: ClassVar[str] = "bars"
    labels: Sequence[str]
    values: Numbers
    _: KW_ONLY
    low: Numbers | None = None
    high: Numbers | None = None
    groups: Sequence[str] | None = None
    value_label: str = ""
    horizontal: bool = False

    def __post_init__(self) -> None:
        values = plain(self.values, "values of the bars", "bar")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "labels", labels(self.labels, len(values), "bar"))
        object.__setattr__(self, "groups", labels(self.groups, len(values), "bar's group"))
        interval(self, len(values))

    @property
    def inches(self) -> tuple[float, float]:
        n = len(self.labels)
        return (
            (6.0, min(max(0.26 * n + 1.0, 1.8), 14.0))
            if self.horizontal
            else (min(max(0.36 * n + 1.2, 3.6), 14.0), 3.4)
        )

    def draw(self, sheet: Sheet) -> None:
        [axes] = sheet.axes()
        values, where = np.asarray(self.values), np.arange(len(self.labels))
        names = distinct(self.groups or [""])
        colours = [
            sheet.colours.series[names.index(g) % len(sheet.colours.series)] for g in self.groups or [""] * len(where)
        ]
        if self.horizontal:
            axes.barh(where, values, color=colours, height=0.72)
            axes.set_yticks(where, list(self.labels))
            axes.invert_yaxis()
            axes.set_xlabel(self.value_label)
            axes.axvline(0, color=sheet.colours.faint, lw=0.8)
        else:
            axes.bar(where, values, color=colours, width=0.72)
            axes.set_xticks(where, list(self.labels), rotation=90 if max(map(len, self.labels)) > 5 else 0)
            axes.set_ylabel(self.value_label)
            axes.axhline(0, color=sheet.colours.faint, lw=0.8)
        axes.grid(color=sheet.colours.grid, linewidth=0.6, axis="x" if self.horizontal else "y")
        axes.set_axisbelow(True)
        if self.low is not None and self.high is not None:
            # Drawn end to end: an interval need not hold its value.
            rule, cap = (axes.hlines, "|") if self.horizontal else (axes.vlines, "_")
            rule(where, np.asarray(self.low), np.asarray(self.high), color=sheet.colours.text, lw=1)
            for end in (self.low, self.high):
                at = (np.asarray(end), where) if self.horizontal else (where, np.asarray(end))
                axes.plot(*at, cap, color=sheet.colours.text, ms=6)
        if self.groups:
            _key(sheet, axes, names, markers=False)


@dataclass(frozen=True)
class Scatter(Figure):
    """Points `x`, `y`. `labels` are shown under the pointer, and written beside the points whose numbers are `named`.
    `groups` gives each point a colour, a shape and a legend entry. `joined` draws a line through each group's points in the
    order of x. `diagonal` draws y = x.

    Raises InputError for lists of unequal length.
    """

    kind: ClassVar[str] = "scatter"
    x: Numbers
    y: Numbers
    _: KW_ONLY
    labels: Sequence[str] | None = None
    named: Sequence[int] = ()
    groups: Sequence[str] | None = None
    x_label: str = ""
    y_label: str = ""
    joined: bool = False
    diagonal: bool = False

    def __post_init__(self) -> None:
        x, y = plain(self.x, "x of the points", "point"), plain(self.y, "y of the points", "point")
        if len(x) != len(y):
            raise InputError("x and y differ in length", got=f"{len(x)} and {len(y)}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "labels", labels(self.labels, len(x), "point"))
        object.__setattr__(self, "groups", labels(self.groups, len(x), "point's group"))
        object.__setattr__(self, "named", tuple(int(i) for i in self.named))
        if self.named and (self.labels is None or not all(0 <= i < len(x) for i in self.named)):
            raise InputError("Only a point that is there and has a label can be named", got=list(self.named))

    @property
    def inches(self) -> tuple[float, float]:
        return (4.8, 4.4) if self.diagonal else (5.6, 4.0)

    def draw(self, sheet: Sheet) -> None:
        [axes] = sheet.axes()
        axes.grid(color=sheet.colours.grid, linewidth=0.6)
        axes.set_axisbelow(True)
        x, y = np.asarray(self.x), np.asarray(self.y)
        groups = self.groups or [""] * len(x)
        names = distinct(groups)
        for i, name in enumerate(names):
            here = sorted((j for j, group in enumerate(groups) if group == name), key=x.__getitem__)
            colour = sheet.colours.series[i % len(sheet.colours.series)]
            axes.scatter(
                x[here], y[here], s=18, alpha=0.8, linewidths=0, marker=MARKERS[i % len(MARKERS)], color=colour
            )
            if self.joined:
                axes.plot(x[here], y[here], lw=1, alpha=0.6, color=colour)
        if self.diagonal:
            axes.axline((float(np.nanmean(x)),) * 2, slope=1, color=sheet.colours.faint, lw=1, ls="--")
        for i in self.named:
            axes.annotate(
                (self.labels or ())[i], (x[i], y[i]), xytext=(4, 3), textcoords="offset points", fontsize=8,
                color=sheet.colours.text,
            )  # fmt: skip
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        if self.groups:
            _key(sheet, axes, names, markers=True)


def interval(chart: Series | Bars, n: int) -> None:
    """Make the chart's `low` and `high` plain. Raises InputError unless both are there or neither."""
    if chart.low is None and chart.high is None:
        return
    if chart.low is None or chart.high is None:
        raise InputError(
            "An interval has two ends", got="low without high" if chart.high is None else "high without low"
        )
    low, high = (plain(ends, "ends of the intervals", "point") for ends in (chart.low, chart.high))
    if not len(low) == len(high) == n:
        raise InputError("There must be an interval for each value", got=(len(low), len(high)), expected=n)
    for ends in zip(low, high, strict=True):
        if ends[0] > ends[1]:
            raise InputError("An interval is upside down", got=ends)
    object.__setattr__(chart, "low", low)
    object.__setattr__(chart, "high", high)


def distinct(groups: Sequence[str]) -> list[str]:
    """The names of the groups in the order in which they come."""
    return list(dict.fromkeys(groups))


def _key(sheet: Sheet, axes: "Axes", names: Sequence[str], *, markers: bool) -> None:
    """A legend of the groups' colours, and shapes where points have them."""
    for i, name in enumerate(names):
        colour = sheet.colours.series[i % len(sheet.colours.series)]
        axes.plot([], [], ls="", marker=MARKERS[i % len(MARKERS)] if markers else "s", color=colour, label=name)
    sheet.legend(axes)
