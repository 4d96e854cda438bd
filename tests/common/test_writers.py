"""One writer at a time: a second process is refused while the first lives, and follows it when it is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from microtome.common.artifacts import draft
from microtome.common.errors import ArtifactError
from microtome.common.writers import Writer

# Begins a draft, says so, and waits to be told how to end.
PROCESS = """
import sys
from pathlib import Path
from microtome.common.artifacts import draft

work = draft(Path(sys.argv[1]), "thing", {}, resume=True)
print("begun", work.resumed, flush=True)
if input() == "fail":
    raise ValueError
work.publish()
"""


def begin(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("begun")
    return process


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    first = begin(tmp_path / "thing")
    (tmp_path / "thing.partial/shard-0").touch()
    with pytest.raises(ArtifactError, match=f"is being written by another process. Got: process {first.pid} on"):
        draft(tmp_path / "thing", "thing", {}, resume=True)
    with pytest.raises(ArtifactError, match="is being written by another process"):
        draft(tmp_path / "thing", "thing", {"size": 9}, overwrite=True)
    assert (tmp_path / "thing.partial/shard-0").exists()
    first.communicate("publish\n", timeout=30)
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing/shard-0").exists()


@pytest.mark.parametrize("end", ["kill", "fail"])
def test_a_successor_goes_on_where_a_dead_writer_stopped(tmp_path: Path, end: str) -> None:
    first = begin(tmp_path / "thing")
    (tmp_path / "thing.partial/shard-0").touch()
    if end == "kill":
        first.send_signal(signal.SIGKILL)
    first.communicate("fail\n" if end == "fail" else None, timeout=30)
    assert (tmp_path / "thing.partial.lock").exists() == (end == "kill")
    again = draft(tmp_path / "thing", "thing", {}, resume=True)
    assert again.resumed
    assert (again.folder / "shard-0").exists()
    again.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_the_file_goes_with_its_writer(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "thing")
    about = json.loads((tmp_path / "thing.lock").read_text())
    assert (about["pid"], about["host"]) == (os.getpid(), socket.gethostname())
    del writer
    assert not (tmp_path / "thing.lock").exists()


def test_of_two_in_one_process_the_later_holds_the_file(tmp_path: Path) -> None:
    first = Writer(tmp_path / "thing")
    second = Writer(tmp_path / "thing")
    first.release()
    assert (tmp_path / "thing.lock").exists()
    second.release()
    assert list(tmp_path.iterdir()) == []


def left_behind(tmp_path: Path, **other: object) -> Path:
    """A lock that this process might have left, but for what is `other`."""
    writer, file = Writer(tmp_path / "thing"), tmp_path / "thing.lock"
    about = json.loads(file.read_text())
    writer.release()
    file.write_text(json.dumps({**about, **other}))
    return file


def test_a_process_number_that_was_given_anew_is_no_writer(tmp_path: Path) -> None:
    """The parent is alive, but it did not begin when the writer did."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell when a process began")
    file = left_behind(tmp_path, pid=os.getppid(), began="another boot 1")
    Writer(tmp_path / "thing").release()
    assert not file.exists()
    left_behind(tmp_path, pid=os.getppid(), began=None)
    with pytest.raises(ArtifactError, match="another process"):
        Writer(tmp_path / "thing")


def test_another_machine_is_left_alone_until_its_file_is_removed(tmp_path: Path) -> None:
    file = left_behind(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(ArtifactError, match=r"another machine. Got: process 1 on elsewhere.*remove .*thing.lock"):
        Writer(tmp_path / "thing")
    file.unlink()
    Writer(tmp_path / "thing").release()


@pytest.mark.parametrize("text", ["", "[1]", '{"pid": "x"}'])
def test_a_file_without_sense_is_of_a_writer_that_died_early(tmp_path: Path, text: str) -> None:
    (tmp_path / "thing.lock").write_text(text)
    Writer(tmp_path / "thing").release()
    assert list(tmp_path.iterdir()) == []
