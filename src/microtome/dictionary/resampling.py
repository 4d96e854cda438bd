"""New weights for dead latents (Bricken et al. 2023, "Neuron resampling")."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.dictionary.stack import Stack

_SHARE = 0.2  # of the live encoder rows' mean length


@torch.no_grad()
def resample(
    stack: Stack,
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
    the mean length of live rows, the encoder row the same at 0.2 times their mean length, the bias zero, what the
    rule has for them as at the start (thresholds 0.2 times that), and Adam forgets what it knew of them. `x` and `y` are
    scaled activations."""
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
        stack.encoder[member, which] = functional.normalize(x[drawn] - x_center, dim=1) * (_SHARE * alive_encoder)
    stack.b_enc[member, which] = 0.0
    stack.rule.begin_again(member, which, _SHARE)
    _forget(stack, optimiser, member, which)


def _forget(stack: Stack, optimiser: torch.optim.Optimizer, member: int, which: Int[Tensor, " c"]) -> None:
    for p in stack.parameters():
        if p is stack.b_dec or p is stack.W_skip or p.ndim < 2 or p.shape[1] != stack.d_sae:
            continue
        for value in optimiser.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                value[member, which] = 0.0
