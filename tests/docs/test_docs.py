"""The documentation is true: its Python runs, its commands parse, its links lead somewhere, and it leaves no public name out."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import microtome
from microtome.cli.main import COMMANDS, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language: (line number of the code, code)."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in _FENCE.finditer(text) if m[1] == language]


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's bash blocks, continued lines joined and comments dropped."""
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMAND_LINES = [(page, words) for page in PAGES for words in command_lines(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        # Padding makes a traceback point at the line in the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_there_is_python_to_run() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/api.md"} <= {name(page) for page in WITH_PYTHON}


def test_the_readme_example_stays_short() -> None:
    [(_, code)] = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize(
    ("page", "words"), COMMAND_LINES, ids=[f"{name(page)}: {' '.join(words)}" for page, words in COMMAND_LINES]
)
def test_commands_are_ones_that_exist(page: Path, words: list[str]) -> None:
    if words[0] == "microtome":
        assert words[1] in COMMANDS
        parse(words[1], words[2:])  # raises SystemExit on an option that is not there
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    else:
        assert shutil.which(words[0]), f"{name(page)} tells a command that is not known here: {words[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link.partition("#")[0] for link in _LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert missing == []


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [n for n in microtome.__all__ if not re.search(rf"`{n}\b", text)] == []


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "cli.md")
    assert [n for n in COMMANDS if f"microtome {n}" not in text] == []


def test_every_part_is_in_the_architecture() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    package = Path(microtome.__file__).parent
    parts = [folder.name for folder in package.iterdir() if (folder / "__init__.py").exists()]
    assert [part for part in parts if f"`{part}`" not in text] == []


def test_every_page_is_in_the_site() -> None:
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f'"{p.name}"' not in config] == []


def test_the_site_builds(tmp_path: Path) -> None:
    for item in ("docs", "zensical.toml"):
        source = ROOT / item
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / item)
    zensical = Path(sys.executable).with_name("zensical")
    subprocess.run([zensical, "build", "--clean"], cwd=tmp_path, check=True, capture_output=True)
    assert "Quickstart" in (tmp_path / "site/quickstart/index.html").read_text(encoding="utf-8")
