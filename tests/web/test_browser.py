"""The workbench in a real Chromium against a running server: every page, the keyboard, the address, both themes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from microtome.features.config import PointLatents

from ..features.tiny import D_SAE as TINY_D_SAE  # noqa: TID252 – tests share their tiny index
from ..features.tiny import DEAD as TINY_DEAD  # noqa: TID252
from ..features.tiny import make_tiny_index  # noqa: TID252
from .browser import Record, chromium, workbench
from .live import D_SAE, HOSTILE, HOSTILE_DOCUMENT

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def live(live_path: Path) -> Iterator[str]:
    with workbench(live_path, model=True) as address:
        yield address


@pytest.fixture(scope="module")
def hostile(hostile_path: Path) -> Iterator[str]:
    with workbench(hostile_path, model=False) as address:
        yield address


@pytest.fixture
def record(live: str) -> Record:
    return Record(live)


@pytest.fixture
def page(browser: Browser, record: Record) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(20_000)
    record.watch(page)
    yield page
    context.close()
    record.check()


def address(page: Page) -> str:
    return re.sub(r"^https?://[^/]+", "", page.url)


def test_overview(page: Page, live: str) -> None:
    page.goto(live)
    expect(page.get_by_role("heading", level=1)).to_contain_text(f"{D_SAE:,} features of")
    expect(page).to_have_title("Overview – Microtome")
    expect(page.get_by_text("FVU", exact=True)).to_be_visible()
    expect(page.get_by_text("share of the activations’ variance")).to_be_visible()
    expect(page.get_by_role("heading", name="How it was made")).to_be_visible()
    bars = page.locator("svg .hit")
    assert bars.count() > 3
    bars.nth(1).hover()
    expect(page.get_by_role("tooltip")).to_contain_text("fire on")
    page.locator("svg .hit[tabindex='0']").focus()
    before = page.get_by_role("tooltip").text_content()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tooltip")).not_to_have_text(before or "")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tooltip")).to_have_text(before or "")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/features\?min_density=.*&max_density="))
    expect(page.get_by_role("row").nth(1)).to_be_visible()


def test_a_random_feature(page: Page, live: str) -> None:
    page.goto(live)
    page.get_by_role("button", name="A random feature").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"^Feature \d+$"))


def test_the_list_draws_only_what_is_in_sight(page: Page, live: str) -> None:
    page.goto(f"{live}/features?alive=all&sort=feature&order=up")
    rows = page.locator("[data-row]")
    expect(rows.first).to_contain_text("0")
    expect(page.get_by_role("table")).to_have_attribute("aria-rowcount", str(D_SAE))
    assert rows.count() < 60
    port = page.locator(".port")
    port.evaluate("port => { port.scrollTop = 2000 * 40 }")
    expect(page.locator("[data-row='2000'] a")).to_have_text("2000")
    assert rows.count() < 60
    expect(page).to_have_url(re.compile(r"row=2000$"))
    port.evaluate("port => { port.scrollTop = port.scrollHeight }")
    expect(page.locator(f"[data-row='{D_SAE - 1}'] a")).to_have_text(str(D_SAE - 1))


def test_back_and_forward_restore_the_list(page: Page, live: str) -> None:
    page.goto(f"{live}/features?alive=all&sort=feature&order=up")
    page.locator(".port").evaluate("port => { port.scrollTop = 700 * 40 }")
    expect(page).to_have_url(re.compile(r"row=700$"))
    page.locator("[data-row='703'] a").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 703")
    page.get_by_role("button", name="line breaks").click()
    expect(page).to_have_url(re.compile(r"/features/703\?breaks=1$"))
    page.go_back()
    expect(page.locator("[data-row='703'] a")).to_be_in_viewport()
    assert page.locator(".port").evaluate("port => port.scrollTop") == 700 * 40
    page.go_forward()
    expect(page.get_by_role("button", name="line breaks")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.get_by_role("button", name="line breaks")).to_have_attribute("aria-pressed", "true")


def test_sort_and_filters_are_in_the_address(page: Page, live: str) -> None:
    page.goto(f"{live}/features")
    page.get_by_role("button", name="Max").click()
    expect(page).to_have_url(re.compile(r"sort=max$"))
    expect(page.get_by_role("columnheader", name="Max")).to_have_attribute("aria-sort", "descending")
    page.get_by_role("button", name="Max").click()
    expect(page).to_have_url(re.compile(r"sort=max&order=up$"))
    page.get_by_label("Lowest density in percent").fill("1")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"min_density=0.01"))
    fewer = page.get_by_role("status").first.text_content() or ""
    assert "of 3,000" in fewer
    page.get_by_label("Which features").select_option("dead")
    expect(page.get_by_text("No feature fits.")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page).to_have_url(re.compile(r"/features\?sort=max&order=up$"))
    page.go_back()
    expect(page.get_by_label("Which features")).to_have_value("dead")
    expect(page.get_by_label("Lowest density in percent")).to_have_value("1")


def test_features_of_several_layers(browser: Browser, tmp_path: Path) -> None:
    """Of a cross-layer transcoder: each feature says its layer, and the list is filtered by it."""
    layers = tuple(
        PointLatents(name=f"blocks.{i}.hook_resid_mid", layer=i, n_latents=n) for i, n in ((3, 8), (5, TINY_D_SAE - 8))
    )
    with workbench(make_tiny_index(tmp_path / "index", layers=layers), model=False) as base:
        record, page = Record(base), browser.new_page()
        page.set_default_timeout(20_000)
        record.watch(page)
        page.goto(f"{base}/features?sort=feature&order=up&alive=all")
        expect(page.locator("[data-row='0']")).to_contain_text("layer 3")
        expect(page.locator("[data-row='9']")).to_contain_text("layer 5")
        page.get_by_label("Which layer").select_option("layer 3")
        expect(page).to_have_url(re.compile(r"layer=3"))
        expect(page.get_by_role("table")).to_have_attribute("aria-rowcount", "8")
        page.locator("[data-row='4'] a").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Feature 4 reads layer 3")
        page.go_back()
        expect(page.get_by_label("Which layer")).to_have_value("3")
        page.get_by_role("button", name="Clear").click()
        expect(page.get_by_role("table")).to_have_attribute("aria-rowcount", str(TINY_D_SAE - len(TINY_DEAD)))
        record.check()
        page.close()


def test_search_by_token(page: Page, live: str) -> None:
    page.goto(live)
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox", name="Search features by token")).to_be_focused()
    page.keyboard.type("court")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/features\?token=court$"))
    expect(page.locator("[data-row='0']")).to_be_visible()
    page.locator("[data-row='0'] a").click()
    expect(page.locator(".strip .peak", has_text="court").first).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("17")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 17")
    page.goto(f"{live}/features?token=zzzzqq")
    expect(page.get_by_text("None has “zzzzqq”")).to_be_visible()


def test_the_keyboard_alone(page: Page, live: str) -> None:
    page.goto(f"{live}/features")
    expect(page.locator("[data-row='0'] a")).to_be_visible()
    for _ in range(3):
        page.keyboard.press("j")
    expect(page.locator("[data-row='2'] a")).to_be_focused()
    page.keyboard.press("k")
    expect(page.locator("[data-row='1'] a")).to_be_focused()
    number = int(page.locator("[data-row='1'] a").text_content() or "")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {number}")
    page.keyboard.press("j")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {number + 1}")
    page.keyboard.press("k")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {number}")
    expect(page.get_by_role("tab").first).to_be_visible()  # the heading is there before the feature's data
    page.keyboard.press("]")
    expect(page).to_have_url(re.compile(r"band=\d"))
    page.keyboard.press("[")
    expect(page).not_to_have_url(re.compile("band="))
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("x")
    expect(page.get_by_role("heading", level=1)).to_have_text("Try a text")


def test_a_feature_and_its_tokens(page: Page, live: str) -> None:
    page.goto(f"{live}/features?sort=count")
    page.locator("[data-row='0'] a").click()
    strip = page.get_by_role("listbox").first
    peak = strip.locator(".peak")
    expect(peak).to_have_attribute("tabindex", "0")
    assert strip.locator("[tabindex='0']").count() == 1
    peak.focus()
    expect(page.get_by_role("tooltip")).to_contain_text("activation")
    expect(peak).to_have_attribute("aria-label", re.compile("activation"))
    place = int(peak.get_attribute("data-i") or "")
    page.keyboard.press("ArrowLeft")
    expect(strip.locator(f"[data-i='{place - 1}']")).to_be_focused()
    expect(page.get_by_role("tooltip")).to_contain_text("token")
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip")).to_have_count(0)
    # Strength is told by the underline as well as by the shade.
    shadow = peak.evaluate("token => getComputedStyle(token).boxShadow")
    assert "-3px" in shadow
    assert peak.evaluate("token => getComputedStyle(token).backgroundColor") != "rgba(0, 0, 0, 0)"
    for heading in ("Activations", "Direct effect on the next token", "Nearest features", "Weights"):
        expect(page.get_by_role("heading", name=heading)).to_be_visible()
    assert page.get_by_role("list", name="Promoted tokens").get_by_role("listitem").count() == 10


def test_strata_are_labelled_honestly(page: Page, live: str) -> None:
    rows = page.request.get(f"{live}/api/features?sort=n_sequences&limit=50").json()["rows"]
    features = [page.request.get(f"{live}/api/features/{row['feature']}").json() for row in rows]
    feature, band = next((f, b) for f in features for b in f["bands"][2:] if 0 < b["sampled"] < b["of"])
    page.goto(f"{live}/features/{feature['row']['feature']}")
    of = feature["row"]["n_sequences"]
    expect(page.get_by_text(f"The 5 strongest of {of} sequences in which it fires.")).to_be_visible()
    tabs = page.get_by_role("tab")
    assert tabs.count() == len(feature["bands"]) == 4
    place = feature["bands"].index(band)
    tabs.nth(place).click()
    expect(page).to_have_url(re.compile(rf"band={band['band']}$"))
    said = f"Sampled {band['sampled']} of {band['of']} sequences in which it peaks"
    expect(page.get_by_text(said)).to_be_visible()
    expect(page.get_by_role("listbox")).to_have_count(band["sampled"])
    tabs.nth(place).press("ArrowLeft")
    expect(tabs.nth(place - 1)).to_be_focused()
    expect(page).to_have_url(re.compile(rf"band={band['band'] + 1}$"))
    page.get_by_role("button", name="own scale").click()
    expect(page).to_have_url(re.compile(r"&scale=example$"))
    expect(page.get_by_text("each example’s own peak")).to_be_visible()


def test_neighbours_lead_on(page: Page, live: str) -> None:
    page.goto(f"{live}/features/5")
    link = page.get_by_role("region", name="Nearest features").get_by_role("link").first
    other = link.text_content()
    link.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {other}")
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 5")


def test_the_link_is_copied(page: Page, live: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{live}/features/5?breaks=1")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == f"{live}/features/5?breaks=1"


def test_a_text_is_tried(page: Page, live: str) -> None:
    page.goto(f"{live}/text")
    page.get_by_label("Text to try").fill("The court held 🙂\n<b>sugar</b>")
    page.keyboard.press("Control+Enter")
    strip = page.get_by_role("listbox", name="The text’s tokens")
    expect(strip).to_be_visible()
    expect(strip).to_contain_text("🙂")
    expect(page.get_by_role("heading", name="Features in the text")).to_be_visible()
    values = [float(v) for v in page.locator("li .value").all_text_contents()]
    assert values == sorted(values, reverse=True)
    assert len(values) > 5
    strip.get_by_role("option").nth(2).click()
    expect(page).to_have_url(re.compile(r"token=2$"))
    expect(page.get_by_role("heading", name="On ␣court")).to_be_visible()
    assert page.locator("li .value").count() == 8
    first = page.locator("ol li").first
    first.get_by_role("button").click()
    expect(page).to_have_url(re.compile(r"token=2&feature=\d+$"))
    number = first.get_by_role("link").text_content()
    there = address(page)
    first.get_by_role("link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {number}")
    page.go_back()
    assert address(page) == there
    expect(page.get_by_role("heading", name="On ␣court")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="On ␣court")).to_be_visible()
    expect(page.get_by_label("Text to try")).to_have_value("The court held 🙂\n<b>sugar</b>")


def test_features_of_a_text_by_share_of_their_maximum(page: Page, live: str) -> None:
    page.goto(f"{live}/text?q=The+court+held+that")
    page.get_by_role("button", name="by share of max").click()
    expect(page).to_have_url(re.compile(r"order=share$"))
    expect(page.locator("li .value").first).to_contain_text("%")
    shares = [int(v.strip().removesuffix("%")) for v in page.locator("li .value").all_text_contents()]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) > 5


def test_a_text_with_too_many_tokens_is_explained(page: Page, live: str, record: Record) -> None:
    record.expected = {400}
    page.goto(f"{live}/text")
    page.get_by_label("Text to try").fill("🜚" * 300)
    page.get_by_role("button", name="Look", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("at most 512")


def test_without_a_model_the_box_says_why(browser: Browser, hostile: str) -> None:
    record = Record(hostile)
    page = browser.new_page()
    record.watch(page)
    page.goto(f"{hostile}/text")
    expect(page.get_by_text("started without a model")).to_be_visible()
    expect(page.get_by_label("Text to try")).to_be_disabled()
    page.close()
    record.check()


def test_a_hostile_token_is_shown_as_text(browser: Browser, hostile: str) -> None:
    record = Record(hostile)
    page = browser.new_page()
    record.watch(page)
    for place in ("/features/1", "/features?sort=feature&order=up", "/features/1?breaks=1&scale=example"):
        page.goto(hostile + place)
        expect(page.get_by_text("onerror").first).to_be_visible()
        assert page.locator("img").count() == 0
        assert "pwned" not in page.title()
    expect(page.locator(".strip .peak").first).to_have_text(HOSTILE)
    page.locator(".strip .peak").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("<img src=x")
    expect(page.get_by_text(HOSTILE_DOCUMENT).first).to_be_visible()
    page.goto(f"{hostile}/features?token=<img src=x onerror=document.title='pwned'>")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.locator("img").count() == 0
    assert "pwned" not in page.title()
    page.close()
    record.check()


def test_a_dead_feature_says_so(browser: Browser, hostile: str) -> None:
    page = browser.new_page()
    page.goto(f"{hostile}/features/7")
    expect(page.get_by_text("never fired on the indexed text")).to_be_visible()
    expect(page.get_by_role("tab")).to_have_count(0)
    page.close()


def test_what_is_not_there_is_said(page: Page, live: str, record: Record) -> None:
    record.expected = {404}
    page.goto(f"{live}/features/{D_SAE}")
    expect(page.get_by_role("alert")).to_contain_text(f"Expected: 0…{D_SAE - 1}")
    page.goto(f"{live}/nowhere")
    expect(page.get_by_text("There is no page at /nowhere")).to_be_visible()
    page.get_by_role("link", name="To the overview", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("features of")


def test_both_themes(browser: Browser, live: str) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    grounds = {}
    for theme in ("light", "dark"):
        context = browser.new_context(color_scheme="light" if theme == "light" else "dark")
        page = context.new_page()
        page.goto(f"{live}/features/5")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        grounds[theme] = page.evaluate(paper)
        other = "dark" if theme == "light" else "light"
        page.get_by_role("button", name=f"Use the {other} theme").click()
        grounds[f"{theme} toggled"] = page.evaluate(paper)
        page.reload()
        assert page.evaluate(paper) == grounds[f"{theme} toggled"]
        page.keyboard.press("t")
        assert page.evaluate(paper) == grounds[theme]
        context.close()
    assert grounds["light"] == grounds["dark toggled"]
    assert grounds["dark"] == grounds["light toggled"]
    assert grounds["light"] != grounds["dark"]


@pytest.mark.parametrize("place", ["/", "/features", "/features/5", "/text?q=The+court+held+that"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, live: str, place: str) -> None:
    record = Record(live)
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    record.watch(page)
    page.goto(live + place)
    page.wait_for_load_state("networkidle")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
    record.check()


def test_every_control_has_a_name(page: Page, live: str) -> None:
    for place in ("/", "/features", "/features/5", "/text?q=The+court"):
        page.goto(live + place)
        page.wait_for_load_state("networkidle")
        for role in ("button", "link", "searchbox", "spinbutton", "combobox", "tab", "listbox"):
            for control in page.get_by_role(role).all():
                name = control.evaluate(
                    "e => e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels[0]?.textContent)"
                )
                assert name, (place, role, control.evaluate("e => e.outerHTML"))


def test_a_plain_reload_sends_little(page: Page, live: str, record: Record) -> None:
    page.goto(f"{live}/features/5")
    page.wait_for_load_state("networkidle")
    weights = page.evaluate(
        "performance.getEntriesByType('resource').filter(e => e.name.endsWith('.js')).map(e => e.encodedBodySize)"
    )
    assert 0 < sum(weights) < 60_000
    assert len([r for r in record.requests if "/api/" in r]) <= 3
