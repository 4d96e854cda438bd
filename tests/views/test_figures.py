"""Figures as values: what they hold, what they refuse, and what is in the files that they write."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microtome.common.errors import ConfigError, InputError, MicrotomeError, MissingDependencyError
from microtome.views import Bars, Directions, Figure, Heatmap, Lines, Patterns, Scatter, Series
from microtome.views.canvas import COLOURS, Theme

from .figures import TOKENS, examples

EXAMPLES = examples()
SVG = "{http://www.w3.org/2000/svg}"


def png_size(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def pixels(file: Path) -> Any:
    """The colours of a PNG, [row, column, rgb] from 0 to 1."""
    from matplotlib.image import imread

    return imread(file)[..., :3]


def colour(text: str) -> np.ndarray[Any, Any]:
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])


# ---- values -------------------------------------------------------------------------------------------------------------


def test_tensors_arrays_and_lists_give_the_same_value() -> None:
    rows = [[0.5, -1.0], [2.0, 0.25]]
    figures = [
        Heatmap(values)
        for values in (
            rows,
            np.array(rows),
            torch.tensor(rows, dtype=torch.bfloat16, requires_grad=True),
            [torch.tensor(row) for row in rows],
        )
    ]
    assert all(figure == figures[0] for figure in figures)
    assert len(set(figures)) == 1
    assert figures[0].data()["values"] == rows


@pytest.mark.parametrize(
    ("values", "diverging", "expected"),
    [
        ([[1.0, 4.0]], False, (0.0, 4.0)),
        ([[-2.0, 1.0]], False, (-2.0, 1.0)),
        ([[-2.0, 1.0]], True, (-2.0, 2.0)),
        ([[0.5, 3.0]], True, (-3.0, 3.0)),
        ([[0.0, 0.0]], False, (0.0, 1.0)),
        ([[math.nan, 2.0]], False, (0.0, 2.0)),
        ([[math.nan, math.nan]], True, (0.0, 1.0)),
    ],
)
def test_a_scale_reaches_from_zero_and_is_even_when_it_diverges(
    values: list[list[float]], diverging: bool, expected: tuple[float, float]
) -> None:
    assert Heatmap(values, diverging=diverging).limits == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Heatmap([1.0, 2.0]), r"must be numbers \[row, column\].*shape \[2\]"),
        (lambda: Heatmap([[1.0, 2.0], [3.0]]), "must be numbers"),
        (lambda: Heatmap([["a"]]), "must be numbers"),
        (lambda: Heatmap(torch.zeros(0, 3)), r"shape \[0\]"),
        (lambda: Heatmap([[math.inf]]), "infinities"),
        (lambda: Heatmap([[1.0]], rows=["a", "b"]), "2 labels"),
        (lambda: Heatmap([[1.0]], marks=[(0, 1)]), "mark lies outside"),
        (lambda: Heatmap([[1.0]], limits=(1, 1)), "must go up"),
        (lambda: Heatmap([[1.0]], limits=(0, 1), diverging=True), "0 in the middle"),
        (lambda: Patterns(torch.zeros(2, 3, 4), names=["a", "b"]), "square"),
        (lambda: Patterns(torch.zeros(2, 3, 3), names=["a"]), "label for each head"),
        (lambda: Series("a", [1, 2], x=[1]), "differ in length"),
        (lambda: Series("a", [1, 2], low=[0, 0]), "two ends"),
        (lambda: Series("a", [1, 2], low=[0, 3], high=[1, 2]), "upside down"),
        (lambda: Series("a", [1, 2], low=[0], high=[1]), "interval for each value"),
        (lambda: Lines([]), "no series"),
        (lambda: Lines([Series("a", [1, 0])], y_scale="log"), "logarithmic y"),
        (lambda: Lines([Series("a", [1, 2])], x_scale="log"), "logarithmic x"),
        (lambda: Bars(["a"], [1, 2]), "label for each bar"),
        (lambda: Bars(["a"], [1], low=[0]), "two ends"),
        (lambda: Scatter([1], [1, 2]), "differ in length"),
        (lambda: Scatter([1], [1], named=[0]), "has a label"),
        (lambda: Scatter([1], [1], labels=["a"], named=[1]), "has a label"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_another_suffix_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.html or \.json"):
        EXAMPLES["heatmap"].save(tmp_path / "new" / "a.pdf")
    assert list(tmp_path.iterdir()) == []


# ---- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_json_holds_the_numbers(name: str, tmp_path: Path) -> None:
    file = EXAMPLES[name].save(tmp_path / "new" / "a.json")
    assert json.loads(file.read_text(encoding="utf-8")) == EXAMPLES[name].data()


def test_json_of_a_missing_value_is_null() -> None:
    assert EXAMPLES["heatmap"].data()["values"][1] == [1.0, None, 0.25, 0.125]


@pytest.mark.parametrize("name", EXAMPLES)
def test_svg_is_well_formed_and_says_the_words(name: str) -> None:
    figure = EXAMPLES[name]
    root = ET.fromstring(figure.svg())
    said = " ".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))
    words = {
        "heatmap": ["layer", "token", "score", "<i>Heads</i> & tokens", "</script><b>"],
        "diverging": ["change"],
        "patterns": ["5.1", "6.9", "attention", "Mary"],
        "lines": ["step", "nats", "loss", "control", "induction"],
        "bordered": [],
        "directions": ["p = 1", "</script><b>", "own", "pair", "Features in the plane"],
        "bars": ["5.1", "all", "a", "b"],
        "horizontal": ["one long label", "share"],
        "scatter": ["7.2"],
    }
    for word in words[name]:
        assert word in said, f"{word!r} is not in {said!r}"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_same_figure_gives_the_same_svg(theme: Theme) -> None:
    figure = EXAMPLES["heatmap"]
    assert figure.svg(theme) == examples()["heatmap"].svg(theme)
    assert COLOURS[theme].surface in figure.svg(theme)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_png_has_the_theme_and_the_size_of_its_contents(name: str, theme: Theme, tmp_path: Path) -> None:
    file = EXAMPLES[name].save(tmp_path / "a.png", theme=theme)
    width, height = png_size(file)
    inches = EXAMPLES[name].inches
    assert 0.6 * inches[0] * 144 < width < 1.5 * inches[0] * 144
    assert 0.6 * inches[1] * 144 < height < 1.5 * inches[1] * 144
    assert np.allclose(pixels(file)[0, 0], colour(COLOURS[theme].surface), atol=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_cells_have_the_colours_of_their_values(theme: Theme, tmp_path: Path) -> None:
    """The ends of a diverging scale are the theme's two colours; zero is the paper."""
    file = Heatmap([[-2.0, 0.0, 2.0]], diverging=True).save(tmp_path / "a.png", theme=theme)
    c, image = COLOURS[theme], pixels(file)
    negative, positive = (np.isclose(image, colour(text), atol=0.02).all(-1) for text in (c.negative, c.positive))
    # A third of the image's width each, left and right (the colour bar is thin beside them).
    assert negative.sum() > 2000
    assert positive.sum() > 2000
    assert np.median(negative.nonzero()[1]) < np.median(positive.nonzero()[1])


