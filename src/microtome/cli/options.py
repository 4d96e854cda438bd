"""What the commands share: the options that all of them have, lists of values, and the plain way to show a result."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_origin


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of every command; each command's own dataclass adds to them."""

    json: bool = False
    """Print the result as one JSON object."""


def split_commas(options: type[CommandOptions], words: Sequence[str]) -> list[str]:
    """The command line `words` with `--hooks a,b` as `--hooks a b`, for each option that takes several values.

    Among NAME=VALUE words a comma separates only where another NAME= follows; other commas belong to the value.
    """
    several = {f"--{field.name}".replace("_", "-") for field in fields(options) if get_origin(field.type) is tuple}
    split: list[str] = []
    taking = False
    for word in words:
        option, _, values = word.partition("=")
        if word.startswith("--"):
            taking = option.replace("_", "-") in several
            split.append(option if taking else word)
        elif taking:
            values = word
        else:
            split.append(word)
        if taking:
            split += [value for value in re.split(r",(?=\w+=)" if "=" in values else ",", values) if value]
    return split


def lines(result: Mapping[str, Any]) -> str:
    """`result` as aligned `key  value` lines: thousands separated, lists joined by commas, empty values left out."""
    rows = {key.replace("_", " "): _text(value) for key, value in result.items() if value not in (None, "", [], {})}
    width = max(map(len, rows), default=0)
    return "\n".join(f"{key:<{width}}  {text}" for key, text in rows.items())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)


def size(n_bytes: float) -> str:
    """A number of bytes for people: `98 MB`, `1.4 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"
