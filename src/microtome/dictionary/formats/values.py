"""Values of configs that others wrote: each is what it has to be, or our error says what it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml  # type: ignore[import-untyped]

from microtome.common.errors import ArtifactError


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none of a file that is not there. Raises ArtifactError for one that holds something
    else, or code."""
    if not file.is_file():
        return {}
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    # PyYAML lets through what its tags raise of values that they do not fit.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(said, dict | None):
        raise ArtifactError(f"{file} is damaged", got=type(said).__name__, expected="keys and values")
    return said or {}


def texts_of(file: Path, config: Mapping[str, Any], *keys: str) -> dict[str, str]:
    """The texts under those of these keys that are there. Raises ArtifactError for another value than a text."""
    given = {key: value for key, value in config.items() if key in keys and value not in (None, "")}
    for key, value in given.items():
        if not isinstance(value, str):
            raise damaged(file, key, value, "a text")
    return given


def table(file: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; an empty one where there is none, or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise damaged(file, key, value, "a JSON object")
    return value or {}


def text(config: Mapping[str, Any], key: str) -> str | None:
    """The text under a key; None where it is no text. For what only tells."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None


def whole(file: Path, config: Mapping[str, Any], key: str) -> int:
    """The positive integer under a key."""
    value = config.get(key)
    if not is_whole(value):
        raise damaged(file, key, value, "a positive integer")
    return value


def flag(file: Path, config: Mapping[str, Any], key: str, *, missing: bool | None = None) -> bool:
    """What is true or false under a key. Where there is none it is `missing`; None: then it has to be there."""
    value = config.get(key, missing)
    if not isinstance(value, bool):
        raise damaged(file, key, value, "true or false")
    return value


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a positive integer: true and false, which Python counts as integers, are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def damaged(file: Path, key: str, value: object, expected: str) -> ArtifactError:
    """What is wrong with one value of a config."""
    return ArtifactError(f"{file} is damaged", got=f"{key} {value!r}", expected=expected)
