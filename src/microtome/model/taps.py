"""Taps: functions that see, and may replace, the activation at a hook point while the model runs.

A tap's `fn(activation)` returns the tensor to go on with, or None to leave all as it was. What a tap leaves alone stays
bit-identical, so an edit of one head or row does not touch the others by a rounding error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.common.errors import ModelError
from microtome.model.names import HEAD_AXIS, HookName

TapFn = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Tap:
    """`fn` at the point `name`. With `through` the model goes on with the very tensor that `fn` saw, so that gradients
    reach it; where a point is otherwise only computed on the side (patterns, norms) this costs a rounding error.
    A tap that `reads` never changes anything."""

    name: HookName
    fn: TapFn
    through: bool = False
    reads: bool = False


@dataclass
class Run:
    """The forward pass under way: `shape` (batch, pos) of its tokens, `offset` of its first position in the sequence
    (above 0 while decoding with a key/value cache), and the model's `dtype`."""

    shape: tuple[int, int] = (0, 0)
    offset: int = 0
    dtype: torch.dtype = torch.float32

    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the pass that the model is called for with these arguments."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        past = kwargs.get("past_key_values")
        self.shape = (ids.shape[0], ids.shape[1])
        self.offset = int(past.get_seq_length()) if past is not None else 0

    def first(self, size: int) -> int:
        """The place in the sequence of an activation's first position, if it has `size` of them. They end where the pass
        does: all of it; only the last, where the library skips logits; more, where keys come from the cache (of which a
        sliding window keeps the last)."""
        return max(0, self.offset + self.shape[1] - size)


class StopForward(Exception):  # noqa: N818 - not an error: how a run ends early
    """Raised inside a hook when everything that was asked for has been seen."""


def of_all_heads(tap: Tap) -> Tap:
    """A tap of one head as a tap of the whole point, which leaves the other heads as they are."""
    head = tap.name.head
    if head is None:
        return tap

    def whole(activation: Tensor) -> Tensor | None:
        part = activation.select(HEAD_AXIS, head)  # a view: what is changed in place in it is changed in the whole
        answer = tap.fn(part)
        if answer is None or (answer is part and not tap.through):
            return None
        if answer.shape != part.shape:
            raise _other_shape(tap.name, answer, part)
        return activation.select_scatter(answer.to(device=part.device, dtype=part.dtype), HEAD_AXIS, head)

    return Tap(tap.name.of_all_heads, whole, through=tap.through, reads=tap.reads)


def visit(taps: Sequence[Tap], activation: Tensor) -> tuple[Tensor, bool]:
    """Show an activation to its taps in turn. Returns the tensor to go on with, and whether the model has to take it.

    Raises ModelError if a tap answers with another shape.
    """
    needed = False
    for tap in taps:
        version = _version(activation)
        answer = tap.fn(activation)
        if answer is None or answer is activation:
            changed = version != _version(activation) or (version is None and not tap.reads)
            needed |= tap.through or changed
            continue
        if answer.shape != activation.shape:
            raise _other_shape(tap.name, answer, activation)
        answer = answer.to(device=activation.device, dtype=activation.dtype)
        needed |= tap.through or answer.requires_grad or not torch.equal(answer, activation)
        activation = answer
    return activation, needed


def _other_shape(name: HookName, answer: Tensor, wanted: Tensor) -> ModelError:
    return ModelError(
        f"The hook at {name} returned a tensor of another shape",
        got=tuple(answer.shape),
        expected=f"{tuple(wanted.shape)} ({', '.join(name.axes)})",
    )


def _version(tensor: Tensor) -> int | None:
    """A count of the changes made to a tensor in place; tensors of inference mode keep none."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 - there is no public name for it


def splice(old: Tensor, new: Tensor, changed: Tensor, *, whole: bool) -> Tensor:
    """`new` where `changed` (broadcast), `old` elsewhere; `new` everywhere if gradients have to flow through it."""
    return new if whole else torch.where(changed, new.to(old.dtype), old)


def any_through(taps: Sequence[Tap]) -> bool:
    return any(tap.through for tap in taps)


def for_taps(taps: Sequence[Tap], activation: Tensor) -> Tensor:
    """The tensor to show where what changed is found by comparison: a copy, if a tap might change it in place."""
    return activation if all(tap.reads for tap in taps) else activation.clone()
