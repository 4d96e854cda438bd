"""The packages that fetch their names when first used: what they list is there, and type checkers see the same."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import microtome
import microtome.features
import microtome.model

PACKAGES = [microtome, microtome.features, microtome.model]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_see_the_same_names(package: ModuleType) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {(a.asname, n.module) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    homes = {(name, home.removesuffix(f".{name}")) for name, home in package._HOMES.items()}  # a module is its own home
    assert seen == homes


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_name_is_fetched_once_and_listed(package: ModuleType) -> None:
    for name in package._HOMES:
        assert getattr(package, name) is vars(package)[name]
    assert set(dir(package)) >= {*package.__all__, *package._HOMES, "__doc__"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_name_that_is_not_there(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'lamp'; its names are"):
        _ = package.lamp
