"""The latents that a training step keeps, and the products through them, with gradients.

Shape legend: S dictionaries of one shape (a *stack*), n activations (rows), F = d_sae latents, d the width; m kept
entries, an entry being one latent of one member on one row. With m ≪ S·n·F only the product that selects latents is
dense. Everything else works on the kept entries, and autograd sees two operations:

- `pre_activations`  (x − b_dec) · encoder + b_enc at the kept entries    exact fp32, where the selection was made in bf16
- `decode`           x̂ = f W_dec                                          a weighted sum of decoder rows

`DenseKept` is the same on whole matrices, in the dtype of the selection: quicker where many latents fire, as they do
early in a training with an L1 penalty. A number for each entry is `[m]` in the one and `[S, n, F]` in the other;
losses are written once, for both. For whole matrices in bf16 on a CPU, arithmetic (`fires`) is quicker than a comparison
and a mask of bools.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.dictionary.products import Transpose, sampled_products, starts_of, weighted_sums
from microtome.dictionary.selection import PreActivations, is_positive, kth_largest

Entries = Float[Tensor, "..."]
# Into how many pieces of rows a step on whole matrices goes. Each adds its share to the gradients of the weights:
# on a CPU ReLU takes a tenth longer in eight than in four, and holds a tenth less memory. Not measured on a GPU.
_PIECES, _PIECES_ON_GPU = 8, 4
_FEW = 128  # rows
_LATENTS = 512  # whose gradients are still in a CPU's cache


@runtime_checkable
class Kept(Protocol):
    """Which latents are kept on each row. `Entries` are a number for each of them."""

    shape: tuple[int, int, int]

    def pieces(self) -> "Iterator[tuple[slice, Kept]]":
        """Groups of rows, of which one at a time takes little memory."""

    def pre_activations(
        self,
        x: Float[Tensor, "s n d"],
        b_dec: Float[Tensor, "S d"] | None,
        encoder: Float[Tensor, "S F d"],
        b_enc: Float[Tensor, "S F"],
    ) -> Entries:
        """(x − b_dec) · encoder + b_enc at the entries; `x` of one member stands for all."""

    def decode(self, values: Entries, W_dec: Float[Tensor, "S F d"]) -> Float[Tensor, "S n d"]:
        """Each row's weighted sum of decoder rows."""

    def latent(self, numbers: Float[Tensor, "S F"]) -> Entries:
        """Each entry's number of its latent."""

    def row(self, numbers: Float[Tensor, "S n"]) -> Entries:
        """Each entry's number of its row."""

    def member_sums(
        self, values: Entries, rows: Float[Tensor, "S n"] | None = None, latents: Float[Tensor, "S F"] | None = None
    ) -> Float[Tensor, " S"]:
        """The sum over each member's entries, each times its row's and its latent's number (where there are any)."""

    def latent_sums(self, values: Entries) -> Float[Tensor, "S F"]:
        """The sum over each latent's entries."""

    def firings(self, values: Entries) -> Float[Tensor, "S F"]:
        """How many entries of each latent are positive."""

    def member_minima(self, values: Entries) -> Float[Tensor, " S"]:
        """The smallest positive value of each member; infinity where there is none."""

    def edges(self, values: Entries, k: int) -> Entries:
        """For each entry, the k-th largest value of its member (its smallest, if it has fewer)."""

    def within(self, first: int, stop: int) -> "tuple[Kept, Int[Tensor, ' part'] | slice]":
        """The entries of latents `first … stop − 1` alone, and how to take their numbers from those of all."""


