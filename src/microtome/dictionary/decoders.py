"""What a stack's latents write: each member its own output, or each layer its own and all later ones.

A *member* of a stack is a dictionary of its own (`OwnDecoder`) or one layer of a cross-layer transcoder
(`CrossLayerDecoder`). What a member's latents write lies in its *span*: its own output, or the outputs of its layer and
all later ones, one behind the other. The norm of a latent is that of its row over the whole span; where the span is
several points of a crosscoder it is the sum of the points' norms (Lindsey et al. 2024, "Sparse Crosscoders").
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.common.device import generator
from microtome.dictionary.kept import DenseKept, Entries, Kept, SparseKept


def point_norms(W_dec: Float[Tensor, "*S F d_out"], widths: Sequence[int]) -> Float[Tensor, "*S F point"]:
    """The norm of each row in each of the points that lie one behind the other along its columns."""
    return torch.stack([piece.norm(dim=-1) for piece in W_dec.split(list(widths), dim=-1)], dim=-1)


class Decoder(nn.Module, ABC):
    """The decoder rows of S members of `d_sae` latents; `separate` says whether members are dictionaries of their own."""

    separate: bool

    @abstractmethod
    def draw(self, seeds: Sequence[int], norm: float) -> None:
        """Random rows of this norm, from a seed for each member."""

    @abstractmethod
    def norms(self) -> Float[Tensor, "S F"]:
        """The norm of each latent."""

    @abstractmethod
    def decode(self, values: Entries, kept: Kept, *, frozen: bool = False) -> Float[Tensor, "S n d_out"]:
        """What the kept entries write, without b_dec; with `frozen` the decoder is a constant."""

    @abstractmethod
    def place(self, member: int) -> tuple[nn.Parameter, tuple[int, ...]]:
        """The parameter that holds a member's rows `[F, span]`, and the index of the member in it."""

    @abstractmethod
    def span(self, outputs: Float[Tensor, "S n d_out"], member: int) -> Float[Tensor, "n span"]:
        """Of the rows of all outputs, what a member can write."""

    @abstractmethod
    def row_weights(self, weights: Float[Tensor, "S n"], member: int) -> Float[Tensor, " n"]:
        """How much each row counts for a member, given how much it counts for each output."""

    @abstractmethod
    def take_out_growth(self) -> None:
        """Take out of the gradient what would only change a row's length (Bricken et al. 2023)."""

    @abstractmethod
    def normalise(self) -> None:
        """Bring every row back to norm one."""

    def rows(self, member: int) -> Float[Tensor, "F span"]:
        """A member's decoder rows, with gradient."""
        parameter, index = self.place(member)
        return parameter[index] if index else parameter


