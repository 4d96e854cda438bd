"""What stands for the hub: a cache laid out as huggingface_hub lays it out, and a server on this machine that answers its
client's questions about repositories, which are folders."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

FIXTURES = Path(__file__).parent / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str = "https://nowhere.invalid") -> None:
    """An empty cache, and a hub at this address: one that cannot be reached, unless another is named."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def put(cache: Path, repo: str, inside: str, fixture: str, *files: str) -> Path:
    """What is left in the cache after a download of these files (all by default) of a repository."""
    top = cache / f"models--{repo.replace('/', '--')}"
    (top / "refs").mkdir(parents=True, exist_ok=True)
    (top / "refs/main").write_text(COMMIT)
    folder = top / "snapshots" / COMMIT / inside
    copy(fixture, folder, *files)
    return folder


def copy(fixture: str, folder: Path, *files: str) -> None:
    """These files (all by default) of a fixture, in a folder."""
    shutil.copytree(FIXTURES / fixture, folder, dirs_exist_ok=True)
    for file in folder.iterdir():
        if files and file.name not in files:
            file.unlink()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        """`/api/models/O/R[/revision/…]`, `/api/models/O/R/tree/…` and `/O/R/resolve/REVISION/FILE`."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        root = self.folder.joinpath(*(parts[2:4] if api else parts[:2]))
        files = {each.relative_to(root).as_posix(): each for each in sorted(root.rglob("*")) if each.is_file()}
        wanted = "/".join(parts[4:])
        if api and files:
            sizes = {name: file.stat().st_size for name, file in files.items()}
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(tree if wanted.startswith("tree/") else about).encode(), body)
        elif wanted in files:
            self.asked.extend([wanted] * body)
            self._send(200, files[wanted].read_bytes(), body)
        else:
            self._send(404, b"{}", body)

    def _send(self, status: int, content: bytes, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The repositories `owner/repo` of a folder as the hub has them: the address, and the files that were asked for."""
    asked: list[str] = []

    handler = type("Handler", (_Handler,), {"folder": folder, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
