"""`ActivationCache`: the activations of one run, by hook name or by short form."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from microtome.common.errors import ModelError, unknown_name
from microtome.model.names import HookName


class ActivationCache(Mapping[str, Tensor]):
    """A read-only mapping from hook names to tensors, in the order of the forward pass.

    `cache["blocks.5.hook_resid_pre"]` and the short forms `cache["resid_pre", 5]`, `cache["z", 5]` and `cache["embed"]`
    are the same as in TransformerLens. An entry that was not asked for is a ModelError that lists the nearest ones.
    """

    def __init__(self, activations: Mapping[HookName, Tensor]) -> None:
        self._by_name = {str(name): activations[name] for name in sorted(activations)}

    def __getitem__(self, key: str | tuple[str, int] | HookName) -> Tensor:
        for candidate in self._spellings(key):
            if candidate in self._by_name:
                return self._by_name[candidate]
        shown = f"blocks.{key[1]}.{key[0]}" if isinstance(key, tuple) else str(key)
        raise unknown_name("activation in this cache", shown, self._by_name, ModelError)

    @staticmethod
    def _spellings(key: str | tuple[str, int] | HookName) -> list[str]:
        if not isinstance(key, tuple):
            return [str(key), f"hook_{key}"]
        point, layer = key
        prefix = f"blocks.{layer}."
        return [f"{prefix}{form}{point}" for form in ("", "hook_", "attn.hook_", "mlp.hook_")]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        rows = [f"  {name}: {list(tensor.shape)} {tensor.dtype}" for name, tensor in self._by_name.items()]
        return "\n".join(["ActivationCache(", *rows, ")"])