class OwnDecoder(Decoder):
    """`W_dec` `[S, F, d_out]`; `widths` are those of the points that the output is made of."""

    separate = True

    def __init__(self, members: int, d_sae: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.W_dec = nn.Parameter(torch.zeros(members, d_sae, sum(widths)))

    @torch.no_grad()
    def draw(self, seeds: Sequence[int], norm: float) -> None:
        for member, seed in enumerate(seeds):
            shape = self.W_dec[member].shape
            self.W_dec[member] = torch.randn(shape, generator=generator(seed, "output")).to(self.W_dec.device)
        self.W_dec.mul_(norm / self.norms()[..., None])

    def norms(self) -> Float[Tensor, "S F"]:
        return point_norms(self.W_dec, self.widths).sum(-1)

    def decode(self, values: Entries, kept: Kept, *, frozen: bool = False) -> Float[Tensor, "S n d_out"]:
        return kept.decode(values, self.W_dec.detach() if frozen else self.W_dec)

    def place(self, member: int) -> tuple[nn.Parameter, tuple[int, ...]]:
        return self.W_dec, (member,)

    def span(self, outputs: Float[Tensor, "S n d_out"], member: int) -> Float[Tensor, "n span"]:
        return outputs[member]

    def row_weights(self, weights: Float[Tensor, "S n"], member: int) -> Float[Tensor, " n"]:
        return weights[member]

    def take_out_growth(self) -> None:
        _take_out_growth(self.W_dec, unit=len(self.widths) == 1)

    @torch.no_grad()
    def normalise(self) -> None:
        self.W_dec.div_(self.norms().clamp_min(1e-12)[..., None])


class CrossLayerDecoder(Decoder):
    """`W_dec[l]` `[F, (L − l) · d_out]`: what the latents of layer l write to the layers l, l + 1 …, whose norm is that
    of all of it together (Ameisen et al. 2025, "Circuit Tracing", methods)."""

    separate = False

    def __init__(self, layers: int, d_sae: int, d_out: int) -> None:
        super().__init__()
        self.layers, self.d_out = layers, d_out
        self.W_dec = nn.ParameterList([torch.zeros(d_sae, (layers - layer) * d_out) for layer in range(layers)])

    @torch.no_grad()
    def draw(self, seeds: Sequence[int], norm: float) -> None:
        for seed, rows in zip(seeds, self.W_dec, strict=True):
            rows.copy_(torch.randn(rows.shape, generator=generator(seed, "output")))
            rows.mul_(norm / rows.norm(dim=1, keepdim=True))

    def norms(self) -> Float[Tensor, "S F"]:
        return torch.stack([self.rows(layer).norm(dim=1) for layer in range(self.layers)])

    def decode(self, values: Entries, kept: Kept, *, frozen: bool = False) -> Float[Tensor, "S n d_out"]:
        n = kept.shape[1]
        outputs: list[Tensor] = []
        for layer, (part, mine) in enumerate(_by_member(values, kept)):
            rows = self.rows(layer).detach() if frozen else self.rows(layer)
            written = mine.decode(part, rows[None])[0].view(n, self.layers - layer, self.d_out).unbind(1)
            for later, piece in enumerate(written):
                if layer == 0:
                    outputs.append(piece)
                else:
                    outputs[layer + later] = outputs[layer + later] + piece
        return torch.stack(outputs)

    def place(self, member: int) -> tuple[nn.Parameter, tuple[int, ...]]:
        parameter = self.W_dec[member]
        assert isinstance(parameter, nn.Parameter)
        return parameter, ()

    def span(self, outputs: Float[Tensor, "S n d_out"], member: int) -> Float[Tensor, "n span"]:
        return outputs[member:].transpose(0, 1).flatten(1)

    def row_weights(self, weights: Float[Tensor, "S n"], member: int) -> Float[Tensor, " n"]:
        """A row that is an outlier at any of the outputs counts as little as there."""
        return weights[member:].amin(0)

    def take_out_growth(self) -> None:
        for rows in self.W_dec:
            _take_out_growth(rows, unit=True)

    @torch.no_grad()
    def normalise(self) -> None:
        for rows in self.W_dec:
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(1e-12))


@torch.no_grad()
def _take_out_growth(rows: Tensor, *, unit: bool) -> None:
    """Take out of the gradient of rows, which may be known to have norm one, what lies along them."""
    if rows.grad is not None:
        along = torch.einsum("...d,...d->...", rows.grad, rows)
        if not unit:
            along /= rows.norm(dim=-1).square().clamp_min(1e-12)
        rows.grad.addcmul_(along[..., None], rows, value=-1)


def _by_member(values: Entries, kept: Kept) -> list[tuple[Entries, Kept]]:
    """The entries of each member, as stacks of one. They are split all at once: the gradient of a piece taken out alone is
    of the size of the whole."""
    _, n, d_sae = kept.shape
    if isinstance(kept, DenseKept):
        return [(piece, kept.of_member(member)) for member, piece in enumerate(values.split(1))]
    assert isinstance(kept, SparseKept)
    starts = [0, *kept.ends]
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    pieces = zip(values.split(lengths), kept.latents.split(lengths), starts, strict=False)
    return [
        (
            piece,
            SparseKept(latents - member * d_sae, kept.starts[member * n : (member + 1) * n + 1] - first, (1, n, d_sae)),
        )
        for member, (piece, latents, first) in enumerate(pieces)
    ]
