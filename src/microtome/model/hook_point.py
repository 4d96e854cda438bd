"""What a hook function gets beside the activation: where it is."""

from collections.abc import Callable

from torch import Tensor

from microtome.common.errors import ModelError
from microtome.model.names import HookName
from microtome.model.taps import Run


class HookPoint:
    """As in TransformerLens: `hook.name`, `hook.layer()`. `hook.offset` is the place in the sequence of the
    activation's first position, above 0 while decoding with a key/value cache."""

    def __init__(self, name: HookName, run: Run) -> None:
        self.hook_name, self.name, self._run = name, str(name), run

    @property
    def offset(self) -> int:
        return 0 if self.hook_name.point == "attn.hook_rot_k" else self._run.offset

    def layer(self) -> int:
        if self.hook_name.layer is None:
            raise ModelError(f"{self.name} belongs to no layer")
        return self.hook_name.layer

    def __repr__(self) -> str:
        return f"HookPoint({self.name})"


HookFn = Callable[[Tensor, HookPoint], Tensor | None]
