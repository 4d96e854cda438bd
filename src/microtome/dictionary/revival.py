"""What is done for dead latents: auxiliary losses through which they learn, and resampling.

`revival_loss` gives the loss of "aux" or "ghost" for each member of a stack; `resample` gives new weights.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.dictionary.kept import SparseKept
from microtome.dictionary.selection import top_k

if TYPE_CHECKING:
    from microtome.dictionary.stack import Stack

# Up to this many dead latents for each one kept, dense products are quicker.
_DENSE_CANDIDATES = 3
_TINY = 1e-12


def revival_loss(
    stack: "Stack",
    x: Float[Tensor, "s n d_in"],
    error: Float[Tensor, "S n d_out"],
    weights: Float[Tensor, "S n"],
    pre: Float[Tensor, "S n F"],
    dead: Bool[Tensor, "S F"],
) -> Float[Tensor, " S"]:
    """The loss of the dead latents' own model of the error e = y − ŷ (a constant), for each member; zero for one
    without dead latents."""
    losses = []
    for s in range(len(stack)):
        candidates = dead[s].nonzero().squeeze(1)
        if len(candidates) == 0:
            losses.append(error.new_zeros(()))
            continue
        one = _Member(stack, s, x[s % len(x)], error[s], weights[s], pre[s], candidates)
        losses.append(one.aux() if stack.config.revival == "aux" else one.ghost())
    return torch.stack(losses)


class _Member:
    """One member's rows and dead latents ("candidates")."""

    def __init__(
        self,
        stack: "Stack",
        member: int,
        x: Float[Tensor, "n d_in"],
        error: Float[Tensor, "n d_out"],
        weights: Float[Tensor, " n"],
        pre: Float[Tensor, "n F"],
        candidates: Int[Tensor, " c"],
    ) -> None:
        self.stack, self.member, self.candidates = stack, member, candidates
        self.x, self.error, self.weights, self.pre = x, error, weights[:, None], pre

    def aux(self) -> Float[Tensor, ""]:
        """α Σ w‖e − ê‖² / Σ w‖e − ē‖², ê the decoding of the k_aux largest dead pre-activations, without b_dec (Gao et
        al. 2024, A.2)."""
        config = self.stack.config
        k = min(config.aux_k or max(1, self.stack.d_out // 2), len(self.candidates))
        kept = top_k(self.pre[:, self.candidates], k)
        decoded = self._dense(kept) if len(self.candidates) <= _DENSE_CANDIDATES * k else self._sparse(kept)
        mean = (self.weights * self.error).sum(0) / self.weights.sum()
        spread = (self.weights * (self.error - mean).square()).sum().clamp_min(_TINY)
        missed = (self.weights * (decoded - self.error).square()).sum()
        loss: Tensor = missed * (config.aux_coefficient / spread)
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
        loss: Tensor = relative * (main / relative.clamp_min(_TINY)).detach() * self.stack.config.aux_coefficient
        return loss

    def _dense(self, kept: Int[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        encoder, W_dec, b_enc = self._weights()
        codes = functional.linear(self._centred(), encoder, b_enc).relu()
        return (codes * torch.zeros_like(codes).scatter_(1, kept, 1.0)) @ W_dec

    def _sparse(self, kept: Int[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        stack, s = self.stack, slice(self.member, self.member + 1)
        entries = SparseKept.of_indices(self.candidates[kept][None], stack.d_sae)
        b_dec = stack.b_dec[s] if stack.config.centered else None
        values = entries.products(self.x[None], b_dec, stack.encoder[s]) + entries.latent(stack.b_enc[s])
        return entries.decode(values.relu(), stack.W_dec[s])[0]

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        stack, s = self.stack, self.member
        return tuple(each[s].index_select(0, self.candidates) for each in (stack.encoder, stack.W_dec, stack.b_enc))  # type: ignore[return-value]

    def _centred(self) -> Float[Tensor, "n d"]:
        return self.x - self.stack.b_dec[self.member] if self.stack.config.centered else self.x


@torch.no_grad()
def resample(
    stack: "Stack",
    optimiser: torch.optim.Optimizer,
    member: int,
    dead: Bool[Tensor, " F"],
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"],
    *,
    generator: torch.Generator,
) -> None:
    """Give a member's dead latents new weights (Bricken et al. 2023, "Neuron resampling"): for each an input is drawn
    with a chance in proportion to its squared loss; the decoder row becomes that input's direction (seen from b_dec) at
    the mean length of live rows, the encoder row the same at 0.2 times their mean length, the bias zero, and Adam
    forgets what it knew of them. `x` and `y` are scaled activations."""
    which = dead.nonzero().squeeze(1)
    if len(which) == 0:
        return
    if len(which) == stack.d_sae:
        alive_encoder, alive_decoder = x.new_ones(()), x.new_ones(())
    else:
        alive_encoder = stack.encoder[member][~dead].norm(dim=1).mean()
        alive_decoder = stack.W_dec[member][~dead].norm(dim=1).mean()
    losses = (y - stack.reconstruct(member, x)).square().sum(1)
    chances = losses.square().double().cpu()
    if not bool(chances.sum() > 0):
        return
    drawn = torch.multinomial(chances, len(which), replacement=len(which) > len(chances), generator=generator)
    drawn = drawn.to(x.device)
    stack.W_dec[member, which] = functional.normalize(y[drawn] - stack.b_dec[member], dim=1) * alive_decoder
    if not stack.config.tied:
        x_center = stack.b_dec[member] if stack.config.centered else x.mean(0)
        stack.encoder[member, which] = functional.normalize(x[drawn] - x_center, dim=1) * (0.2 * alive_encoder)
    stack.b_enc[member, which] = 0.0
    _forget(stack, optimiser, member, which)


def _forget(stack: "Stack", optimiser: torch.optim.Optimizer, member: int, which: Int[Tensor, " c"]) -> None:
    for p in stack.parameters():
        if p.ndim < 2 or p.shape[1] != stack.d_sae:
            continue
        for value in optimiser.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value[member, which] = 0.0
