"""A capture: what a run is asked to keep, and how much of it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import InputError, ModelError
from microtome.model.names import HookName
from microtome.model.taps import StopForward, Tap


@dataclass
class Capture:
    """Keeps the activations at `names`, sliced, cast and moved inside the hook, so that nothing else stays in memory.

    `positions` keeps some positions (of a pattern: of its queries), `heads` some heads of the points that have them.
    With `stop` the run ends when everything has been seen; with `gradients` the activations are part of the autograd
    graph.
    """

    names: Sequence[HookName]
    positions: slice | Sequence[int] | None = None
    heads: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    stop: bool = False
    gradients: bool = False
    kept: dict[HookName, Tensor] = field(default_factory=dict)
    versions: dict[HookName, int] = field(default_factory=dict)

    def taps(self) -> list[Tap]:
        return [self._tap(name) for name in self.names]

    def _tap(self, name: HookName) -> Tap:
        return Tap(name, partial(self._keep, name), through=self.gradients, reads=not self.gradients)

    def _keep(self, name: HookName, activation: Tensor) -> Tensor | None:
        if self.gradients:
            activation = in_graph(activation, name)
            self.kept[name] = activation
            return activation
        seen = self._part(name, activation).to(device=self.device, dtype=self.dtype)
        if name.head is not None and _share(seen, activation):
            seen = seen.clone()  # one head is seen as a view, which would keep all of them in memory
        self.kept[name] = seen
        if not seen.is_inference():
            self.versions[name] = seen._version  # noqa: SLF001 - there is no public name for it
        if self.stop and len(self.kept) == len(self.names):
            raise StopForward
        return None

    def _part(self, name: HookName, activation: Tensor) -> Tensor:
        """The positions and heads asked for. Raises InputError if there are not so many."""
        if self.positions is not None and name.pos_axis is not None:
            activation = select(activation, name.pos_axis, self.positions, f"position of {name}")
        if self.heads is not None and (axis := head_axis(name)) is not None:
            activation = select(activation, axis, self.heads, f"head of {name}")
        return activation

    def result(self) -> dict[HookName, Tensor]:
        """What was kept. Raises ModelError if something was asked for and never reached, or changed in place since."""
        missing = [str(name) for name in self.names if name not in self.kept]
        if missing:
            raise ModelError("A hook point was set and never reached in the run", got=", ".join(missing))
        for name, version in self.versions.items():
            if self.kept[name]._version != version:  # noqa: SLF001
                raise ModelError(
                    f"The activation captured at {name} was changed in place later in the run",
                    fix="Let the hook function return a new tensor instead of writing into the one that it gets",
                )
        return self.kept


def gradients_at(value: Float[Tensor, ""], kept: Mapping[HookName, Tensor]) -> dict[HookName, Tensor]:
    """The gradient of a number at activations of its graph; zeros where it does not depend on them.

    Raises ModelError for a model with a kernel that has no gradient (bitsandbytes' 4 bits on a CPU): PyTorch warns and goes
    on with wrong numbers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
        try:
            found: Sequence[Tensor | None] = torch.autograd.grad(value, list(kept.values()), allow_unused=True)
        except UserWarning as error:
            raise ModelError(
                "There is no gradient through this model: a kernel of it has none",
                got=str(error).partition(": an autograd")[0],
                fix="Load it without this quantization",
            ) from error
    return {name: torch.zeros_like(kept[name]) if g is None else g for name, g in zip(kept, found, strict=True)}


def head_axis(name: HookName) -> int | None:
    """Which axis of the point's tensor counts heads, if one does."""
    for axis in ("n_heads", "n_kv_heads"):
        if axis in name.axes:
            return name.axes.index(axis)
    return None


def select(tensor: Tensor, axis: int, wanted: slice | Sequence[int], what: str) -> Tensor:
    """Some places of one axis: a slice gives a view. Raises InputError for a place that is not there."""
    if isinstance(wanted, slice):
        return tensor[(slice(None),) * axis + (wanted,)]
    size = tensor.shape[axis]
    for i in wanted:
        if not -size <= i < size:
            raise InputError(f"There is no such {what}", got=i, expected=f"{-size} to {size - 1}")
    return tensor.index_select(axis, torch.tensor([i % size for i in wanted], device=tensor.device))


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def in_graph(activation: Tensor, name: HookName) -> Tensor:
    """The activation as part of the autograd graph; the first one of a run becomes its root."""
    if not activation.is_floating_point():
        raise ModelError(f"There is no gradient at {name}: its values are whole numbers", got=str(activation.dtype))
    if activation.requires_grad:
        return activation
    return activation.detach().clone().requires_grad_()
