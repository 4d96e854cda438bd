"""Where a stream of activations comes from: a store, or the model itself. Both give the same rows in the same order.

A source is cut into *blocks* of a few sequences. `block_rows` counts the activations of each block that are text's
(special tokens are left out), from the token ids alone; `read(block)` gives them. A source of several hook points gives
their activations side by side, in the order of `hook_names`; those of heads are joined to one axis.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.activations.store import ActivationStore
from microtome.common.config import JsonObject, require
from microtome.common.errors import ConfigError
from microtome.model import HookedModel
from microtome.model.names import HookName
from microtome.text import TokenDataset

Sequences = tuple[list[Float[Tensor, "sequence context _"]], Bool[Tensor, "sequence context"]]
"""The activations of whole sequences at each hook point, and which of their tokens are text."""


class ActivationSource(ABC):
    """Blocks of activations at one or several hook points. A source inherits from it and sets the four attributes."""

    hook_names: tuple[str, ...]
    widths: tuple[int, ...]
    model_name: str
    n_blocks: int

    @property
    def d(self) -> int:
        """The length of a row: all points' widths together."""
        return sum(self.widths)

    @property
    def hook_name(self) -> str:
        """The one hook point. Raises ConfigError for a source of several."""
        if len(self.hook_names) > 1:
            raise ConfigError("This needs a source of one hook point", got=", ".join(self.hook_names))
        return self.hook_names[0]

    @property
    @abstractmethod
    def block_rows(self) -> Int[np.ndarray, " block"]:
        """How many activations each block has."""

    @abstractmethod
    def read(self, block: int) -> Float[Tensor, "row d"]:
        """The activations of a block, special tokens left out."""

    @abstractmethod
    def describe(self) -> JsonObject:
        """What a dictionary's provenance says of its data."""


def text_mask(tokens: Int[Tensor, "sequence context"], special_ids: Sequence[int]) -> Bool[Tensor, "sequence context"]:
    """Where the tokens are text: everywhere but at the ids that packing put in."""
    return torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype, device=tokens.device), invert=True)


def side_by_side(parts: Sequence[Float[Tensor, "*row _"]]) -> Float[Tensor, "*row d"]:
    """The parts in one row each, on the first one's device, in the dtype that holds all of them."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(device=parts[0].device, dtype=dtype) for part in parts], dim=-1)


def _of_text(parts: Sequence[Float[Tensor, "sequence context _"]], is_text: Tensor) -> Float[Tensor, "row d"]:
    return side_by_side([part[is_text.to(part.device)] for part in parts])


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names without repetition."""
    found = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    require(bool(found), "A source needs at least one hook point", got=names)
    return found


class StoreSource(ActivationSource):
    """Blocks of `sequences_per_block` sequences of an `ActivationStore`, at one of its hook points or several.

    Without `hook_names` it is the store's one point. Raises ConfigError for a point that is not there, and for a choice
    that has to be made.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_names: str | Sequence[str] | None = None,
        *,
        sequences_per_block: int = 16,
    ) -> None:
        if hook_names is None and len(store.hook_names) > 1:
            raise ConfigError(
                f"{store.path} has several hook points", got=", ".join(store.hook_names), fix="Say which are wanted"
            )
        self.store, self.model_name = store, store.model_name
        self.hook_names = _as_tuple(store.hook_names if hook_names is None else hook_names)
        self.widths = tuple(store.width(name) for name in self.hook_names)
        self.sequences_per_block = sequences_per_block
        self.n_blocks = -(-store.n_sequences // sequences_per_block)

    @cached_property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return np.array([int(self._mask(block).sum()) for block in range(self.n_blocks)])

    def read(self, block: int) -> Float[Tensor, "row d"]:
        return _of_text(*self.sequences(block))

    def sequences(self, block: int) -> Sequences:
        """The block's sequences whole."""
        return [self.store.read(name, *self._bounds(block)) for name in self.hook_names], self._mask(block)

    def describe(self) -> JsonObject:
        return {
            "kind": "store",
            "fingerprint": self.store.fingerprint,
            "hook_names": list(self.hook_names),
            "model": self.store.config["model"],
            "dataset": self.store.config["dataset"],
            "dtype": self.store.config["harvest"]["dtype"],
        }

    def _mask(self, block: int) -> Bool[Tensor, "sequence context"]:
        return text_mask(self.store.tokens(*self._bounds(block)), self.store.special_ids)

    def _bounds(self, block: int) -> tuple[int, int]:
        start = block * self.sequences_per_block
        return start, min(start + self.sequences_per_block, self.store.n_sequences)


class ModelSource(ActivationSource):
    """Blocks of a `TokenDataset` run through the model when they are read: training with nothing on the disk.

    `hook_names` is one name or several, or globs (the points of a glob come in the order of the forward pass). One pass
    serves all of them and stops at the deepest. Raises ModelError for a name that the model does not have, ConfigError
    for a point whose activations are not one row per token.
    """

    def __init__(
        self,
        model: HookedModel,
        dataset: TokenDataset,
        hook_names: str | Sequence[str],
        *,
        sequences_per_block: int = 16,
    ) -> None:
        self.model, self.dataset, self.model_name = model, dataset, model.name
        found = [name for wanted in _as_tuple(hook_names) for name in model.resolve(wanted)]
        _check_rows(found)
        self.hook_names = _as_tuple([str(name) for name in found])
        self.sequences_per_block = sequences_per_block
        self.n_blocks = -(-dataset.n_sequences // sequences_per_block)
        probe = model.activations(self._tokens(0)[:1, :2], self.hook_names)
        self.widths = tuple(probe[name][0, 0].numel() for name in self.hook_names)

    @cached_property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return np.array([int(text_mask(self._tokens(b), self.dataset.special_ids).sum()) for b in range(self.n_blocks)])

    def read(self, block: int) -> Float[Tensor, "row d"]:
        return _of_text(*self.sequences(block))

    @torch.no_grad()
    def sequences(self, block: int) -> Sequences:
        """The block's sequences whole."""
        tokens = self._tokens(block)
        cache = self.model.activations(tokens, self.hook_names)
        return [cache[name].flatten(2) for name in self.hook_names], text_mask(tokens, self.dataset.special_ids)

    def describe(self) -> JsonObject:
        return {
            "kind": "model",
            "hook_names": list(self.hook_names),
            "model": {
                "name": self.model.name,
                "revision": self.model.revision,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "dataset": {
                "fingerprint": self.dataset.fingerprint,
                "n_sequences": self.dataset.n_sequences,
                "context": self.dataset.context,
                "special_ids": list(self.dataset.special_ids),
            },
        }

    def _tokens(self, block: int) -> Int[Tensor, "sequence context"]:
        start = block * self.sequences_per_block
        return torch.from_numpy(
            self.dataset.batch(start, min(start + self.sequences_per_block, self.dataset.n_sequences))
        )


def _check_rows(names: Sequence[HookName]) -> None:
    for name in names:
        if name.axes[:2] != ("batch", "pos") or len(name.axes) < 3:
            raise ConfigError(
                f"The activations at {name} are not one row per token", got=f"axes {', '.join(name.axes)}"
            )
