"""Pictures of the workbench, made by headless Chromium: `python scripts/screenshots.py runs/index`.

Takes an index folder (a server is started for it) or the address of a running workbench, and writes PNGs, light and dark, into
docs/images. `workbench.png` is the README's: the page of one feature.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, sync_playwright

DOCS = Path(__file__).parents[1] / "docs/images"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEXT = "The Eiffel Tower is in Paris, and the Colosseum is in Rome. The court held that the contract was void."
Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
SIZES = {"": (1280, 860), "-phone": (390, 844)}


def main() -> None:
    """Take every picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="an index folder, or the address of a running workbench")
    parser.add_argument("--out", type=Path, default=DOCS, help="where the pictures go")
    parser.add_argument("--feature", type=int, default=None, help="the feature to show (default: a strong, rare one)")
    parser.add_argument("--text", default=TEXT, help="the text to try")
    parser.add_argument("--no-model", action="store_true", help="leave the text page out")
    parser.add_argument("--phone", action="store_true", help="at a phone's width too")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with address(options.source, model=not options.no_model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for theme in THEMES:
            for size in ("", "-phone") if options.phone else ("",):
                pictures(browser, url, options, theme, size)
        browser.close()


def pictures(browser: Browser, url: str, options: argparse.Namespace, theme: Theme, size: str) -> None:
    """One theme at one width."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        device_scale_factor=2,
    )
    page = context.new_page()
    page.goto(url)  # with the token, if there is one
    base = url.split("?", maxsplit=1)[0].rstrip("/")
    feature = options.feature
    if feature is None:
        rows = page.request.get(f"{base}/api/features?sort=max&alive=true&max_density=0.01&limit=1").json()["rows"]
        feature = rows[0]["feature"] if rows else 0
    places = {"overview": "/", "features": "/features", "workbench": f"/features/{feature}"}
    for name, place in places.items():
        page.goto(base + place)
        page.wait_for_load_state("networkidle")
        save(page.screenshot(full_page=bool(size)), options.out, f"{name}{size}", theme)
    if not options.no_model:
        page.goto(f"{base}/text")
        page.get_by_label("Text to try").fill(options.text)
        page.get_by_role("button", name="Look", exact=True).click()
        page.get_by_role("heading", name="Features in the text").wait_for(timeout=120_000)
        page.wait_for_load_state("networkidle")
        save(page.screenshot(full_page=bool(size)), options.out, f"text{size}", theme)
    context.close()


def save(png: bytes, folder: Path, name: str, theme: str) -> None:
    """Write a picture; the dark ones say so in their names."""
    path = folder / f"{name}{'-dark' if theme == 'dark' else ''}.png"
    path.write_bytes(png)
    print(path)


@contextmanager
def address(source: str, *, model: bool) -> Iterator[str]:
    """The address of the workbench: `source` itself, or that of a server started for the folder `source`."""
    if source.startswith(("http://", "https://")):
        yield source
        return
    program = (
        "import sys; from microtome.web.server import serve; serve(sys.argv[1], port=0, model=sys.argv[2] == 'model', "
    )
    program += "ready=lambda url: print(url, flush=True))"
    command = [sys.executable, "-c", program, source, "model" if model else "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit("The server did not start; its error is above.")
        try:
            yield url
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
