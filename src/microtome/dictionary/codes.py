"""`SparseCodes`: which latents fire on each activation, and how strongly."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SparseCodes:
    """The latents that may fire on each row: `indices` and `values` `[n, k]`; a value of 0 is a place that is not used.
    Values below zero are of dictionaries whose latents fire in two directions (AbsTopK)."""

    indices: Int[Tensor, "n k"]
    values: Float[Tensor, "n k"]
    d_sae: int

    @classmethod
    def of_dense(cls, f: Float[Tensor, "n d_sae"]) -> "SparseCodes":
        """The entries of `f` that are not zero, with as many places as the fullest row needs (at least one)."""
        fires = f != 0
        counts = fires.sum(1)
        width = max(1, int(counts.max()) if len(f) else 1)
        rows, latents = fires.nonzero(as_tuple=True)
        place = torch.arange(len(rows), device=f.device) - (counts.cumsum(0) - counts)[rows]
        indices = latents.new_zeros(len(f), width)
        values = f.new_zeros(len(f), width)
        indices[rows, place], values[rows, place] = latents, f[rows, latents]
        return cls(indices, values, f.shape[1])

    def to_dense(self) -> Float[Tensor, "n d_sae"]:
        """The same as a dense matrix."""
        dense = self.values.new_zeros(len(self.values), self.d_sae)
        return dense.scatter_add_(1, self.indices, self.values)

    @property
    def l0(self) -> Float[Tensor, " n"]:
        """How many latents fire on each row."""
        return (self.values != 0).sum(1).to(self.values.dtype)

    def within(self, first: int, stop: int) -> "SparseCodes":
        """Of the latents `first` … `stop − 1` alone, numbered from zero."""
        inside = (self.indices >= first) & (self.indices < stop) & (self.values != 0)
        counts = inside.sum(1)
        rows, places = inside.nonzero(as_tuple=True)
        to = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        width = max(1, int(counts.max()) if len(counts) else 1)
        indices, values = (each.new_zeros(len(each), width) for each in (self.indices, self.values))
        indices[rows, to], values[rows, to] = self.indices[rows, places] - first, self.values[rows, places]
        return SparseCodes(indices, values, stop - first)

    def times(self, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
        """Each row's weighted sum of decoder rows, f W_dec."""
        return functional.embedding_bag(self.indices, W_dec, per_sample_weights=self.values, mode="sum")
