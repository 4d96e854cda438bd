"""The sparse products of training, on entries that are listed row by row.

Entry e belongs to column `columns[e]`; the entries of row i are `starts[i] … starts[i + 1] − 1`.

- `weighted_sums`     each row's weighted sum of weight rows               x̂ = f W_dec
- `sampled_products`  each entry's product of its row and its column       x Wᵀ where it is wanted, gradients of f
- `Transpose`         the same entries column by column                    fᵀ g, the gradients of both weights
"""

import functools
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def weighted_sums(
    columns: Int[Tensor, " m"],
    starts: Int[Tensor, " rows_and_one"],
    values: Float[Tensor, " m"],
    weight: Float[Tensor, "columns d"],
) -> Float[Tensor, "rows d"]:
    """Each row's sum of its entries' values times their columns' rows of `weight`."""
    return functional.embedding_bag(
        columns, weight, starts.to(columns.dtype), per_sample_weights=values, mode="sum", include_last_offset=True
    )


def sampled_products(
    columns: Int[Tensor, " m"],
    starts: Int[Tensor, " rows_and_one"],
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "columns d"],
) -> Float[Tensor, " m"]:
    """x · weightᵀ at the entries only."""
    _take_the_notice()
    pattern = torch.sparse_csr_tensor(
        starts.int(), columns.int(), x.new_zeros(len(columns)), (len(x), len(weight)), check_invariants=False
    )
    values: Tensor = torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values()
    return values


class Transpose:
    """The entries sorted by column, given the row of each."""

    def __init__(self, columns: Int[Tensor, " m"], rows: Int[Tensor, " m"], n_columns: int) -> None:
        found, self.order = torch.sort(columns.int(), stable=True)
        self.rows = rows[self.order]
        self.starts = functional.pad(torch.bincount(found, minlength=n_columns).cumsum(0), (1, 0))

    def times(self, values: Float[Tensor, " m"], g: Float[Tensor, "rows d"]) -> Float[Tensor, "columns d"]:
        """fᵀ g for the codes with these values."""
        return weighted_sums(self.rows, self.starts, values[self.order], g)


@functools.cache
def _take_the_notice() -> None:
    """torch says once in a process that CSR tensors are in beta; users of a dictionary need not hear it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), empty, torch.zeros(0), (1, 1), check_invariants=False
        )
