"""`microtome bench`: measure this machine's speeds against the tools that people use now.

The benchmarks are in the repository's folder `benchmarks`, not in the package: one module each, with a `Config` and
`run(config) -> dict`.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

import microtome
from microtome.cli.options import CommandOptions, lines
from microtome.common.config import from_dict
from microtome.common.errors import ConfigError, MissingDependencyError, unknown_name

NAMES = ("harvest", "train", "model", "parity", "patch", "attribute", "synthetic", "scaling")


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Measure speeds, memory and agreement against other tools, both in one run. Takes minutes on an idle machine."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """harvest, train, model, parity, patch, attribute, synthetic or scaling."""
    set: tuple[str, ...] = ()
    """Other sizes than the usual ones, as NAME=VALUE: rounds=3 tokens=4096. An unknown name lists them."""


def run(options: Options) -> dict[str, Any]:
    """Run one benchmark."""
    benchmark = load(options.name)
    result: dict[str, Any] = benchmark.run(from_dict(benchmark.Config, sizes(options.set)))
    return result


def show(result: dict[str, Any]) -> str:
    """The figures, then the ratios; the timings of each turn are left to --json."""
    parts = [lines(result["machine"]), lines(result["sizes"])]
    for name, figure in result["figures"].items():
        if name != "seconds" and (text := lines(figure or {})):
            parts.append(f"{name.replace('_', ' ')}\n{text}")
    if ratios := {key: "not measured" if v is None else v for key, v in result["ratios"].items()}:
        parts.append(f"ratios\n{lines(ratios)}")
    return "\n\n".join([*parts, *result["notes"]])


def load(name: str, root: Path | None = None) -> ModuleType:
    """The module of a benchmark, from the repository at `root` (the one that this package lies in).

    Raises ConfigError for an unknown name, MissingDependencyError where Microtome was installed without its repository.
    """
    if name not in NAMES:
        raise unknown_name("benchmark", name, NAMES)
    root = root or Path(microtome.__file__).parents[2]
    if not (root / "benchmarks" / f"{name}.py").is_file():
        raise MissingDependencyError(
            "The benchmarks are in Microtome's repository, and this Microtome was installed without it",
            got=f"no folder {root / 'benchmarks'}",
            fix="Clone the repository, install it there with `pip install -e '.[bench]'`, and run that one",
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"benchmarks.{name}")


def sizes(words: Sequence[str]) -> dict[str, Any]:
    """`["rounds=3", "corpus=demo"]` as a dict: values are numbers where they look like numbers."""
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ConfigError("--set takes NAME=VALUE", got=word, expected="rounds=3, say")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values
