"""The server as a process: it says where it is, stops on Ctrl-C, and names what keeps it from starting."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from microtome.common.errors import ArtifactError, ConfigError
from microtome.web.server import address_of, bind, serve

COMMAND = """
import sys
from microtome.cli.serve import Options, run, show
from microtome.common.errors import MicrotomeError
from pathlib import Path
try:
    print(show(run(Options(index=Path(sys.argv[1]), host=sys.argv[2], port=int(sys.argv[3]), no_model=True))))
except MicrotomeError as error:
    sys.exit(f"microtome serve: {error}")
"""


@contextmanager
def running(index_path: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address that it says."""
    command = [sys.executable, "-c", COMMAND, str(index_path), host, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            yield process, process.stderr.readline().strip() if line.startswith("The workbench is ready") else line
        finally:
            if process.poll() is None:
                process.kill()


def test_ctrl_c_stops_it_cleanly(index_path: Path) -> None:
    with running(index_path) as (process, address):
        assert httpx.get(f"{address}api/health").json()["encoder"]["status"] == "unavailable"
        with httpx.Client() as kept_open:
            kept_open.get(f"{address}api/summary")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read().strip() == "Stopped."
        assert "Traceback" not in process.stderr.read()


def test_beyond_loopback_it_asks_for_the_token(index_path: Path) -> None:
    with running(index_path, host="0.0.0.0") as (_, address):
        assert "?token=" in address
        base, token = address.split("?token=")
        assert httpx.get(f"{base}api/summary").status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            browser.get(address)
            assert browser.get(f"{base}api/summary").status_code == 200
        assert httpx.get(f"{base}api/summary", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_a_port_in_use_is_named(index_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} on 127.0.0.1 is in use.*--port 0"):
            serve(index_path, port=port, model=False)
        with running(index_path, port=port) as (process, line):
            assert process.wait(timeout=20) == 1
            assert f"Port {port}" in line


def test_a_folder_that_is_no_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no feature_index"):
        serve(tmp_path / "nothing", model=False)
    with pytest.raises(ArtifactError, match="no Microtome artifact"):
        serve(tmp_path, model=False)


def test_addresses_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="no such port"):
        bind("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match=r"Cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="Cannot listen on nowhere.invalid"):
        bind("nowhere.invalid", 0)


def test_a_free_port_is_found() -> None:
    first, second = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    with first, second:
        assert first.getsockname()[1] != second.getsockname()[1]


def test_the_socket_is_one_without_delay() -> None:
    # asyncio sets TCP_NODELAY only on sockets of this protocol; without it each answer takes 40 ms more.
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_addresses_to_open() -> None:
    assert address_of("127.0.0.1", 8700, None) == "http://127.0.0.1:8700/"
    assert address_of("0.0.0.0", 80, "a/b") == "http://127.0.0.1:80/?token=a%2Fb"
    assert address_of("::1", 1, None) == "http://[::1]:1/"


def test_readers_at_once_get_the_same(index_path: Path) -> None:
    with running(index_path) as (_, address):
        answers: list[bytes] = []

        def ask() -> None:
            for feature in range(8):
                answers.append(httpx.get(f"{address}api/features/{feature}/examples").content)  # noqa: PERF401

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 48
        assert len(set(answers)) == 8
