"""`microtome doctor` on this machine, and on ones with something wrong."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from microtome.cli import doctor

ONLINE = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def diagnose(*arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status of a real `microtome doctor`, and its findings by name."""
    command = [sys.executable, "-m", "microtome.cli.main", "doctor", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert run.stdout, run.stderr
    result = json.loads(run.stdout)
    assert result["ok"] == (run.returncode == 0)
    return run.returncode, {finding["name"]: finding for finding in result["findings"]}


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server on the loopback that answers every request with the status in `request.param`."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 – the library's name
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_this_machine_can_run_microtome() -> None:
    result = doctor.run(doctor.Options(offline=True))
    findings = {finding["name"]: finding for finding in result["findings"]}
    assert result["ok"]
    assert list(findings) == [
        *("Python", "packages", "torch", "device", "CPU", "memory", "disk", "hub", "built-in model"),
        *("cached models", "web client", "extras"),
    ]
    assert torch.__version__ in findings["torch"]["found"]
    assert "not asked" in findings["hub"]["found"]
    assert findings["CPU"]["found"].split()[0].isdigit()
    assert all(finding["fix"] for finding in findings.values() if finding["level"] != "good")


def test_show_marks_what_matters() -> None:
    findings = [
        {"name": "torch", "level": "stop", "found": "cannot be imported", "fix": "Install it"},
        {"name": "web client", "level": "note", "found": "not built", "fix": "Build it"},
        {"name": "disk", "level": "good", "found": "10 GB free", "fix": None},
    ]
    rows = doctor.show({"ok": False, "findings": findings}).splitlines()
    assert [row[0] for row in rows[:5]] == ["X", " ", "!", " ", " "]
    assert "→ Install it" in rows[1]
    assert rows[-1] == "Microtome cannot work here until each X is mended."


@pytest.mark.parametrize("hub", [200], indirect=True)
def test_a_hub_that_answers(hub: str) -> None:
    status, findings = diagnose(**ONLINE, HF_ENDPOINT=hub)
    assert (status, findings["hub"]["level"]) == (0, "good")
    assert findings["hub"]["found"] == f"{hub} answers"


@pytest.mark.parametrize("hub", [503], indirect=True)
def test_a_hub_in_trouble_stops_nothing(hub: str) -> None:
    status, findings = diagnose(**ONLINE, HF_ENDPOINT=hub)
    assert (status, findings["hub"]["level"]) == (0, "note")
    assert "HTTP 503" in findings["hub"]["found"]
    assert "HF_HUB_OFFLINE=1" in findings["hub"]["fix"]


def test_no_network_stops_nothing() -> None:
    status, findings = diagnose(**ONLINE, HF_ENDPOINT="http://127.0.0.1:9")
    assert (status, findings["hub"]["level"]) == (0, "note")
    assert "no answer" in findings["hub"]["found"]


def test_offline_is_respected() -> None:
    _, findings = diagnose(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert "not asked" in findings["hub"]["found"]


def test_a_torch_that_cannot_be_imported_stops_everything(tmp_path: Path) -> None:
    broken = tmp_path / "torch/__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('libtorch.so: cannot open shared object file')\n", encoding="utf-8")
    status, findings = diagnose("--offline", PYTHONPATH=str(tmp_path))
    assert (status, findings["torch"]["level"]) == (1, "stop")
    assert "libtorch.so" in findings["torch"]["found"]
    assert "pip install" in findings["torch"]["fix"]


def test_models_in_the_cache_are_listed(tmp_path: Path) -> None:
    make_cached_model(tmp_path / "hub", "somebody/tiny", "llama")
    _, findings = diagnose("--offline", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path / "hub"))
    assert findings["cached models"]["found"].startswith("somebody/tiny (")


def test_models_says_which_of_the_cache_fit(tmp_path: Path) -> None:
    make_cached_model(tmp_path, "somebody/tiny", "llama")
    make_cached_model(tmp_path, "somebody/odd", "mystery")
    make_cached_model(tmp_path, "somebody/damaged", None)
    command = [sys.executable, "-m", "microtome.cli.main", "models"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "MICROTOME_CACHE": str(tmp_path / "own")}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    listed = {line.split()[0]: line for line in text.splitlines() if "somebody/" in line}
    assert list(listed) == ["somebody/damaged", "somebody/odd", "somebody/tiny"]
    assert "no spec" not in listed["somebody/tiny"]
    assert "no spec" in listed["somebody/odd"]
    assert str(tmp_path / "own") in text


def make_cached_model(cache: Path, name: str, model_type: str | None) -> None:
    """A folder as huggingface_hub's cache lays it out, with a config and no weights."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123abcd", encoding="utf-8")
    text = "{ damaged" if model_type is None else json.dumps({"model_type": model_type})
    (snapshot / "config.json").write_text(text, encoding="utf-8")