def test_a_tall_heatmap_names_each_row(tmp_path: Path) -> None:
    """30 layers × 15 tokens: every label is there, and the cells are high enough for it."""
    tokens = [f"t{i:02d}" for i in range(15)]
    figure = Heatmap(torch.rand(30, 15), columns=tokens, row_label="layer")
    said = [("".join(node.itertext())).strip() for node in ET.fromstring(figure.svg()).iter(f"{SVG}text")]
    assert set(tokens) <= set(said)
    assert {str(i) for i in range(30)} <= set(said)
    assert figure.inches[1] * 72 / 30 > 8  # points for a row, with 8-point labels


def test_pictures_leave_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    EXAMPLES["lines"].svg("dark")
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in subprocess.run(
        [sys.executable, "-c", "import sys\nfrom microtome.views import Heatmap\nHeatmap([[1.0]]).svg()\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()  # fmt: skip


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an absent package looks like to `import`
    figure: Figure = EXAMPLES["bars"]
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'microtome[plots]'")):
        figure.save(tmp_path / "a.png")
    assert figure.save(tmp_path / "a.html").stat().st_size > 0
    assert json.loads(figure.save(tmp_path / "a.json").read_text())["kind"] == "bars"
    assert not (tmp_path / "a.png").exists()


def test_html_cannot_be_broken_out_of() -> None:
    html = EXAMPLES["heatmap"].html()
    assert "</script><b>" not in html
    assert "<i>Heads</i>" not in html
    [inside] = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert json.loads(inside) == EXAMPLES["heatmap"].data()
    assert json.loads(inside)["columns"] == TOKENS


def test_html_holds_numbers_at_six_digits() -> None:
    html = Heatmap([[1 / 3, 1e-9 / 3, 123456.789]]).html()
    [inside] = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert json.loads(inside)["values"] == [[0.333333, 3.33333e-10, 123457.0]]


def test_html_is_small_and_fetches_nothing() -> None:
    html = Heatmap([[1.0]]).html()
    assert len(html.encode()) < 30_000
    assert "default-src 'none'" in html
    addresses = set(re.findall(r"https?://[^\s\"']+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, not an address


def test_the_page_and_the_pictures_share_their_colours() -> None:
    css = (Path(sys.modules["microtome.views.page"].__file__ or "").with_name("page.css")).read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    for theme, text in (("light", light), ("dark", dark.split("@media print")[0])):
        c = COLOURS[theme]  # type: ignore[index]
        for name in ("surface", "text", "faint", "grid", "positive", "negative"):
            assert f"--{name}: {getattr(c, name)};" in text
        for i, one in enumerate(c.series):
            assert f"--s{i}: {one};" in text


def luminance(text: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour(text)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_stand_out(theme: Theme) -> None:
    """Contrast with the paper: 4.5 for text, 3 for what is drawn (WCAG 2.2, 1.4.3 and 1.4.11)."""
    c = COLOURS[theme]

    def contrast(text: str) -> float:
        low, high = sorted([luminance(text), luminance(c.surface)])
        return (high + 0.05) / (low + 0.05)

    assert min(map(contrast, (c.text, c.faint))) >= 4.5
    assert min(map(contrast, (c.positive, c.negative, *c.series))) >= 3


def test_all_errors_are_of_the_house() -> None:
    with pytest.raises(MicrotomeError):
        Heatmap("ab")


# ---- directions and borders ---------------------------------------------------------------------------------------------


def test_directions_reach_beyond_the_longest_and_panels_may_differ_in_number() -> None:
    figure = Directions([torch.tensor([[3.0, -4.0]]), [[1, 0], [0, 1]]], names=["a", "b"])
    assert figure.limit == pytest.approx(4.4)
    assert figure.data()["panels"] == [[[3.0, -4.0]], [[1.0, 0.0], [0.0, 1.0]]]
    assert Directions([[[0, 0]]], names=["a"]).limit == 1.0
    assert Directions([[[1, 0]]], names=["a"], limit=2).limit == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"panels": [], "names": []}, "two coordinates"),
        ({"panels": [[[1.0, 2.0, 3.0]]], "names": ["a"]}, "two coordinates"),
        ({"panels": [[[1.0, 2.0]]], "names": ["a", "b"]}, "label for each panel"),
        ({"panels": [[[1.0, 2.0]]], "names": ["a"], "groups": [["x", "y"]]}, "label for each vector"),
        ({"panels": [[[1.0, 2.0]]], "names": ["a"], "labels": []}, "labels for each panel"),
        ({"panels": [[[1.0, 2.0]]], "names": ["a"], "limit": -1.0}, "limit"),
    ],
    ids=["none", "three axes", "names", "groups", "labels", "limit"],
)
def test_directions_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Directions(**settings)


def test_arrows_end_where_the_vectors_say(tmp_path: Path) -> None:
    file = Directions([[[0.5, 0.5]]], names=["a"], limit=1.0).save(tmp_path / "a.png")
    drawn = np.argwhere(np.abs(pixels(file) - colour(COLOURS["light"].series[0])).max(-1) < 0.05)
    height, width = pixels(file).shape[:2]
    assert len(drawn) > 50
    # The arrow lies in the upper right quarter of the square, which is nearly the whole picture.
    assert drawn[:, 0].max() < 0.62 * height
    assert drawn[:, 1].min() > 0.45 * width
    assert drawn[:, 0].max() - drawn[:, 0].min() == pytest.approx(drawn[:, 1].max() - drawn[:, 1].min(), abs=8)


def test_a_border_is_drawn_over_the_cells_without_moving_them(tmp_path: Path) -> None:
    cells = [[0.0, 0.0], [0.0, 0.0]]
    plain = pixels(Heatmap(cells).save(tmp_path / "a.png"))
    lined = pixels(Heatmap(cells, border=[(0.0, -0.5), (0.0, 7.0)]).save(tmp_path / "b.png"))
    assert plain.shape == lined.shape
    rows = np.unique(np.argwhere(np.abs(plain - lined).max(-1) > 0.2)[:, 0])
    assert 1 <= len(rows) <= 6
