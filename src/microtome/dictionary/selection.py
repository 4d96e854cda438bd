"""Which latents are kept: the k largest of each row, or the largest of a whole batch.

`PreActivations` are what is selected from. Both selections have a plain way, `torch.topk`, and on a CPU a quick one with
the same result, by the maxima of groups of latents. The k largest of a row lie in the k groups of largest maxima, and to
find these is the same task on fewer numbers. Those of a batch are at or above an edge that the maxima alone give, and most
groups do not reach it.

Floats are compared as integers of their bits, which is quicker and for positive ones the same. Negative latents come out
in no order, which is as good: what is selected goes through a ReLU. Such integers are chosen by numpy's partition, which on
one thread takes a fifth of the time of `torch.topk` on two; it gives values alone, so their columns are put into bits below.
"""

import copy
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_GROUP = 8  # latents, or groups, in a group
_COARSE = 2  # fewer groups than these for each latent that is wanted are not searched first
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_ROWS = 512  # a block of them, selected from at once, is still in a CPU's cache


class PreActivations:
    """`rows` · `encoder` + `b_enc` in the dtype of the selection, without gradient; `whole` `[S, n, F]` is made when it is first
    wanted."""

    def __init__(
        self,
        rows: Float[Tensor, "S n d_in"],
        encoder: Float[Tensor, "S F d_in"],
        b_enc: Float[Tensor, "S F"],
        dtype: torch.dtype,
    ) -> None:
        self._rows, self._weight = rows.detach().to(dtype), encoder.detach().to(dtype).mT
        self._bias = b_enc.detach()[:, None].to(dtype)
        self._casts: dict[tuple[int, torch.Size], Tensor] = {}  # by where the weights lie

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self._rows.shape[:2], self._weight.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @cached_property
    def whole(self) -> Float[Tensor, "S n F"]:
        return torch.baddbmm(self._bias, self._rows, self._weight)

    def cast(self, weight: Tensor) -> Tensor:
        """A weight in the dtype of the selection, without gradient, made once for all parts. It has to stay as it is while
        these pre-activations are used."""
        which = weight.data_ptr(), weight.shape
        if which not in self._casts:
            self._casts[which] = weight.detach().to(self.dtype)
        return self._casts[which]

    def take(self) -> Float[Tensor, "S n F"]:
        """The whole, which is then no longer kept here."""
        whole = self.whole
        del self.whole
        return whole

    def of_rows(self, rows: slice) -> "PreActivations":
        """Those of some rows, which are there if the whole is."""
        return self._part(rows, slice(None))

    def of_member(self, member: int) -> "PreActivations":
        """Those of one member, as a stack of one."""
        return self._part(slice(None), slice(member, member + 1))

    def blocks(self) -> Iterator[Float[Tensor, "S _ F"]]:
        """Some rows of every member at a time. On a CPU the whole is not made for it, unless it is there."""
        n = self.shape[1]
        at_once = n if self.device.type == "cuda" else _ROWS
        for first in range(0, n, at_once):
            yield self.of_rows(slice(first, first + at_once)).whole

    def _part(self, rows: slice, members: slice) -> "PreActivations":
        part = copy.copy(self)
        vars(part).update(_rows=self._rows[members, rows], _weight=self._weight[members], _bias=self._bias[members])
        if "whole" in vars(self):
            part.whole = self.whole[members, rows]
        return part


def top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The indices of the k largest pre-activations of each row, in no order. Where fewer than k are positive, the rest are
    any others."""
    if not _is_quick(pre):
        return pre.topk(k, dim=1, sorted=False).indices
    keys, finer = pre.view(_BITS[pre.dtype]), []
    while keys.shape[1] % _GROUP == 0 and keys.shape[1] >= _COARSE * _GROUP * k:
        finer.append(keys)
        keys = keys.view(len(keys), _GROUP, -1).amax(1)  # columns c, c + width, c + 2 width … are group c
    found = _largest(keys, k)
    for keys in reversed(finer):
        width = keys.shape[1] // _GROUP
        columns = (found[:, :, None] + torch.arange(0, keys.shape[1], width)).flatten(1)
        found = columns.gather(1, _largest(keys.gather(1, columns), k))
    return found


def batch_top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, " m"]:
    """The places (row · d_sae + latent), row by row, of the `k` largest positive pre-activations of the whole batch (fewer, if
    fewer are positive; where many are equal to the smallest of them, as can be in bf16, a few more)."""
    if _is_quick(pre) and pre.shape[1] % _GROUP == 0 and pre.numel() >= _COARSE * _GROUP * k:
        return _batch_by_groups(pre.view(_BITS[pre.dtype]), k)
    flat = pre.reshape(-1)
    edge = kth_largest(flat, k)
    return ((flat >= edge) & is_positive(flat)).nonzero().squeeze(1)


def kth_largest(values: Shaped[Tensor, " m"], k: int) -> Shaped[Tensor, ""]:
    """The k-th largest of some numbers, or the smallest if there are fewer."""
    k = min(k, len(values))
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.topk(k, sorted=False).values.min()
    return torch.from_numpy(np.partition(values.numpy(), len(values) - k))[len(values) - k]


def is_positive(values: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """values > 0."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values) > 0


def _is_quick(pre: Float[Tensor, "n d_sae"]) -> bool:
    """Whether it can be seen as integers, and groups are quicker."""
    return pre.device.type == "cpu" and pre.dtype in _BITS and pre.is_contiguous() and 0 < pre.numel() < 1 << 31


def _largest(keys: Int[Tensor, "n width"], k: int) -> Int[Tensor, "n k"]:
    """The columns of the k largest of each row."""
    width = keys.shape[1]
    dtype, bits = (torch.int32, 16) if keys.dtype == torch.int16 and width <= 1 << 16 else (torch.int64, 32)
    packed = keys.to(dtype).bitwise_left_shift_(bits).bitwise_or_(torch.arange(width, dtype=dtype))
    packed.numpy().partition(width - k, axis=1)
    return packed[:, width - k :].bitwise_and((1 << bits) - 1).long()


def _batch_by_groups(keys: Int[Tensor, "n d_sae"], k: int) -> Int[Tensor, " m"]:
    """The places of the k largest positive ones of the batch, and of those equal to the smallest of them. Latents g,
    g + groups, g + 2 groups … are group g of their row."""
    n, d_sae = keys.shape
    n_groups = d_sae // _GROUP
    maxima = keys.view(n, _GROUP, n_groups).amax(1).view(-1)
    edge = _edge(maxima, k)
    group = (maxima >= edge).nonzero().int()
    places = group // n_groups * (d_sae - n_groups) + group + torch.arange(0, d_sae, n_groups, dtype=torch.int32)
    reaching = keys.view(-1).index_select(0, places.view(-1))
    inside = (reaching >= edge).nonzero().squeeze(1)
    places, reaching = places.view(-1)[inside].long(), reaching[inside]
    return places[reaching >= _edge(reaching, k)]


def _edge(keys: Int[Tensor, " m"], k: int) -> Int[Tensor, ""]:
    """The k-th largest key, at least that of the smallest positive number."""
    if keys.dtype == torch.int32:
        return kth_largest(keys, k).clamp_min(1) if len(keys) else keys.new_ones(())
    counts = torch.bincount(keys.clamp_min(0).int(), minlength=1 << 15).flip(0).cumsum(0)
    return ((1 << 15) - 1 - torch.searchsorted(counts, k)).clamp_min(1).to(keys.dtype)
