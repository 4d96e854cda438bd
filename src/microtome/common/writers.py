"""One writer at a time: a small file beside what is being written says who is writing it.

A writer that ends, well or by an exception, takes its file away. One that was killed leaves it behind: whoever comes
next on the same machine sees that the process is gone, and takes its place. From another machine that cannot be seen,
so there the file must be removed by hand.
"""

import json
import os
import socket
import sys
import time
import uuid
import weakref
from pathlib import Path

from microtome.common.config import JsonObject
from microtome.common.errors import ArtifactError

_WRITTEN_WITHIN_S = 1.0  # a file without text after this long is of a writer that died before it wrote any


class Writer:
    """Holds `FOLDER.lock`, from `Writer(folder)` to `release()`, or to its own end or its process's.

    The same process may begin again what it began before; the later writer then holds the file. Raises ArtifactError
    while another process that is alive holds it, or a process on another machine.
    """

    def __init__(self, folder: Path) -> None:
        file, token = folder.with_name(f"{folder.name}.lock"), uuid.uuid4().hex
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid()), "token": token}
        while not _created(file, json.dumps(about)):
            _clear(file, folder)
        self.file = file
        self._finalizer = weakref.finalize(self, _release, file, token)

    def release(self) -> None:
        """Take the file away, if it is still this writer's."""
        self._finalizer()


def _created(file: Path, text: str) -> bool:
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(f"{text}\n")
    except FileExistsError:
        return False
    return True


def _release(file: Path, token: str) -> None:
    if (_read(file) or {}).get("token") == token:
        file.unlink(missing_ok=True)


def _clear(file: Path, folder: Path) -> None:
    """Remove the file of a writer that is gone. Raises ArtifactError for one that is not, or may not be."""
    found = _read(file)
    if found is None:
        return
    who = f"process {found.get('pid')} on {found.get('host')}"
    here = found.get("host") == socket.gethostname()
    if found and not here:
        raise ArtifactError(
            f"{folder} is being written from another machine",
            got=who,
            fix=f"Wait until it has ended. If it was killed, remove {file} and run the same command again",
        )
    if found and found["pid"] != os.getpid() and _alive(found["pid"], found.get("began")):
        raise ArtifactError(
            f"{folder} is being written by another process",
            got=who,
            fix="Wait until it has ended, or choose another folder",
        )
    # Two may come to this at once. The one that is later must not remove the file that the earlier has made since.
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if (_read(aside) or {}).get("token") == found.get("token"):
        aside.unlink()
    else:
        aside.rename(file)


def _read(file: Path) -> JsonObject | None:
    """What the file says; `{}` if it stays without sense, None if it is not there."""
    until = time.monotonic() + _WRITTEN_WITHIN_S
    while True:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
        if time.monotonic() > until:
            return {}
        time.sleep(0.02)


def _alive(pid: int, began: str | None) -> bool:
    """Whether the process is there, and, where the system tells, still the one that began then."""
    if sys.platform == "win32":  # there, signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return began is None or began == _began(pid)


def _began(pid: int) -> str | None:
    """The boot and the tick at which a process began, so that a number that was given anew is known; None where there is
    no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"
