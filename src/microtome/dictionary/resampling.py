"""New weights for dead latents (Bricken et al. 2023, "Neuron resampling")."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from microtome.dictionary.rules import NewLatents
from microtome.dictionary.stack import Stack
from microtome.dictionary.statistics import geometric_median

_SHARE = 0.2  # of the live encoder rows' mean length


@torch.no_grad()
def resample(
    stack: Stack,
    optimiser: torch.optim.Optimizer,
    member: int,
    dead: Bool[Tensor, " F"],
    x: Float[Tensor, "*s n d_in"],
    y: Float[Tensor, "*s n d_out"],
    *,
    generator: torch.Generator,
    residual: Float[Tensor, "S n d_out"] | None = None,
) -> None:
    """Give a member's dead latents new weights (Bricken et al. 2023, "Neuron resampling"): for each an input is drawn
    with a chance in proportion to its squared loss; the decoder row becomes that input's direction (seen from b_dec) at
    the mean length of live rows, the encoder row the same at 0.2 times their mean length, the bias such that the middle of
    the inputs has a pre-activation of zero (less what the rule begins with), and Adam forgets what it knew of them. `x` and
    `y` are scaled activations, of all members or each its own; `residual` is the stack's on them, where it is known
    already."""
    which = dead.nonzero().squeeze(1)
    if len(which) == 0:
        return
    x, y = (rows[None] if rows.ndim == 2 else rows for rows in (x, y))
    residual = stack.residual(x, y) if residual is None else residual
    mine, decoder = x[member % len(x)], stack.decoder.rows(member)
    if len(which) == stack.d_sae:
        alive_encoder, alive_decoder = x.new_ones(()), x.new_ones(())
    else:
        alive_encoder = stack.encoder[member][~dead].norm(dim=1).mean()
        alive_decoder = decoder[~dead].norm(dim=1).mean()
    chances = stack.decoder.span(residual, member).square().sum(1).square().double().cpu()
    if not bool(chances.sum() > 0):
        return
    drawn = torch.multinomial(chances, len(which), replacement=len(which) > len(chances), generator=generator)
    drawn = drawn.to(x.device)
    written = stack.decoder.span(y - stack.b_dec[:, None], member)[drawn]
    decoder[which] = functional.normalize(written, dim=1) * alive_decoder
    x_center = stack.b_dec[member] if stack.config.centered else geometric_median(mine)
    if not stack.config.tied:
        stack.encoder[member, which] = functional.normalize(mine[drawn] - x_center, dim=1) * (_SHARE * alive_encoder)
    share = 1.0 if stack.config.tied else _SHARE
    encoder = stack.encoder[member, which]
    b_enc = encoder.new_zeros(len(which)) if stack.config.centered else -encoder @ x_center
    new = NewLatents(which, encoder.norm(dim=1), share, b_enc)
    stack.b_enc[member, which] = stack.rule.begin_again(member, new)
    _forget(stack, optimiser, member, which)


def _forget(stack: Stack, optimiser: torch.optim.Optimizer, member: int, which: Int[Tensor, " c"]) -> None:
    places: list[tuple[nn.Parameter, tuple[int, ...]]] = [(p, (member,)) for p in stack.latent_parameters()]
    for p, index in [*places, stack.decoder.place(member)]:
        for value in optimiser.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value[index][which] = 0.0
