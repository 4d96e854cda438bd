"""Directions in the plane: the columns of a matrix with two rows as arrows from the middle, one panel for each matrix."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from microtome.common.errors import InputError
from microtome.views.canvas import DASHES, MARKERS, Sheet
from microtome.views.charts import distinct
from microtome.views.figure import Figure
from microtome.views.numbers import Numbers, labels, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDE = 1.7  # inches


@dataclass(frozen=True)
class Directions(Figure):
    """Vectors `[vector, 2]` for each panel, from the origin; the panels may hold different numbers of them.

    `names` are the panels'. `groups` gives each vector of each panel a colour, a dash and a legend entry; `labels` what is
    shown under the pointer. All panels reach from −`limit` to `limit`, by default a little beyond the longest. Raises
    InputError for vectors that do not lie in a plane, or names that do not fit.
    """

    kind: ClassVar[str] = "directions"
    panels: Sequence[Numbers]
    _: KW_ONLY
    names: Sequence[str]
    groups: Sequence[Sequence[str]] | None = None
    labels: Sequence[Sequence[str]] | None = None
    limit: float | None = None
    per_row: int = 5

    def __post_init__(self) -> None:
        panels = tuple(plain(panel, "vectors of a panel", "vector 2") for panel in self.panels)
        if not panels or any(len(vector) != 2 for panel in panels for vector in panel):
            raise InputError("Directions in the plane have two coordinates", expected="[vector, 2] in each panel")
        object.__setattr__(self, "panels", panels)
        object.__setattr__(self, "names", labels(self.names, len(panels), "panel"))
        for key in ("groups", "labels"):
            given = getattr(self, key)
            if given is None:
                continue
            if len(given) != len(panels):
                raise InputError(f"There must be {key} for each panel", got=len(given), expected=len(panels))
            checked = tuple(labels(one, len(panel), "vector") for one, panel in zip(given, panels, strict=True))
            object.__setattr__(self, key, checked)
        longest = max(abs(c) for panel in panels for vector in panel for c in vector)
        if self.limit is not None and not self.limit > 0:
            raise InputError("The limit of a plane must be positive", got=self.limit)
        object.__setattr__(self, "limit", float(self.limit or 1.1 * longest or 1.0))

    @property
    def inches(self) -> tuple[float, float]:
        n = len(self.names)
        columns = min(n, self.per_row)
        legend = 0.3 if self.groups else 0.0
        title = 0.4 if self.title else 0.1
        return columns * _SIDE, math.ceil(n / columns) * (_SIDE + 0.15) + legend + title

    def draw(self, sheet: Sheet) -> None:
        columns = min(len(self.names), self.per_row)
        grid = sheet.axes(math.ceil(len(self.names) / columns), columns)
        for axes in grid[len(self.names) :]:
            axes.set_visible(False)
        for k, axes in enumerate(grid[: len(self.names)]):
            axes.set_aspect("equal")
            axes.set_title(self.names[k], fontsize=9, color=sheet.colours.text)
            axes.set(xlim=(-self._limit, self._limit), ylim=(-self._limit, self._limit), xticks=[], yticks=[])
            axes.axhline(0, color=sheet.colours.grid, lw=0.8, zorder=0)
            axes.axvline(0, color=sheet.colours.grid, lw=0.8, zorder=0)
            self._arrows(sheet, axes, k)
        if len(self._classes) > 1:
            marks = [grid[0].plot([], [], ms=4, **_style(sheet, i))[0] for i in range(len(self._classes))]
            sheet.paper.legend(
                marks,
                self._classes,
                loc="outside lower center",
                ncols=len(marks),
                frameon=False,
                fontsize=8,
                labelcolor=sheet.colours.text,
            )

    def _arrows(self, sheet: Sheet, axes: "Axes", k: int) -> None:
        """One panel's vectors: a line from the origin and a mark at the end, one path for each class."""
        vectors = np.asarray(self.panels[k])
        for i, name in enumerate(self._classes):
            here = vectors[[not self.groups or self.groups[k][j] == name for j in range(len(vectors))]]
            way = np.stack([np.zeros_like(here), here, np.full_like(here, np.nan)], axis=1).reshape(-1, 2)
            axes.plot(way[:, 0], way[:, 1], lw=1.3, ms=3.5, markevery=(1, 3), **_style(sheet, i))

    @property
    def _classes(self) -> list[str]:
        return distinct([name for panel in self.groups or [[""]] for name in panel])

    @property
    def _limit(self) -> float:
        assert self.limit is not None
        return self.limit


def _style(sheet: Sheet, i: int) -> dict[str, Any]:
    """The colour, dash and mark of class i."""
    colours = sheet.colours.series
    return {"color": colours[i % len(colours)], "ls": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
