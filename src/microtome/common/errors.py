"""The errors a user can meet: one base class, a few kinds, one way to say what is wrong.

A message has up to four parts, in this order: what failed, what was got, what was expected, what to do.
"""

import difflib
from collections.abc import Iterable


class MicrotomeError(Exception):
    """Base of every error that Microtome raises on purpose.

    `str(error)` is complete by itself: the command line prints it without a traceback.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        said = [what, *(f"{name}: {part}" for name, part in (("Got", got), ("Expected", expected)) if part is not None)]
        super().__init__(" ".join(map(_sentence, said if fix is None else [*said, fix])))


def _sentence(text: str) -> str:
    """The text with a full stop, if it has none."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


class ConfigError(MicrotomeError):
    """A setting that cannot be: an unknown key, a value out of range, two that exclude each other."""


class ArtifactError(MicrotomeError):
    """A folder that is missing, incomplete, damaged, of another kind, or already there."""


class InputError(MicrotomeError):
    """Text, tokens or tensors that cannot be used as they are."""


class ModelError(MicrotomeError):
    """A model that cannot be found or opened, or something asked of it that it does not have."""


class MissingDependencyError(MicrotomeError):
    """An optional package that is needed here and not installed."""


def nearest(name: str, valid: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` entries of `valid` most like `name`, best first."""
    return difflib.get_close_matches(name, list(valid), n=n, cutoff=0.4)


def unknown_name(
    kind: str,
    name: str,
    valid: Iterable[str],
    error: type[MicrotomeError] = ConfigError,
) -> MicrotomeError:
    """An error for `name`, which is none of `valid`, that lists the nearest ones (or all, if few)."""
    names = sorted(valid)
    close = nearest(name, names)
    known = ", ".join(names) if len(names) <= 12 else f"{len(names)} names"
    fix = f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else None
    return error(f"Unknown {kind} {name!r}", expected=f"one of {known}", fix=fix)
