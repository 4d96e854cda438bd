"""Where a stream of activations comes from: a store, or the model itself. Both give the same rows in the same order.

A source is cut into *blocks* of a few sequences. `rows(block)` counts the activations of a block that are text's
(special tokens are left out), from the token ids alone; `read(block)` gives them.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.activations.store import ActivationStore
from microtome.common.config import JsonObject
from microtome.model import HookedModel
from microtome.text import TokenDataset


@runtime_checkable
class ActivationSource(Protocol):
    """Blocks of activations at one hook point of one model."""

    hook_name: str
    model_name: str
    d: int
    n_blocks: int

    @property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        """How many activations each block has."""

    def read(self, block: int) -> Float[Tensor, "row d"]:
        """The activations of a block, special tokens left out."""

    def describe(self) -> JsonObject:
        """What a dictionary's provenance says of its data."""


def text_mask(tokens: Int[Tensor, "sequence context"], special_ids: Sequence[int]) -> Bool[Tensor, "sequence context"]:
    """Where the tokens are text: everywhere but at the ids that packing put in."""
    return torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype, device=tokens.device), invert=True)


class StoreSource:
    """Blocks of `sequences_per_block` sequences of an `ActivationStore`, at one of its hook points."""

    def __init__(self, store: ActivationStore, hook_name: str | None = None, *, sequences_per_block: int = 16) -> None:
        names = store.hook_names
        self.store, self.hook_name = store, hook_name if hook_name is not None else names[0]
        self.d, self.model_name = store.width(self.hook_name), store.model_name
        self.sequences_per_block = sequences_per_block
        self.n_blocks = -(-store.n_sequences // sequences_per_block)

    @cached_property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return np.array([int(self._mask(block).sum()) for block in range(self.n_blocks)])

    def read(self, block: int) -> Float[Tensor, "row d"]:
        return self.store.read(self.hook_name, *self._bounds(block))[self._mask(block)]

    def describe(self) -> JsonObject:
        return {
            "kind": "store",
            "fingerprint": self.store.fingerprint,
            "hook_name": self.hook_name,
            "model": self.store.config["model"],
            "dataset": self.store.config["dataset"],
            "dtype": self.store.config["harvest"]["dtype"],
        }

    def _mask(self, block: int) -> Bool[Tensor, "sequence context"]:
        return text_mask(self.store.tokens(*self._bounds(block)), self.store.special_ids)

    def _bounds(self, block: int) -> tuple[int, int]:
        start = block * self.sequences_per_block
        return start, min(start + self.sequences_per_block, self.store.n_sequences)


class ModelSource:
    """Blocks of a `TokenDataset` run through the model when they are read: training with nothing on the disk."""

    def __init__(
        self, model: HookedModel, dataset: TokenDataset, hook_name: str, *, sequences_per_block: int = 16
    ) -> None:
        [name] = model.resolve(hook_name)
        self.model, self.dataset, self.hook_name, self.model_name = model, dataset, str(name), model.name
        self.sequences_per_block = sequences_per_block
        self.n_blocks = -(-dataset.n_sequences // sequences_per_block)
        probe = model.activations(self._tokens(0)[:1, :2], self.hook_name)
        self.d = probe[self.hook_name][0, 0].numel()

    @cached_property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return np.array([int(text_mask(self._tokens(b), self.dataset.special_ids).sum()) for b in range(self.n_blocks)])

    @torch.no_grad()
    def read(self, block: int) -> Float[Tensor, "row d"]:
        tokens = self._tokens(block)
        activations = self.model.activations(tokens, self.hook_name)[self.hook_name].flatten(2)
        return activations[text_mask(tokens, self.dataset.special_ids).to(activations.device)]

    def describe(self) -> JsonObject:
        return {
            "kind": "model",
            "hook_name": self.hook_name,
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
