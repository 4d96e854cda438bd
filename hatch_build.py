"""Builds the workbench's client before a wheel or an sdist is made; an editable install needs none of it.

In a checkout the client is built anew; in an unpacked sdist it is already there and is left as it is.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Run `npm ci` and `npm run build` in web/client, which writes src/microtome/web/static."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before files are collected. `version` is "editable" for `pip install -e`."""
        root = Path(self.root)
        built = root / "src/microtome/web/static/index.html"
        if version == "editable" or (built.exists() and not (root / ".git").exists()):
            return
        if shutil.which("npm") is None:
            raise RuntimeError("Building the package builds the web client, which needs Node.js 20 or later with npm")
        for command in (["npm", "ci"], ["npm", "run", "build"]):
            subprocess.run(command, cwd=root / "web/client", check=True)
