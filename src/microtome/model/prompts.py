"""Prompts: from text to token ids and back, with the tokenizer's own BOS and padding that cannot change a result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from microtome.common.errors import InputError
from microtome.model.specs import ModelConfig
from microtome.text import bos

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Prompts:
    """Token ids `[batch, pos]`, and which of them are there (`mask`) where texts of unequal length are padded."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None

    @property
    def positions(self) -> Int[Tensor, "batch pos"] | None:
        """Each token's place in its own text, counted without padding; None where all rows are whole."""
        return None if self.mask is None else (self.mask.long().cumsum(-1) - 1).clamp_min(0)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, prepend_bos: bool, side: Side) -> Prompts:
    """Texts as one padded batch. Raises InputError for an empty text."""
    if not texts or not all(texts):
        raise InputError("There is nothing to run: a text is empty", got=list(texts))
    rows = bos.encode(tokenizer, list(texts), bos=bos.AUTO if prepend_bos else bos.NONE)
    ids, present = bos.pad(rows, bos.pad_id(tokenizer), side=side)
    mask = torch.from_numpy(present).bool()
    return Prompts(torch.from_numpy(ids), None if mask.all() else mask)


def checked(tokens: Tensor, config: ModelConfig, name: str) -> Int[Tensor, "batch pos"]:
    """Token ids as `[batch, pos]`. Raises InputError for ids that the model cannot run."""
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise InputError("Tokens must be integers [batch, pos]", got=f"{tokens.dtype} {list(tokens.shape)}")
    if tokens.shape[1] > config.n_ctx:
        raise InputError(
            "The context is longer than the model's",
            got=f"{tokens.shape[1]} tokens",
            expected=f"at most {config.n_ctx}",
        )
    low, high = tokens.aminmax()
    if low < 0 or high >= config.d_vocab:
        raise InputError(
            f"Tokens outside the vocabulary of {name}",
            got=f"ids from {int(low)} to {int(high)}",
            expected=f"0 to {config.d_vocab - 1}",
        )
    return tokens
