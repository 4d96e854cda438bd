"""Latents that fire in two directions (AbsTopK), taken apart: what asks for codes that are never below zero reads these."""

import torch
from torch import nn

from microtome.common.errors import ConfigError
from microtome.dictionary.activation import AbsTopK, TopK
from microtome.dictionary.dictionary import Dictionary


@torch.no_grad()
def split_signs(made: nn.Module) -> Dictionary:
    """An AbsTopK dictionary as a TopK of twice as many latents: i where latent i is above zero, d_sae + i where it is below.

    The k largest of pre and −pre are the k largest absolute values, so the output is the same. Raises ConfigError for a
    dictionary of another kind.
    """
    if not isinstance(made, Dictionary) or not isinstance(made.activation, AbsTopK):
        raise ConfigError(
            "Only an AbsTopK dictionary has signs to split", got=getattr(made, "architecture", type(made).__name__)
        )
    both = Dictionary(
        made.d_in,
        2 * made.d_sae,
        TopK(made.activation.k),
        origin=made.origin,
        d_out=made.d_out,
        center=made.center,
        skip=made.W_skip is not None,
        input_norm=made.input_norm,
    ).to(made.W_dec.device, made.W_dec.dtype)
    for name, tensor in made.named_parameters():
        of_latents = name in ("encoder", "b_enc", "W_dec")
        both.get_parameter(name).copy_(torch.cat([tensor, -tensor]) if of_latents else tensor)
    return both.requires_grad_(False)
