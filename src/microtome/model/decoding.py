"""Attention for decoding one token at a time with grouped queries, without copying keys and values for every query
head.

The library's SDPA path repeats each key/value head for all its query heads, which for a large batch moves more memory
than everything else in a step. Here the query heads of a group become rows of one product with their key/value head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "microtome_grouped_decoding"


@contextmanager
def grouped_decoding(hf: PreTrainedModel) -> Iterator[None]:
    """Within the block `hf` decodes single tokens with `grouped_attention`; longer inputs take SDPA as before."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    before = hf.config._attn_implementation  # noqa: SLF001 - the library has no public name for it
    hf.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of queries `[batch, heads, 1, d_head]` over keys and values `[batch, kv_heads, pos, d_head]`."""
    batch, heads, n, d_head = query.shape
    if n > 1:
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
        return output, None
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, d_head)
    scores = grouped @ key.transpose(2, 3) * (d_head**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if is_bool else scores + attention_mask
    pattern = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (pattern @ value).view(batch, 1, heads, d_head), None
