"""What ships inside the package: the demo corpus, and the demo dictionary with its feature index."""

import importlib.resources
from pathlib import Path

from microtome.common.errors import ArtifactError

DEMO = "demo"


def shipped(name: str) -> Path:
    """The file or folder `name` among the package's assets. Raises ArtifactError for one that this copy comes
    without."""
    path = importlib.resources.files("microtome") / "assets" / name
    if not isinstance(path, Path) or not path.exists():
        raise ArtifactError(
            f"This copy of Microtome comes without {name}", fix="Install Microtome as a package, or clone it whole"
        )
    return path


def shipped_or(path: str | Path, part: str) -> Path:
    """The path itself, or, for the name `"demo"` where no such folder is, the demo's shipped `part`."""
    path = Path(path)
    return shipped(f"{DEMO}/{part}") if path == Path(DEMO) and not path.exists() else path
