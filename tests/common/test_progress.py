"""Progress: silent when quick, lines in a log, a bar on a terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from microtome.common import progress as module
from microtome.common.progress import Timer, progress


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "count", "steps") as bar:
        for _ in range(10):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOG_EVERY_S", 0.0)
    with progress(2000, "harvest", "tokens") as bar:
        bar.advance(1500, "layer 15")
        bar.advance(500)
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(r"harvest: 1,500/2,000 tokens, [\d,]+/s layer 15", first)
    assert re.fullmatch(r"harvest: 2,000/2,000 tokens, [\d,]+/s", second)


def test_without_a_total(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOG_EVERY_S", 0.0)
    with progress(None, "read", "documents") as bar:
        bar.advance(3)
    assert capsys.readouterr().err.startswith("read: 3 documents, ")


TERMINAL = """
from microtome.common import progress as module
module._PATIENCE_S = {patience}
with module.progress(3, "train", "steps") as bar:
    for _ in range(3):
        bar.advance(1, "loss 0.5")
"""


def on_a_terminal(patience: float) -> str:
    """What a program shows on a pseudo-terminal."""
    outer, inner = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", TERMINAL.format(patience=patience)], stderr=inner) as run:
        os.close(inner)
        shown = b""
        while True:
            try:
                piece = os.read(outer, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not piece:
                break
            shown += piece
    os.close(outer)
    assert run.returncode == 0
    return shown.decode()


def test_a_terminal_gets_a_bar() -> None:
    shown = on_a_terminal(0.0)
    assert "train" in shown
    assert "3/3" in shown
    assert "\x1b[" in shown


def test_a_terminal_stays_empty_for_quick_work() -> None:
    assert on_a_terminal(60.0) == ""


def test_progress_ends_when_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt), progress(10, "count") as bar:
        bar.advance()
        raise KeyboardInterrupt


def test_timer() -> None:
    with Timer() as timer:
        _ = sum(range(1000))
    assert 0 < timer.seconds < 10
