"""Auxiliary losses through which dead latents learn: they model what the live ones leave over.

`DeadLatents` are the dead latents of one member of a stack, with their weights and its rows; `aux` and `ghost` are the
two losses. New weights are the other way (`resampling.py`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.dictionary.kept import SparseKept
from microtome.dictionary.selection import top_k

# Up to this many dead latents for each one kept, dense products are quicker.
_DENSE_CANDIDATES = 3
_TINY = 1e-12


@dataclass(frozen=True)
class DeadLatents:
    """`candidates` are the dead latents of a dictionary with these weights (b_dec None: not taken from the input);
    `error` is what the live ones left, y − ŷ, a constant; `weights` say how much each row counts."""

    candidates: Int[Tensor, " c"]
    encoder: Float[Tensor, "F d_in"]
    W_dec: Float[Tensor, "F d_out"]
    b_enc: Float[Tensor, " F"]
    b_dec: Float[Tensor, " d_in"] | None
    x: Float[Tensor, "n d_in"]
    error: Float[Tensor, "n d_out"]
    weights: Float[Tensor, "n 1"]

    def aux(self, pre: Float[Tensor, "n F"], k: int) -> Float[Tensor, ""]:
        """Σ w‖e − ê‖² / Σ w‖e − ē‖², ê the decoding of the k largest dead pre-activations, without b_dec (Gao et al.
        2024, A.2). `pre` are the pre-activations of the selection."""
        k = min(k, len(self.candidates))
        kept = top_k(pre[:, self.candidates], k)
        decoded = self._dense(kept) if len(self.candidates) <= _DENSE_CANDIDATES * k else self._sparse(kept)
        mean = (self.weights * self.error).sum(0) / self.weights.sum()
        spread = (self.weights * (self.error - mean).square()).sum().clamp_min(_TINY)
        missed = (self.weights * (decoded - self.error).square()).sum()
        loss: Tensor = missed / spread
        return loss

    def ghost(self) -> Float[Tensor, ""]:
        """The dead latents with exponential activations, scaled to half the error's norm, against the error; the loss
        is scaled to the size of the reconstruction's (Jermyn and Templeton 2024, Anthropic's update of January)."""
        encoder, W_dec, b_enc = self._weights()
        codes = (self._centred() @ encoder.T + b_enc).clamp_max(10.0).exp()
        ghost = codes @ W_dec
        scale = self.error.norm(dim=1, keepdim=True) / (2 * ghost.norm(dim=1, keepdim=True)).clamp_min(_TINY)
        missed = (self.weights * (ghost * scale.detach() - self.error).square()).sum()
        spread = (self.weights * (self.error - self.error.mean(0)).square()).sum().clamp_min(_TINY)
        main = (self.weights * self.error.square()).sum() / spread
        relative = missed / spread
        loss: Tensor = relative * (main / relative.clamp_min(_TINY)).detach()
        return loss

    def _dense(self, kept: Int[Tensor, "n k"]) -> Float[Tensor, "n d_out"]:
        encoder, W_dec, b_enc = self._weights()
        codes = functional.linear(self._centred(), encoder, b_enc).relu()
        return (codes * torch.zeros_like(codes).scatter_(1, kept, 1.0)) @ W_dec

    def _sparse(self, kept: Int[Tensor, "n k"]) -> Float[Tensor, "n d_out"]:
        entries = SparseKept.of_indices(self.candidates[kept][None], len(self.encoder))
        b_dec = None if self.b_dec is None else self.b_dec[None]
        values = entries.products(self.x[None], b_dec, self.encoder[None]) + entries.latent(self.b_enc[None])
        return entries.decode(values.relu(), self.W_dec[None])[0]

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        take = self.candidates
        return self.encoder.index_select(0, take), self.W_dec.index_select(0, take), self.b_enc.index_select(0, take)

    def _centred(self) -> Float[Tensor, "n d_in"]:
        return self.x if self.b_dec is None else self.x - self.b_dec
