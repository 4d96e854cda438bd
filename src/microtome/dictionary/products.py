"""The sparse products of training, on entries that are listed row by row.

Entry e belongs to column `columns[e]`; the entries of row i are `starts[i] … starts[i + 1] − 1`.

- `weighted_sums`     each row's weighted sum of weight rows               x̂ = f W_dec
- `sampled_products`  each entry's product of its row and its column       x Wᵀ where it is wanted, gradients of f
- `Transpose`         the same entries column by column                    fᵀ g, the gradients of both weights

On a GPU the first two are Triton kernels (`kernels.py`), and so the third, which is the first over sorted entries. Without
a GPU, or without Triton, they are torch's own products. No gradient goes through any of them: `kept.py` has the gradients.
"""

import functools
import importlib.util
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
    if _by_kernels(weight):
        from microtome.dictionary import kernels

        return kernels.weighted_sums(columns, starts, values, weight)
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
    if _by_kernels(weight):
        from microtome.dictionary import kernels

        return kernels.sampled_products(columns, starts, x, weight)
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
        self.columns, self.rows = columns, rows[self.order]
        self.starts = starts_of(found, n_columns)

    def times(self, values: Float[Tensor, " m"], g: Float[Tensor, "rows d"]) -> Float[Tensor, "columns d"]:
        """fᵀ g for the codes with these values."""
        return weighted_sums(self.rows, self.starts, values[self.order], g)

    def sums(self, values: Float[Tensor, " m"]) -> Float[Tensor, " columns"]:
        """Each column's sum. On a GPU `index_add` would add in an order that differs from run to run."""
        if not _by_kernels(values):
            return values.new_zeros(len(self.starts) - 1).index_add(0, self.columns, values)
        one = values.new_ones(1, 1)
        return weighted_sums(torch.zeros_like(self.rows), self.starts, values[self.order], one).squeeze(1)


def starts_of(groups: Int[Tensor, " m"], n_groups: int) -> Int[Tensor, " groups_and_one"]:
    """Where each group begins, of entries sorted by group; last the end of all. Unlike `bincount`, it does not wait for a
    GPU."""
    counts = torch.zeros(n_groups + 1, dtype=torch.int64, device=groups.device)
    return counts.index_add_(0, groups + 1, torch.ones_like(groups, dtype=torch.int64)).cumsum(0)


def _by_kernels(weight: Tensor) -> bool:
    """Whether the kernels compute products with this weight: the one place where this is decided."""
    return weight.is_cuda and _kernels_run_on(weight.device)


@functools.cache
def _kernels_run_on(device: torch.device) -> bool:
    """Whether Triton is there and can compile for the device, for which it needs a C compiler. A warning says why not."""
    if importlib.util.find_spec("triton") is None:
        return False
    one = torch.ones(1, 1, device=device)
    try:
        from microtome.dictionary import kernels

        kernels.weighted_sums(one[0].long() - 1, torch.arange(2, device=device), one[0], one)
    except Exception as error:  # compilers fail in ways of their own
        warnings.warn(
            f"Triton is installed and cannot compile for {device} ({type(error).__name__}: {error}); torch's own sparse "
            "products take its place",
            stacklevel=3,
        )
        return False
    return True


@functools.cache
def _take_the_notice() -> None:
    """torch says once in a process that CSR tensors are in beta; users of a dictionary need not hear it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), empty, torch.zeros(0), (1, 1), check_invariants=False
        )
