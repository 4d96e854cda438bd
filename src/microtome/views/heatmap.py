"""Heatmaps: a matrix as coloured cells (layers × positions, layers × heads), and attention patterns side by side."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from microtome.common.errors import InputError
from microtome.views.canvas import Sheet, thinned
from microtome.views.figure import Figure
from microtome.views.numbers import Numbers, labels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = np.ndarray[tuple[int, int], np.dtype[np.float64]]
_CELL, _MARGIN = 0.21, 1.1  # inches: a cell at its best, and what ticks and labels take


@dataclass(frozen=True)
class Heatmap(Figure):
    """Values `[row, column]` as colours, row 0 on top.

    `diverging` puts the middle of the scale at 0 (orange below, blue above). `limits` fixes the scale; by default it
    reaches from 0, or the smallest value, to the largest. `marks` are (row, column) cells with a ring around them; `border`
    is a line through (row, column) points, which may lie between cells. NaN is a cell without a value, crossed out. Raises
    InputError for values that are no matrix, or labels that do not fit it.
    """

    kind: ClassVar[str] = "heatmap"
    values: Numbers
    _: KW_ONLY
    rows: Sequence[str] | None = None
    """The label of each row; by default its number."""
    columns: Sequence[str] | None = None
    row_label: str = ""
    """What the rows are: "layer"."""
    column_label: str = ""
    value_label: str = ""
    """What the colours are, with the unit."""
    diverging: bool = False
    limits: tuple[float, float] | None = None
    marks: Sequence[tuple[int, int]] = ()
    border: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        values = plain(self.values, "values of a heatmap", "row column")
        marks = tuple((int(row), int(column)) for row, column in self.marks)
        outside = [m for m in marks if not (0 <= m[0] < len(values) and 0 <= m[1] < len(values[0]))]
        if outside:
            raise InputError(
                "A mark lies outside the heatmap", got=outside[0], expected=f"[{len(values)}, {len(values[0])}]"
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "marks", marks)
        object.__setattr__(self, "border", tuple((float(row), float(column)) for row, column in self.border))
        object.__setattr__(self, "rows", labels(self.rows, len(values), "row"))
        object.__setattr__(self, "columns", labels(self.columns, len(values[0]), "column"))
        object.__setattr__(self, "limits", scale(values, self.limits, diverging=self.diverging))

    @property
    def cells(self) -> Cells:
        """The values as an array `[row, column]`."""
        return np.asarray(self.values, dtype=np.float64)

    @property
    def inches(self) -> tuple[float, float]:
        n_rows, n_columns = self.cells.shape
        return (
            min(max(n_columns * _CELL + _MARGIN + 0.9, 3.2), 14.0),
            min(max(n_rows * _CELL * 0.9 + _MARGIN, 2.0), 14.0),
        )

    def draw(self, sheet: Sheet) -> None:
        [axes] = sheet.axes()
        image = paint(axes, sheet, self.cells, self.limits, diverging=self.diverging)
        n_rows, n_columns = self.cells.shape
        ticks(axes, "y", self.rows, n_rows, room=int(self.inches[1] / 0.17))
        ticks(axes, "x", self.columns, n_columns, room=int(self.inches[0] / (0.17 if self.columns else 0.27)))
        axes.set(xlabel=self.column_label, ylabel=self.row_label)
        for row, column in self.marks:
            left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
            around = ([left, right, right, left, left], [top, top, bottom, bottom, top])
            axes.plot(*around, color=sheet.colours.text, lw=1.3, clip_on=False)
        if self.border:
            rows, columns = zip(*self.border, strict=True)
            axes.plot(columns, rows, color=sheet.colours.text, lw=1.6, ls="--", scalex=False, scaley=False)
        bar = sheet.paper.colorbar(image, ax=axes, shrink=0.9, aspect=25, pad=0.02)
        bar.ax.tick_params(colors=sheet.colours.faint, labelsize=8, length=2.5)
        bar.outline.set_visible(False)
        bar.set_label(self.value_label, color=sheet.colours.text, fontsize=9)


@dataclass(frozen=True)
class Patterns(Figure):
    """Attention patterns `[head, query, key]` side by side, one small square each, all on one scale from 0 to 1.

    `names` are the heads' ("5.1"), `tokens` the text's. Raises InputError for patterns that are not square, or names that
    do not fit.
    """

    kind: ClassVar[str] = "patterns"
    values: Numbers
    _: KW_ONLY
    names: Sequence[str]
    tokens: Sequence[str] | None = None
    per_row: int = 4
    value_label: str = "attention"

    def __post_init__(self) -> None:
        values = plain(self.values, "attention patterns", "head query key")
        if len(values[0]) != len(values[0][0]):
            raise InputError("Attention patterns are square", got=f"[{len(values[0])}, {len(values[0][0])}]")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "names", labels(self.names, len(values), "head"))
        object.__setattr__(self, "tokens", labels(self.tokens, len(values[0]), "token"))

    @property
    def inches(self) -> tuple[float, float]:
        n, side = len(self.names), self._side
        columns = min(n, self.per_row)
        return columns * side + 0.6, math.ceil(n / columns) * (side + 0.25) + (0.5 if self.title else 0.1)

    @property
    def _side(self) -> float:
        n_tokens = np.asarray(self.values).shape[1]
        return min(max(2.1, n_tokens * 0.15 + 0.7), 4.0) if self.tokens else 2.1

    def draw(self, sheet: Sheet) -> None:
        columns = min(len(self.names), self.per_row)
        grid = sheet.axes(math.ceil(len(self.names) / columns), columns)
        for axes in grid[len(self.names) :]:
            axes.set_visible(False)
        cells = np.asarray(self.values, dtype=np.float64)
        n_tokens = cells.shape[1]
        room = int((self._side - 0.5) / (0.15 if self.tokens else 0.3))
        for i, (axes, name) in enumerate(zip(grid, self.names, strict=False)):
            image = paint(axes, sheet, cells[i], (0.0, 1.0), diverging=False)
            axes.set_aspect("equal")
            axes.set_title(name, fontsize=9, color=sheet.colours.text)
            ticks(axes, "x", self.tokens, n_tokens, room=room)
            ticks(axes, "y", self.tokens if i % columns == 0 else None, n_tokens, room=room)
            axes.tick_params(labelsize=6.5, labelleft=i % columns == 0)
        bar = sheet.paper.colorbar(image, ax=grid, shrink=0.6, aspect=25, pad=0.02)
        bar.ax.tick_params(colors=sheet.colours.faint, labelsize=8, length=2.5)
        bar.outline.set_visible(False)
        bar.set_label(self.value_label, color=sheet.colours.text, fontsize=9)


def scale(
    values: tuple[tuple[float, ...], ...], limits: tuple[float, float] | None, *, diverging: bool
) -> tuple[float, float]:
    """The lowest and the highest value of the colours. Raises InputError for limits that are no range."""
    known = [v for row in values for v in row if not math.isnan(v)]
    if limits is None:
        low, high = min([0.0, *known]), max([0.0, *known])
        if diverging:
            low, high = -max(-low, high), max(-low, high)
        return (low, high) if low < high else (low, low + 1.0)
    low, high = map(float, limits)
    if not low < high:
        raise InputError("The limits of a colour scale must go up", got=limits)
    if diverging and low != -high:
        raise InputError(
            "A diverging scale has 0 in the middle", got=limits, expected=(-max(-low, high), max(-low, high))
        )
    return low, high


def paint(axes: "Axes", sheet: Sheet, cells: Cells, limits: tuple[float, float] | None, *, diverging: bool) -> Any:
    """The cells as an image, sharp at any size; returns what a colour bar is made from."""
    low, high = limits or (None, None)
    axes.spines[:].set_visible(False)
    empty = np.argwhere(np.isnan(cells))
    axes.plot(empty[:, 1], empty[:, 0], "x", color=sheet.colours.faint, ms=4, mew=0.8)
    return axes.imshow(
        np.ma.masked_invalid(cells),
        cmap=sheet.colormap(diverging=diverging),
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )


def ticks(axes: "Axes", side: str, names: Sequence[str] | None, n: int, *, room: int) -> None:
    """Labels on one axis: names all, if there are any and they fit; numbers thinned."""
    at = range(n) if names and n <= room else thinned(n, room)
    words = [names[i] if names else str(i) for i in at]
    if side == "x":
        axes.set_xticks(at, words, rotation=90 if names and max(map(len, words)) > 2 else 0)
    else:
        axes.set_yticks(at, words)
