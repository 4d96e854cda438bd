"""Taps: functions set at hook points of a running model, through PyTorch's own forward hooks, and taken away again.

A tap is called as `fn(activation)`. If it returns a tensor, the model goes on with that one; None leaves all as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from microtome.common.errors import ModelError
from microtome.model.names import HEADS, HookName
from microtome.model.specs import ModelConfig, Site

TapFn = Callable[[Tensor], Tensor | None]
Tap = tuple[HookName, TapFn]


@contextmanager
def tapped(hf: nn.Module, config: ModelConfig, sites: dict[HookName, Site], taps: Sequence[Tap]) -> Iterator[None]:
    """Within the block, `hf` calls every tap at its site. All hooks are removed at the end, whatever happens inside."""
    handles = []
    try:
        for name, fn in taps:
            site = sites[name]
            module = hf.get_submodule(site.module)
            hook = _Hook(name, fn, config, site.in_place)
            if site.side == "input":
                handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    """One tap as the pair of PyTorch hooks; only the one for its side is registered."""

    def __init__(self, name: HookName, fn: TapFn, config: ModelConfig, in_place: bool) -> None:
        self.name, self.fn, self.config, self.in_place = name, fn, config, in_place

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            value = self._apply(args[0])
            return None if value is None else ((value, *args[1:]), kwargs)
        value = self._apply(kwargs["hidden_states"])
        return None if value is None else (args, {**kwargs, "hidden_states": value})

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            value = self._apply(output[0])
            return None if value is None else (value, *output[1:])
        return self._apply(output)

    def _apply(self, tensor: Tensor) -> Tensor | None:
        """Show the tap the tensor in its documented shape; give back its answer in the model's shape."""
        shown = self._split_heads(tensor)
        answer = self.fn(shown)
        if answer is None:
            return None
        if answer.shape != shown.shape:
            raise ModelError(
                f"The hook at {self.name} returned a tensor of another shape",
                got=tuple(answer.shape),
                expected=f"{tuple(shown.shape)} ({', '.join(self.name.axes)})",
            )
        answer = answer.to(device=tensor.device, dtype=tensor.dtype).reshape(tensor.shape)
        if self.in_place:
            tensor.copy_(answer)
            return None
        return answer

    def _split_heads(self, tensor: Tensor) -> Tensor:
        if self.name.axes != HEADS:
            return tensor
        heads: Tensor = tensor.unflatten(-1, (self.config.n_heads, self.config.d_head))
        return heads


class StopForward(Exception):  # noqa: N818 - not an error: how a run ends early
    """Raised inside a hook when everything that was asked for has been seen."""


def run_until(call: Callable[[], Any]) -> Any:
    """`call()`, or None when a tap ended it early."""
    try:
        return call()
    except StopForward:
        return None
