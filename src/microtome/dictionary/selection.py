"""Which latents are kept: the k largest of each row, or the largest of a whole batch.

Both have a plain way, `torch.topk`, and on a CPU a quick one with the same result (`Groups`): most latents lie in groups
whose largest is below an edge that is known early, and are not looked at again.

1. The largest of each group of 8 latents, a tenth of the work of anything that looks at each latent by itself.
2. The k-th largest of these is not above the k-th largest of all: an edge.
3. Latents at or above the edge, from the groups that reach it: some per cent more than are wanted. Of these, the largest.

Floats are compared as integers of their bits, which is quicker and for positive ones the same. Negative latents come out
in no order, which is as good: what is selected goes through a ReLU.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROUP = 8
_COARSE = 4  # so many groups for each latent that is wanted are enough to find an edge
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, "n k"]:
    """The indices of the k largest pre-activations of each row, in no order. Where fewer than k are positive, the rest are
    any others."""
    groups = Groups.of(pre, k)
    found = None if groups is None else groups.top_k(k)
    return pre.topk(k, dim=1, sorted=False).indices if found is None else found


def batch_top_k(pre: Float[Tensor, "n d_sae"], k: int) -> Int[Tensor, " m"]:
    """The places (row · d_sae + latent), row by row, of the `k` largest positive pre-activations of the whole batch (fewer, if
    fewer are positive; where many are equal to the smallest of them, as can be in bf16, a few more)."""
    groups = Groups.of(pre, -(-k // max(1, len(pre))))
    if groups is not None:
        return groups.batch_top_k(k)
    flat = pre.reshape(-1)
    edge = flat.topk(min(k, len(flat)), sorted=False).values.min()
    return ((flat >= edge) & (flat > 0)).nonzero().squeeze(1)


class Groups:
    """Pre-activations as integers, `keys` `[n, d_sae]`, and the `maxima` `[n, groups]` of their groups. Latents g, g + groups,
    g + 2 groups … are one group."""

    def __init__(self, keys: Int[Tensor, "n d_sae"]) -> None:
        self.keys = keys
        self.maxima = keys.view(len(keys), _GROUP, -1).amax(1)

    @classmethod
    def of(cls, pre: Float[Tensor, "n d_sae"], k: int) -> "Groups | None":
        """The groups, where they make the selection of k latents a row quicker."""
        d_sae = pre.shape[1]
        quick = pre.device.type == "cpu" and pre.dtype in _BITS and pre.is_contiguous()
        fits = d_sae % _GROUP == 0 and d_sae >= _COARSE * _GROUP * k and 0 < pre.numel() < 1 << 31
        return cls(pre.view(_BITS[pre.dtype])) if quick and fits else None

    def reaching(self, edges: Int[Tensor, "rows 1"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """The places of the latents at or above their row's edge, row by row, and their keys."""
        n, n_groups = self.maxima.shape
        d_sae = self.keys.shape[1]
        group = (self.maxima >= edges).view(-1).nonzero().int()
        row = group // n_groups
        places = row * (d_sae - n_groups) + group + torch.arange(0, d_sae, n_groups, dtype=torch.int32)
        keys = self.keys.view(-1).index_select(0, places.view(-1)).view_as(places)
        inside = (keys >= edges.expand(n, 1)[row.squeeze(1)]).view(-1).nonzero().squeeze(1)
        return places.view(-1)[inside].long(), keys.view(-1)[inside]

    def top_k(self, k: int) -> Int[Tensor, "n k"] | None:
        """The columns of the k largest of each row; None where so many are equal that this way is not the quicker one."""
        n, d_sae = self.keys.shape
        coarse = self.maxima
        while coarse.shape[1] % 2 == 0 and coarse.shape[1] >= 2 * _COARSE * k:
            coarse = coarse.view(n, 2, -1).amax(1)
        places, keys = self.reaching(coarse.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True))
        rows = places // d_sae
        counts = torch.bincount(rows, minlength=n)
        starts = counts.cumsum(0) - counts
        width = int(counts.max())
        if width > d_sae // 4:
            return None
        side_by_side = keys.new_full((n * width,), torch.iinfo(keys.dtype).min)
        side_by_side[rows * width + torch.arange(len(rows)) - starts[rows]] = keys
        chosen = side_by_side.view(n, width).topk(k, dim=1, sorted=False).indices
        return places[starts[:, None] + chosen] % d_sae

    def batch_top_k(self, k: int) -> Int[Tensor, " m"]:
        """The places of the k largest positive ones of the batch, and of those equal to the smallest of them."""
        places, keys = self.reaching(_edge(self.maxima.view(-1), k).view(1, 1))
        return places[keys >= _edge(keys, k)]


def _edge(keys: Int[Tensor, " m"], k: int) -> Int[Tensor, ""]:
    """The k-th largest key, at least that of the smallest positive number."""
    if keys.dtype == torch.int32:
        return keys.topk(min(k, len(keys)), sorted=False).values.min().clamp_min(1)
    counts = torch.bincount(keys.clamp_min(0).int(), minlength=1 << 15).flip(0).cumsum(0)
    return ((1 << 15) - 1 - torch.searchsorted(counts, k)).clamp_min(1).to(keys.dtype)
