"""Parts of the commands' own floor, found by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microtome.cli.doors import door
from microtome.common.errors import MissingDependencyError


def test_the_workbench_is_behind_its_door() -> None:
    from microtome.web.server import serve

    assert door("workbench", extra="web") is serve


def test_an_unknown_door() -> None:
    with pytest.raises(MissingDependencyError, match="knows no 'attic'. Install Microtome again"):
        door("attic", extra="web")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    # A package that cannot be imported stands before the real one.
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no fastapi', name='fastapi')\n", encoding="utf-8")
    code = "from microtome.cli.doors import door\ndoor('workbench', extra='web')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert "MissingDependencyError: The workbench needs the package fastapi." in run.stderr
    assert "pip install 'microtome[web]'" in run.stderr
