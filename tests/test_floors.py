"""The house's rules: a part imports only from lower floors, and no modules import each other in a circle.

The sources are parsed, not run, so imports inside functions and under TYPE_CHECKING count too. The last tests run the checker on
small trees that break each rule, so that it is known to see what it is there for.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import microtome

FLOORS = {
    "common": 0,
    "text": 1,
    "toy": 1,
    "model": 2,
    "activations": 3,
    "dictionary": 4,
    "features": 5,
    "circuits": 5,
    "views": 6,
    "replications": 7,
    "web": 8,
    "cluster": 8,
    "cli": 8,
}
SOURCE = Path(microtome.__file__).parent


def module_name(file: Path, package: Path) -> str:
    """`…/microtome/text/bos.py` is `microtome.text.bos`; a package's `__init__.py` is the package."""
    parts = [package.name, *file.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[str]:
    """Every dotted name that the module imports, anywhere in it; `from a import b` gives `a.b`, and relative ones are resolved."""
    here = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package if node.level else 0
            base = here[: len(here) - up] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*path, alias.name]) for alias in node.names)


def named_modules(tree: ast.Module, known: Iterable[str]) -> set[str]:
    """The modules that the file names in strings, as the tables of `microtome` and `cli.main` do: imports in all but syntax."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {name for name in known if "." in name and name in strings}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module → the modules of the same package that it imports. A name inside a module counts as that module."""
    files = {module_name(file, package): file for file in sorted(package.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
        targets = named_modules(tree, files)
        for name in imported_names(tree, module, is_package=file.name == "__init__.py"):
            parts = name.split(".")
            ancestors = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            targets.update(next(([ancestor] for ancestor in ancestors if ancestor in files), []))
        graph[module] = targets - {module}
    return graph


def part_of(module: str) -> str | None:
    """The part that a module belongs to; None for the package itself."""
    return module.split(".")[1] if "." in module else None


def floor_breaches(graph: Mapping[str, set[str]], floors: Mapping[str, int]) -> list[str]:
    """One line for each import that goes up, or sideways to another part of the same floor."""
    breaches = []
    for module, targets in graph.items():
        part = part_of(module)
        for target in sorted(targets):
            other = part_of(target)
            if part is None or other is None or part == other:
                continue
            if part not in floors or other not in floors:
                breaches.append(f"{module} imports {target}: one of them has no floor")
            elif floors[other] >= floors[part]:
                breaches.append(f"{module} (floor {floors[part]}) imports {target} (floor {floors[other]})")
    return breaches


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle (Tarjan's strongly connected components larger than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph.get(module, ())):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            cut = stack.index(module)
            group, stack[cut:] = stack[cut:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def test_parts_import_only_from_lower_floors() -> None:
    graph = import_graph(SOURCE)
    assert "microtome.cli.main" in graph
    assert "microtome.common.errors" in graph["microtome.cli.main"]
    assert floor_breaches(graph, FLOORS) == []


def test_every_part_has_a_floor() -> None:
    parts = {folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").exists()}
    assert parts <= FLOORS.keys()
    assert "common" in parts


def test_no_import_circles() -> None:
    assert circles(import_graph(SOURCE)) == []


def make_tree(root: Path, files: Mapping[str, str]) -> dict[str, set[str]]:
    package = root / "house"
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text, encoding="utf-8")
    (package / "__init__.py").touch()
    return import_graph(package)


@pytest.mark.parametrize(
    ("text", "breach"),
    [
        ("from house.attic import box\n", "house.cellar.wine (floor 0) imports house.attic.box (floor 2)"),
        ("def f():\n    import house.attic.box\n", "house.cellar.wine (floor 0) imports house.attic.box (floor 2)"),
        ("from ..attic.box import lid\n", "house.cellar.wine (floor 0) imports house.attic.box (floor 2)"),
        ("from ..stable import horse\n", "house.cellar.wine imports house.stable.horse: one of them has no floor"),
        ("TABLE = {'lid': 'house.attic.box'}\n", "house.cellar.wine (floor 0) imports house.attic.box (floor 2)"),
        ("from house.pantry.jam import jam\n", "house.cellar.wine (floor 0) imports house.pantry.jam (floor 0)"),
    ],
)
def test_the_checker_sees_a_breach(tmp_path: Path, text: str, breach: str) -> None:
    files = {"cellar/wine.py": text, "attic/box.py": "", "stable/horse.py": "", "pantry/jam.py": ""}
    graph = make_tree(tmp_path, files)
    assert floor_breaches(graph, {"cellar": 0, "pantry": 0, "attic": 2}) == [breach]


def test_the_checker_allows_going_down_and_staying_in(tmp_path: Path) -> None:
    files = {
        "attic/box.py": "from house.cellar import wine\nfrom . import lid\n",
        "attic/lid.py": "",
        "cellar/wine.py": "",
    }
    graph = make_tree(tmp_path, files)
    assert graph["house.attic.box"] == {"house.cellar.wine", "house.attic.lid"}
    assert floor_breaches(graph, {"cellar": 0, "attic": 2}) == []
    assert circles(graph) == []


def test_the_checker_sees_a_circle(tmp_path: Path) -> None:
    files = {
        "hall/a.py": "from house.hall.b import x\n",
        "hall/b.py": "def f():\n    from house.hall import c\n",
        "hall/c.py": "from . import a\n",
        "hall/d.py": "from . import a\n",
    }
    assert circles(make_tree(tmp_path, files)) == [["house.hall.a", "house.hall.b", "house.hall.c"]]


def test_the_checker_sees_a_circle_through_the_root(tmp_path: Path) -> None:
    graph = make_tree(tmp_path, {"hall/a.py": "from house import VERSION\n"})
    assert graph["house.hall.a"] == {"house"}
    (tmp_path / "house/__init__.py").write_text("HOMES = {'a': 'house.hall.a'}\nVERSION = 1\n", encoding="utf-8")
    assert circles(import_graph(tmp_path / "house")) == [["house", "house.hall.a"]]
