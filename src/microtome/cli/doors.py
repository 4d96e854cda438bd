"""What the commands start of the other parts on their floor, found by name among the package's entry points.

The parts of one floor never import each other. Each of them that can be started by a command says so in
`pyproject.toml`, under `[project.entry-points."microtome.doors"]`; so a part can be left out, or come from another
package.
"""

from importlib.metadata import entry_points
from typing import Any

from microtome.common.errors import MissingDependencyError

GROUP = "microtome.doors"


def door(name: str, extra: str) -> Any:
    """The function registered as `name`. Raises MissingDependencyError when it, or a package of `extra`, is not
    installed."""
    found = [*entry_points(group=GROUP, name=name)]
    if not found:
        raise MissingDependencyError(
            f"This installation knows no {name!r}", fix="Install Microtome again: its entry points are out of date"
        )
    try:
        return found[0].load()
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"The {name} needs the package {error.name}", fix=f"Install it with: pip install 'microtome[{extra}]'"
        ) from error
