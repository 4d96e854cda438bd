"""Packages that load nothing until they are used: each public name is fetched from its module when it is first used.

A package's `__init__.py` holds one table, name → full name of the module that has it, and the same names once more as
imports, which only type checkers and editors follow (so that they still know a misspelt one):

    _HOMES = {"lamp": "house.hall"}
    __all__ = list(_HOMES)

    if TYPE_CHECKING:
        from house.hall import lamp as lamp
    else:
        __getattr__, __dir__ = lazy(__name__, _HOMES)

A name whose home ends in the name itself (`"lamps": "house.lamps"`) is that module.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`, whose names live in the modules `homes`.

    A name that is not there raises AttributeError with those that are.
    """

    def fetch(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; its names are {', '.join(homes)}")
        home = importlib.import_module(homes[name])
        value = home if homes[name].endswith(f".{name}") else getattr(home, name)
        setattr(sys.modules[package], name, value)  # the next time it is simply there
        return value

    return fetch, lambda: sorted({*vars(sys.modules[package]), *homes})
