"""Writes docs/cli.md from the commands' own help; with `--check`, only says whether the page is up to date."""

import contextlib
import io
import os
import sys
from pathlib import Path

from microtome.cli.main import COMMANDS, main

PAGE = Path(__file__).parents[1] / "docs/cli.md"
HEAD = """\
# Commands

<!-- Made by `python scripts/cli_docs.py` from the commands themselves; a test fails when the two differ. -->

Each command reads its options, makes one call of the library, and says where the result is. With `--json` it prints one JSON
object. Progress and errors go to standard error. The exit status is 0 when the work is done, 1 when it failed with a message,
2 when the command line could not be read, and 130 when it was stopped with Ctrl-C; a command that takes long can be started
again with the same options and goes on from where it was stopped.
"""


def help_of(arguments: list[str]) -> str:
    """What `microtome ARGUMENTS --help` prints on a terminal of 100 columns."""
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def page() -> str:
    """The whole page."""
    parts = [HEAD, f"```text\n{help_of([])}\n```\n"]
    parts += [f"## microtome {name}\n\n```text\n{help_of([name])}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    fresh = page()
    if "--check" not in sys.argv:
        PAGE.write_text(fresh, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != fresh:
        sys.exit(f"{PAGE.name} is not what the commands say: run `python scripts/cli_docs.py`")
