"""The checker of signatures while the tests run: beartype, with an int welcome where a float is asked for, as mypy has it.

jaxtyping's hook on imports decorates every function of the package, so that dimensions of one name agree within a call. Around a
function that has no array in its signature this finds nothing that beartype alone does not find, and takes so long (arguments
bound, checked twice, kept for error messages) that most of the tests' time went there. So `jaxtyped` below takes its place: it
hands on the functions that have arrays, and gives the others to beartype. It is in force from this module's import, which the
hook causes at the package's first function.
"""

import dataclasses
import inspect
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_with_arrays = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's decorator of functions and dataclasses, at less cost for signatures without arrays."""
    if fn is None:
        return lambda fn: jaxtyped(fn, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and not hasattr(fn, "__no_type_check__") and not _is_wrapped(fn.__init__):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)  # type: ignore[method-assign]
        return fn
    hints = {name: _resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    if any("jaxtyping." in repr(hint) for hint in hints.values()):
        return _with_arrays(fn, typechecker=typechecker)
    fn.__annotations__ = hints
    return typechecker(fn)


def _is_wrapped(fn: Any) -> bool:
    return hasattr(fn, "__wrapped__")


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """The hint itself where it is a string; Any, as jaxtyping has it, where a name is known to mypy alone."""

    def holder() -> None: ...

    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except NameError:
        return Any


jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
