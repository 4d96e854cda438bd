"""The sparse products of training (`products.py`) as Triton kernels, for GPUs. Only importing this module needs Triton.

- `weighted_sums`     one program for each row and block of columns of `weight`: it walks along the row's entries, a tile at a time
- `sampled_products`  one program for each tile of entries, whatever rows they are of: it walks along d

Both gather rows of `weight`, multiply in fp32 and write every result once, so there are no atomic additions, and the same
input gives the same bits. The gradient of a weight is `weighted_sums` over entries sorted by column, one program for each
column and block. Columns are not split any further, though some latents fire on many rows and most on few: d is split
already, and no column has more entries than the batch has rows, so the longest program takes n / 16 short steps.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_TILE = 16  # entries that are gathered at a time
_BLOCK = 128  # numbers of each that are gathered at a time


def weighted_sums(
    columns: Int[Tensor, " m"],
    starts: Int[Tensor, " rows_and_one"],
    values: Float[Tensor, " m"],
    weight: Float[Tensor, "columns d"],
) -> Float[Tensor, "rows d"]:
    """Each row's sum of its entries' values times their columns' rows of `weight`, in fp32."""
    rows, d = len(starts) - 1, weight.shape[1]
    sums = weight.new_empty(rows, d, dtype=torch.float32)
    if sums.numel():
        tensors = (each.contiguous() for each in (columns, starts, values, weight))
        with torch.cuda.device_of(weight):
            _weighted_sums[rows, triton.cdiv(d, _BLOCK)](*tensors, sums, d, TILE=_TILE, BLOCK=_BLOCK)
    return sums


def sampled_products(
    columns: Int[Tensor, " m"],
    starts: Int[Tensor, " rows_and_one"],
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "columns d"],
) -> Float[Tensor, " m"]:
    """x · weightᵀ at the entries only, in fp32."""
    m, d = len(columns), weight.shape[1]
    products = x.new_empty(m, dtype=torch.float32)
    if m:
        numbers = torch.arange(len(x), device=x.device)
        rows = torch.repeat_interleave(numbers, starts.diff(), output_size=m)
        tensors = (each.contiguous() for each in (columns, rows, x, weight))
        with torch.cuda.device_of(weight):
            _sampled_products[(triton.cdiv(m, _TILE),)](*tensors, products, m, d, TILE=_TILE, BLOCK=_BLOCK)
    return products


@triton.jit
@no_type_check
def _weighted_sums(columns, starts, values, weight, sums, d, TILE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < d
    first, stop = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for begin in range(first, stop, TILE):
        entry = begin + tl.arange(0, TILE)
        there = entry < stop
        column = tl.load(columns + entry, mask=there, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
        gathered = tl.load(
            weight + column[:, None] * d + place[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        total += value[:, None] * gathered.to(tl.float32)
    tl.store(sums + row * d + place, tl.sum(total, axis=0), mask=inside)


@triton.jit
@no_type_check
def _sampled_products(columns, rows, x, weight, products, m, d, TILE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: PLR0913, PLR0917
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = entry < m
    column = tl.load(columns + entry, mask=there, other=0).to(tl.int64)
    row = tl.load(rows + entry, mask=there, other=0).to(tl.int64)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for begin in range(0, d, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        mask = there[:, None] & (place < d)[None, :]
        left = tl.load(x + row[:, None] * d + place[None, :], mask=mask, other=0.0).to(tl.float32)
        right = tl.load(weight + column[:, None] * d + place[None, :], mask=mask, other=0.0).to(tl.float32)
        total += left * right
    tl.store(products + entry, tl.sum(total, axis=1), mask=there)
