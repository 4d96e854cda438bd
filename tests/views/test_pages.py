"""HTML pages in a real Chromium: drawn without complaint, right under the pointer, in both themes, and fetching nothing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from playwright.sync_api import Browser, Page

from microtome.views import Claim, Heatmap, Report, Section, Table, at_least, equal

from ..web.browser import chromium  # noqa: TID252 – tests share their browser
from .figures import TOKENS, examples

pytestmark = pytest.mark.browser
EXAMPLES = examples()
Theme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@dataclass
class Opened:
    """A page from a file, and all that it complained of or asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def opened(browser: Browser, html: str, folder: Path, *, theme: Theme = "light", width: int = 900) -> Opened:
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 800}, offline=True)
    seen = Opened(context.new_page())
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on("request", lambda asked: seen.asked.append(asked.url))
    seen.page.goto(file.as_uri())
    assert seen.asked == [file.as_uri()]  # later ones the page's own policy forbids, which the console would tell
    return seen


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_kind_is_drawn_without_complaint(name: str, theme: Theme, browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES[name].html(), tmp_path, theme=theme)
    marks = {
        "heatmap": "rect.pos",
        "diverging": "rect.neg",
        "patterns": "rect.pos",
        "lines": "path[stroke]",
        "bordered": "path.border",
    }
    # Every number of the drawing is a number: one NaN in a coordinate and the browser says so, or draws nothing.
    assert "NaN" not in seen.page.locator("figure").inner_html()
    assert seen.page.locator(marks.get(name, "[fill^='var(--s']")).count() > 0
    surface = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert surface == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    assert seen.complaints == []


def test_cells_are_as_strong_as_their_values(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES["diverging"].html(), tmp_path)
    cells = seen.page.evaluate(
        "[...document.querySelectorAll('figure svg > rect.pos, figure svg > rect.neg')].filter(r => r.getAttribute('width') > 15)"
        ".map(r => [r.className.baseVal, Number(r.getAttribute('fill-opacity'))])"
    )
    # -1, 3, 0 and 1.5 on a scale to ±3; a zero is the paper itself.
    assert cells == [["neg", pytest.approx(1 / 3, abs=1e-3)], ["pos", 1], ["pos", 0.5]]


def test_the_pointer_shows_the_value_of_a_cell(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES["heatmap"].html(), tmp_path)
    box = seen.page.locator("figure svg .frame").first.bounding_box()
    tip = seen.page.locator(".tip")
    assert box is not None
    seen.page.mouse.move(box["x"] + box["width"] * 3.5 / 4, box["y"] + box["height"] * 0.25)
    assert tip.inner_text() == "layer 0, token </script><b>\nscore 2"
    seen.page.mouse.move(box["x"] + box["width"] * 1.5 / 4, box["y"] + box["height"] * 0.75)
    assert tip.inner_text() == "layer 1, token Mary\nscore no value"
    assert tip.is_visible()
    seen.page.mouse.move(2, 2)
    assert not tip.is_visible()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lines", {"loss\nstep 1\nnats 2 [1.5, 2.5]", "control\nstep 2\nnats 3"}),
        ("bars", {"6.9 (a)\n−1 [−1.5, −0.5]", "all (b)\n2 [1, 3]"}),
        ("horizontal", {"one long label\nshare 0.75", "another\nshare 0.25"}),
        ("scatter", {"7.2 (a)\nx 2\ny 1.5", "6.9 (b)\nx 1\ny 1"}),
        ("patterns", {"5.1: from 3 </script><b> to 2 and\nattention 0.3"}),
    ],
)
def test_the_pointer_finds_every_value(name: str, wanted: set[str], browser: Browser, tmp_path: Path) -> None:
    """The pointer walks over the whole drawing; what it was told must hold the values that are in it."""
    seen = opened(browser, EXAMPLES[name].html(), tmp_path)
    told = seen.page.evaluate(
        """() => {
          const svg = document.querySelector('figure svg'), box = svg.getBoundingClientRect(), told = new Set();
          for (let x = box.left; x < box.right; x += 6) for (let y = box.top; y < box.bottom; y += 6) {
            svg.dispatchEvent(new PointerEvent('pointermove', { clientX: x, clientY: y }));
            told.add(document.querySelector('.tip').textContent);
          }
          return [...told];
        }"""
    )
    assert wanted <= {" ".join(re.split(" +", text)).replace("\n ", "\n") for text in told}
    assert seen.complaints == []


