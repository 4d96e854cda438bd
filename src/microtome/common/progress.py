"""Progress on standard error: a bar on a terminal, a line now and then in a log, nothing for quick work."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, runtime_checkable

_PATIENCE_S = 2.0
_LOG_EVERY_S = 15.0


@runtime_checkable
class Progress(Protocol):
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Say that `amount` more of the total is done; `note` replaces the text behind the bar."""


def say(line: str) -> None:
    """One line on standard error, of what is about to be done."""
    print(line, file=sys.stderr, flush=True)


class _Lines:
    """For a file or a pipe: one line every quarter of a minute."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.began = 0, time.monotonic()
        self.next_line = self.began + _LOG_EVERY_S

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now >= self.next_line:
            self.next_line = now + _LOG_EVERY_S
            of = f"/{self.total:,}" if self.total else ""
            rate = self.done / max(now - self.began, 1e-9)
            print(
                f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.0f}/s {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Nothing to take down."""


class _Bar:
    """For a terminal: a rich bar that appears once the work has taken two seconds."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.began = 0, time.monotonic()
        self.bar: _RichBar | None = None

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if self.bar is None and time.monotonic() - self.began >= _PATIENCE_S:
            self.bar = _RichBar(self.total, self.label, self.unit)
        if self.bar is not None:
            rate = self.done / max(time.monotonic() - self.began, 1e-9)
            self.bar.show(self.done, f"{rate:,.0f} {self.unit}/s {note}".rstrip())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _RichBar:
    def __init__(self, total: int | None, label: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        self.progress = RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self.progress.start()
        self.task = self.progress.add_task(label, total=total, note="")

    def show(self, done: int, note: str) -> None:
        self.progress.update(self.task, completed=done, note=note)

    def close(self) -> None:
        self.progress.stop()


@contextmanager
def progress(total: int | None, label: str, unit: str = "steps") -> Iterator[Progress]:
    """Show how far a loop has come: `with progress(n, "harvest", "tokens") as bar: … bar.advance(128)`."""
    shown: _Bar | _Lines = (_Bar if sys.stderr.isatty() else _Lines)(total, label, unit)
    try:
        yield shown
    finally:
        shown.close()


class Timer:
    """Wall seconds of a block: `with Timer() as t: …; t.seconds`."""

    seconds = 0.0

    def __enter__(self) -> "Timer":
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._began
