"""What all figures share: a title, a caption, plain numbers inside, and one `save(path)`.

A figure is a frozen value. It is written by suffix: `.png` and `.svg` (matplotlib, the extra `plots`), `.html` (one
page that needs no network, in light and dark, with the values under the pointer) and `.json` (its numbers).
"""

import json
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

from microtome.common.artifacts import atomic_file
from microtome.common.config import JsonObject, to_dict
from microtome.common.errors import ConfigError
from microtome.views import page
from microtome.views.canvas import Picture, Sheet, Theme, printed, require_matplotlib
from microtome.views.numbers import jsonable


def check_path(path: str | Path) -> Path:
    """Where a figure is to be saved. For what takes long, before it begins: raises ConfigError for another suffix than those
    above, MissingDependencyError where matplotlib is needed and not installed."""
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".html", ".json"):
        raise ConfigError(
            f"A figure cannot be saved as {path.name}", expected="a name that ends in .png, .svg, .html or .json"
        )
    if path.suffix in (".png", ".svg"):
        require_matplotlib()
    return path


@dataclass(frozen=True)
class Figure(ABC):
    """A chart as a value. `kind` names the chart in JSON and to the page's script."""

    kind: ClassVar[str]
    _: KW_ONLY
    title: str = ""
    caption: str = ""

    @abstractmethod
    def draw(self, sheet: Sheet) -> None:
        """Draw on matplotlib's paper."""

    @property
    @abstractmethod
    def inches(self) -> tuple[float, float]:
        """Width and height that suit the contents."""

    def data(self) -> JsonObject:
        """Everything that the figure shows as JSON; a missing value (NaN) is null."""
        return {"kind": self.kind, **jsonable(to_dict(self))}

    def svg(self, theme: Theme = "light") -> str:
        """The picture as SVG. Raises MissingDependencyError without matplotlib."""
        return self._picture(".svg", theme).decode()

    def html(self) -> str:
        """A page of its own: hover shows values, light and dark follow the reader's setting."""
        return page.document(self.title or self.kind, page.chart(self.data()))

    def save(self, path: str | Path, *, theme: Theme = "light") -> Path:
        """Write `.png`, `.svg`, `.html` or `.json`; `theme` is for the first two. Returns the path.

        Raises ConfigError for another suffix, MissingDependencyError where matplotlib is needed and not installed.
        """
        path = check_path(path)
        content = self._bytes(path.suffix, theme)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write_bytes(content)
        return path

    def _bytes(self, suffix: str, theme: Theme) -> bytes:
        if suffix == ".json":
            return (json.dumps(self.data(), ensure_ascii=False, allow_nan=False) + "\n").encode()
        if suffix == ".html":
            return self.html().encode()
        return self._picture(".png" if suffix == ".png" else ".svg", theme)

    def _picture(self, suffix: Picture, theme: Theme) -> bytes:
        return printed(self.draw, title=self.title, size=self.inches, theme=theme, suffix=suffix)