def test_a_line_joins_the_points_of_a_group(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES["scatter"].html(), tmp_path)
    joined = seen.page.evaluate("[...document.querySelectorAll('path[stroke-opacity]')].map(p => p.getTotalLength())")
    # Group a has the points (0, 0.5) and (2, 1.5); b has one point, which nothing joins.
    assert len(joined) == 1
    assert joined[0] > 100


def test_numbers_can_be_read_as_a_table(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES["heatmap"].html(), tmp_path)
    seen.page.get_by_text("Numbers").click()
    rows = seen.page.locator("details table tr").all()
    assert [[cell.inner_text() for cell in row.locator("td, th").all()] for row in rows] == [
        ["", *(token.strip() for token in TOKENS)],
        ["0", "0", "0.5", "1.25", "2"],
        ["1", "1", "no value", "0.25", "0.125"],
    ]


def test_a_tall_heatmap_has_a_label_for_each_layer_and_token(browser: Browser, tmp_path: Path) -> None:
    tokens = [f"token{i:02d}" for i in range(15)]
    seen = opened(browser, Heatmap(torch.rand(30, 15), columns=tokens, row_label="layer").html(), tmp_path)
    ticks = seen.page.locator("text.tick").all_text_contents()
    assert set(tokens) <= set(ticks)
    assert {str(i) for i in range(30)} <= set(ticks)
    overlaps = seen.page.evaluate(
        """() => {
          const boxes = [...document.querySelectorAll('text.tick')].map(t => t.getBoundingClientRect());
          const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
          return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length;
        }"""
    )
    assert overlaps == 0


def test_a_report_is_shown_as_text_and_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    report = Report(
        title=f"Report {hostile}",
        summary=f"One.\n\nTwo {hostile}",
        source=hostile,
        claims=[
            Claim("good", f"It holds {hostile}", at_least(1), 2, interval=(1.5, 2.5), note=hostile),
            Claim("bad", "It does not", equal("5.1"), "6.9"),
            Claim("apart", "Elsewhere", at_least(1), not_applicable="needs gpt2's weights"),
        ],
        sections=[
            Section(hostile, [hostile, Table([hostile], [[hostile], [0.25]], caption=hostile), *EXAMPLES.values()])
        ],
        provenance={"model": {"name": hostile}, "seed": 0},
    )
    seen = opened(browser, report.html(), tmp_path, width=390)
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("h1").inner_text() == f"Report {hostile}"
    assert seen.page.locator(".tally").inner_text() == "1 of 2 claims passed; 1 not applicable."
    assert seen.page.locator("tr#good td").all_inner_texts()[2:4] == ["≥ 1", "2 [1.5, 2.5]"]
    assert seen.page.locator("tr#bad .verdict").inner_text() == "✗ FAILED"
    assert seen.page.locator("tr#apart td").all_inner_texts()[3] == "needs gpt2's weights"
    # Two heads have a drawing each; two planes and their legend; a border has an inner one that cuts it off.
    assert seen.page.locator("figure svg").count() == len(EXAMPLES) + 1 + 2 + 1
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert seen.complaints == []


def test_the_pointer_shows_a_direction(browser: Browser, tmp_path: Path) -> None:
    seen = opened(browser, EXAMPLES["directions"].html(), tmp_path)
    box = seen.page.locator("figure svg .frame").first.bounding_box()
    tip = seen.page.locator(".tip")
    assert box is not None
    # x0 = (1, 0) of a plane that reaches to 1.1.
    seen.page.mouse.move(box["x"] + box["width"] * (0.5 + 0.5 / 1.1), box["y"] + box["height"] * 0.5)
    assert tip.inner_text() == "x0 (own)\n1, 0\nlength 1"
