"""The sparse products of training.

Shape legend: n activations (rows), k latents kept per row, F = d_sae latents, d = d_in. With k ≪ F only the encoder's
product over all latents is dense. Everything else works on the n·k kept entries:

- `decode`            x̂ = f W_dec                     a weighted sum of k decoder rows
- `sampled_products`  (x Wᵀ) at the kept entries       exact fp32 values where the selection was made in bf16; gradients
  of f
- `CodeTranspose`     fᵀ g                             the gradients of both weights, [F, d]
"""

import functools
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def decode(
    indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n d"]:
    """Each row's weighted sum of its k decoder rows."""
    return functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")


def sampled_products(
    indices: Int[Tensor, "n k"], x: Float[Tensor, "n d"], weight: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "n k"]:
    """x · weightᵀ at the given entries only."""
    pattern = _csr(indices, x.new_zeros(indices.numel()), len(weight))
    products: Tensor = torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values()
    return products.view_as(indices)


class CodeTranspose:
    """The kept entries sorted by latent, so that fᵀ g is one sparse product. Sorting once serves both weight
    gradients."""

    def __init__(self, indices: Int[Tensor, "n k"], d_sae: int) -> None:
        n, k = indices.shape
        self.n, self.d_sae = n, d_sae
        latents, self.order = torch.sort(indices.reshape(-1).int(), stable=True)
        self.rows = (self.order // k).int()
        counts = torch.bincount(latents, minlength=d_sae)
        self.starts = functional.pad(counts.cumsum(0), (1, 0)).int()

    def times(self, values: Float[Tensor, "n k"], g: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
        """fᵀ g for the codes with these values."""
        return _csr_tensor(self.starts, self.rows, values.reshape(-1)[self.order], (self.d_sae, self.n)) @ g


def latent_sums(indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int) -> Float[Tensor, " d_sae"]:
    """The sum of each latent's values over all rows."""
    return values.new_zeros(d_sae).index_add_(0, indices.reshape(-1), values.reshape(-1))


def _csr(indices: Int[Tensor, "n k"], values: Float[Tensor, " nk"], d_sae: int) -> Tensor:
    n, k = indices.shape
    starts = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=indices.device)
    return _csr_tensor(starts, indices.reshape(-1).int(), values, (n, d_sae))


def _csr_tensor(
    starts: Int[Tensor, " starts"], columns: Int[Tensor, " nk"], values: Float[Tensor, " nk"], shape: tuple[int, int]
) -> Tensor:
    """A CSR matrix of indices that are right by construction."""
    _take_the_notice()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@functools.cache
def _take_the_notice() -> None:
    """torch says once in a process that CSR tensors are in beta; users of a dictionary need not hear it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.zeros(0, dtype=torch.int32)
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), empty, torch.zeros(0), (1, 1), check_invariants=False
        )
