"""What the commands share: the options that all of them have, and the plain way to show a result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """The options of every command; each command's own dataclass adds to them."""

    json: bool = False
    """Print the result as one JSON object."""


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