class SparseKept:
    """Entries in the order of their rows: `latents` `[m]` numbers latents through the stack (member · F + latent),
    `starts` `[S·n + 1]` says where each row's entries begin; `of` are each member's latents among which they are, if not
    all: such parts are for decoding alone."""

    def __init__(
        self,
        latents: Int[Tensor, " m"],
        starts: Int[Tensor, " rows_and_one"],
        shape: tuple[int, int, int],
        of: slice | None = None,
    ) -> None:
        self.latents, self.starts, self.shape, self.of = latents, starts, shape, of

    @classmethod
    def of_indices(cls, indices: Int[Tensor, "S n k"], d_sae: int) -> "SparseKept":
        """k latents on every row."""
        members, n, k = indices.shape
        starts = torch.arange(0, members * n * k + 1, k, device=indices.device)
        return cls(_through_the_stack(indices, d_sae).reshape(-1), starts, (members, n, d_sae))

    @classmethod
    def of_places(cls, places: Int[Tensor, " m"], shape: tuple[int, int, int]) -> "SparseKept":
        """The latents at these places of a stack's pre-activations, counted through, row by row."""
        members, n, d_sae = shape
        rows = places // d_sae
        starts = torch.searchsorted(rows, torch.arange(members * n + 1, device=places.device))
        return cls(places % d_sae + rows // n * d_sae, starts, shape)

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "S n F"]) -> "SparseKept":
        """The latents where `mask` is true."""
        members, n, d_sae = mask.shape
        return cls.of_places(mask.view(-1).nonzero().squeeze(1), (members, n, d_sae))

    @cached_property
    def rows(self) -> Int[Tensor, " m"]:
        """The row of each entry, numbered through the stack."""
        counts = self.starts.diff()
        rows = torch.arange(len(counts), device=self.latents.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.latents))

    @cached_property
    def ends(self) -> list[int]:
        """Where each member's entries end. A GPU is waited for."""
        ends: list[int] = self.starts[self.shape[1] :: self.shape[1]].tolist()
        return ends

    @cached_property
    def transpose(self) -> Transpose:
        """The entries in the order of their latents, those among which they are; one sorting serves both weight gradients."""
        members, _, d_sae = self.shape
        if self.of is None:
            return Transpose(self.latents, self.rows, members * d_sae)
        width, member = self.of.stop - self.of.start, self.latents // d_sae
        return Transpose(self.latents % d_sae - self.of.start + member * width, self.rows, members * width)

    def pieces(self) -> Iterator[tuple[slice, Kept]]:
        yield slice(None), self

    def pre_activations(
        self,
        x: Float[Tensor, "s n d"],
        b_dec: Float[Tensor, "S d"] | None,
        encoder: Float[Tensor, "S F d"],
        b_enc: Float[Tensor, "S F"],
    ) -> Float[Tensor, " m"]:
        values: Tensor = _PreActivations.apply(x, b_dec, encoder, b_enc, self)  # type: ignore[no-untyped-call]
        return values

    def decode(self, values: Float[Tensor, " m"], W_dec: Float[Tensor, "S F d"]) -> Float[Tensor, "S n d"]:
        decoded: Tensor = _Decode.apply(values, W_dec, self)  # type: ignore[no-untyped-call]
        return decoded

    def latent(self, numbers: Float[Tensor, "S F"]) -> Float[Tensor, " m"]:
        return numbers.reshape(-1).index_select(0, self.latents)

    def row(self, numbers: Float[Tensor, "S n"]) -> Float[Tensor, " m"]:
        return numbers.reshape(-1).index_select(0, self.rows)

    def member_sums(
        self,
        values: Float[Tensor, " m"],
        rows: Float[Tensor, "S n"] | None = None,
        latents: Float[Tensor, "S F"] | None = None,
    ) -> Float[Tensor, " S"]:
        members, n, _ = self.shape
        values = values if rows is None else values * self.row(rows)
        values = values if latents is None else values * self.latent(latents)
        if members == 1:
            return values.sum().view(1)
        return values.new_zeros(members).index_add(0, self.rows // n, values)

    def latent_sums(self, values: Float[Tensor, " m"]) -> Float[Tensor, "S F"]:
        members, _, d_sae = self.shape
        return values.new_zeros(members * d_sae).index_add(0, self.latents, values).view(members, d_sae)

    def firings(self, values: Float[Tensor, " m"]) -> Float[Tensor, "S F"]:
        return self.latent_sums(fires(values))

    def member_minima(self, values: Float[Tensor, " m"]) -> Float[Tensor, " S"]:
        members, n, _ = self.shape
        positive = torch.where(values > 0, values, torch.inf)
        return positive.new_full((members,), torch.inf).scatter_reduce(0, self.rows // n, positive, "amin")

    def edges(self, values: Float[Tensor, " m"], k: int) -> Float[Tensor, "..."]:
        members, n, _ = self.shape
        ends = [len(values)] if members == 1 else self.ends
        pieces = [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        edges = torch.stack([_edge(piece, k) for piece in pieces])
        return edges if members == 1 else edges[self.rows // n]

    def within(self, first: int, stop: int) -> "tuple[SparseKept, Int[Tensor, ' part']]":
        members, n, d_sae = self.shape
        latents = self.latents % d_sae
        part = ((latents >= first) & (latents < stop)).nonzero().squeeze(1)
        starts = starts_of(self.rows[part], members * n)
        return SparseKept(self.latents[part], starts, self.shape, slice(first, stop)), part


class DenseKept:
    """Every latent of every row, or those where `mask` is true, given the selection's pre-activations `pre`, in whose dtype
    all is computed."""

    def __init__(self, pre: PreActivations, mask: Bool[Tensor, "S n F"] | None = None) -> None:
        self.shape, self.pre, self.mask = pre.shape, pre, mask

    def pieces(self) -> Iterator[tuple[slice, Kept]]:
        n = self.shape[1]
        at_once = max(_FEW, -(-n // (_PIECES_ON_GPU if self.pre.device.type == "cuda" else _PIECES)))
        for first in range(0, n, at_once):
            some = slice(first, first + at_once)
            yield some, DenseKept(self.pre.of_rows(some), None if self.mask is None else self.mask[:, some])

    def of_member(self, member: int) -> "DenseKept":
        """The entries of one member, as a stack of one."""
        return DenseKept(self.pre.of_member(member), None if self.mask is None else self.mask[member : member + 1])

    def pre_activations(
        self,
        x: Float[Tensor, "s n d"],
        b_dec: Float[Tensor, "S d"] | None,
        encoder: Float[Tensor, "S F d"],
        b_enc: Float[Tensor, "S F"],
    ) -> Float[Tensor, "S n F"]:
        values: Tensor = _DensePreActivations.apply(x, b_dec, encoder, b_enc, self)  # type: ignore[no-untyped-call]
        return values

    def decode(self, values: Float[Tensor, "S n F"], W_dec: Float[Tensor, "S F d"]) -> Float[Tensor, "S n d"]:
        decoded: Tensor = _DenseDecode.apply(self._masked(values), W_dec, self.pre.cast(W_dec))  # type: ignore[no-untyped-call]
        return decoded

    def latent(self, numbers: Float[Tensor, "S F"]) -> Float[Tensor, "S 1 F"]:
        return numbers[:, None].to(self.pre.dtype)

    def row(self, numbers: Float[Tensor, "S n"]) -> Float[Tensor, "S n 1"]:
        return numbers[:, :, None].to(self.pre.dtype)

    def member_sums(
        self,
        values: Float[Tensor, "S n F"],
        rows: Float[Tensor, "S n"] | None = None,
        latents: Float[Tensor, "S F"] | None = None,
    ) -> Float[Tensor, " S"]:
        # A product with the rows' numbers reads all entries once; its gradient is written once.
        counts = values.new_ones(self.shape[0], 1, self.shape[1]) if rows is None else self.row(rows).mT
        sums = (counts @ self._masked(values)).squeeze(1).float()
        return (sums if latents is None else sums * latents).sum(1)

    def latent_sums(self, values: Float[Tensor, "S n F"]) -> Float[Tensor, "S F"]:
        return self._masked(values).sum(1).float()

    def firings(self, values: Float[Tensor, "S n F"]) -> Float[Tensor, "S F"]:
        # Bytes are added quickly; 255 ones are as many as one holds.
        ones = is_positive(self._masked(values)).view(torch.uint8).split(255, dim=1)
        return torch.stack([each.sum(1, dtype=torch.uint8).float() for each in ones]).sum(0)

    def member_minima(self, values: Float[Tensor, "S n F"]) -> Float[Tensor, " S"]:
        kept = self._masked(values)
        return torch.where(kept > 0, kept, torch.inf).amin((1, 2)).float()

    def edges(self, values: Float[Tensor, "S n F"], k: int) -> Float[Tensor, "S 1 1"]:
        return torch.stack([_edge(each.flatten(), k) for each in self._masked(values)])[:, None, None]

    def within(self, first: int, stop: int) -> "tuple[DenseKept, slice]":
        mask = torch.zeros(self.shape[2], dtype=torch.bool, device=self.pre.device)
        mask[first:stop] = True
        inside = mask.expand(self.shape) if self.mask is None else self.mask & mask
        return DenseKept(self.pre, inside), slice(None)

    def _masked(self, values: Float[Tensor, "S n F"]) -> Float[Tensor, "S n F"]:
        return values if self.mask is None else values * self.mask


def fires(values: Entries) -> Entries:
    """1 where a value is positive, else 0."""
    return where_positive(values.new_ones(()).expand_as(values), values.detach())


def where_positive(numbers: Entries, values: Entries, *, out: Entries | None = None) -> Entries:
    """The numbers where `values` are positive, else 0 (without gradient): the backward of a ReLU, in one pass. `out`, which may
    be one of the two, takes the result."""
    backward = torch.ops.aten.threshold_backward
    chosen: Tensor = (
        backward(numbers, values, 0) if out is None else backward.grad_input(numbers, values, 0, grad_input=out)
    )
    return chosen


class _PreActivations(torch.autograd.Function):
    """The encoder at the kept entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor | None, encoder: Tensor, b_enc: Tensor, kept: SparseKept) -> Tensor:
        assert kept.of is None, "parts of the latents are for decoding alone"
        ctx.save_for_backward(x, b_dec, encoder)
        ctx.kept = kept
        rows = _centred_rows(x, b_dec, kept.shape)
        return sampled_products(kept.latents, kept.starts, rows, encoder.flatten(0, 1)).add_(kept.latent(b_enc))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b_dec, encoder = ctx.saved_tensors
        rows = _centred_rows(x, b_dec, ctx.kept.shape)  # made again: quick, and a matrix less to hold until then
        grad_encoder = ctx.kept.transpose.times(grad, rows).view_as(encoder)
        sums = ctx.kept.transpose.sums(grad).view(encoder.shape[:2])
        return None, None if b_dec is None else _to_b_dec(sums, encoder), grad_encoder, sums, None


def _centred_rows(
    x: Float[Tensor, "s n d"], b_dec: Float[Tensor, "S d"] | None, shape: tuple[int, int, int]
) -> Float[Tensor, "rows d"]:
    """x − b_dec of every member, one below the other."""
    members, n, _ = shape
    centred = x if b_dec is None else x - b_dec[:, None]
    return centred.expand(members, n, -1).reshape(members * n, -1)


class _Decode(torch.autograd.Function):
    """The decoder's product from the kept entries."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, kept: SparseKept) -> Tensor:
        members, n, _ = kept.shape
        ctx.save_for_backward(values, W_dec)
        ctx.kept = kept
        return weighted_sums(kept.latents, kept.starts, values, W_dec.flatten(0, 1)).view(members, n, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        kept, rows = ctx.kept, grad.flatten(0, 1).contiguous()
        grad_values = sampled_products(kept.latents, kept.starts, rows, W_dec.flatten(0, 1))
        return grad_values, _decoder_gradient(W_dec, values, rows, kept) if ctx.needs_input_grad[1] else None, None


def _decoder_gradient(
    W_dec: Float[Tensor, "S F d"], values: Float[Tensor, " m"], rows: Float[Tensor, "rows d"], kept: SparseKept
) -> Float[Tensor, "S F d"] | None:
    """fᵀ · rows. That of some latents alone (a prefix of a Matryoshka dictionary) is added to their rows of `W_dec.grad` here,
    where a matrix of mostly zeros for each would take longer, and more memory; autograd, and hooks on W_dec, get None."""
    found = kept.transpose.times(values, rows).view(len(W_dec), -1, W_dec.shape[2])
    if kept.of is None:
        return found
    assert W_dec.is_leaf, "parts of the latents are decoded with the parameter itself"
    if W_dec.grad is None:
        W_dec.grad = torch.zeros_like(W_dec)
    W_dec.grad[:, kept.of].add_(found)
    return None


class _DensePreActivations(torch.autograd.Function):
    """The selection's pre-activations, with the gradients of the product that they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor | None, encoder: Tensor, b_enc: Tensor, kept: DenseKept) -> Tensor:
        centred = x if b_dec is None else x - b_dec[:, None]
        ctx.save_for_backward(centred.to(kept.pre.dtype), encoder)
        ctx.subtracted = b_dec is not None
        return kept.pre.take().detach()  # who has them for the selection keeps them without a gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, encoder = ctx.saved_tensors
        sums = grad.sum(1).float()
        of_encoder = _weight_gradient(encoder, grad, rows)
        return None, _to_b_dec(sums, encoder) if ctx.subtracted else None, of_encoder, sums, None


class _DenseDecode(torch.autograd.Function):
    """The decoder's product of whole matrices, given the decoder in their dtype too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight, W_dec)
        return (values @ weight).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, W_dec = ctx.saved_tensors
        rows = grad.to(values.dtype)
        return rows @ weight.mT, _weight_gradient(W_dec, values, rows) if ctx.needs_input_grad[1] else None, None


def _weight_gradient(
    weight: Float[Tensor, "S F d"], entries: Float[Tensor, "S n F"], rows: Float[Tensor, "s n d"]
) -> Float[Tensor, "S F d"] | None:
    """entriesᵀ · rows. Where the weight has a gradient of earlier rows, it is added to that at once: autograd would make it fp32
    first. On a CPU it is done for some latents at a time: torch makes a sum of bf16 and fp32 from an fp32 copy of the one."""
    found = weight.grad if weight.is_leaf else None
    gradient = weight.new_empty(weight.shape) if found is None else found
    at_once = weight.shape[1] if weight.is_cuda else _LATENTS
    for part, some in zip(gradient.split(at_once, 1), entries.split(at_once, 2), strict=True):
        product = some.mT @ rows
        part.copy_(product) if found is None else part.add_(product)
    return gradient if found is None else None


def _to_b_dec(sums: Float[Tensor, "S F"], encoder: Float[Tensor, "S F d"]) -> Float[Tensor, "S d"]:
    """The gradient of what is subtracted from all rows, given each latent's sum of gradients."""
    return -(sums[:, None] @ encoder).squeeze(1)


def _through_the_stack(indices: Int[Tensor, "S n k"], d_sae: int) -> Int[Tensor, "S n k"]:
    members = len(indices)
    return indices + torch.arange(0, members * d_sae, d_sae, device=indices.device)[:, None, None]


def _edge(values: Float[Tensor, " m"], k: int) -> Float[Tensor, ""]:
    """The k-th largest value, or the smallest if there are fewer (zero if there are none)."""
    if len(values) == 0:
        return values.new_zeros(())
    return kth_largest(values.detach(), k)
