"""Dictionaries and encoded texts whose figures are known in advance."""

import torch
from torch import Tensor

from microtome.dictionary import Dictionary, EncodedTexts, Origin
from microtome.dictionary.activation import ReLU


def perfect_dictionary(origin: Origin, d: int) -> Dictionary:
    """Each dimension has a latent for its positive and one for its negative part: ŷ = x."""
    sae = Dictionary(d, 2 * d, ReLU(), origin=origin, center=False)
    with torch.no_grad():
        sae.encoder.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.encoder)
    return sae.requires_grad_(False)


def encoded(
    labels: Tensor, y: Tensor, codes: Tensor, rows: Tensor, *, x: Tensor | None = None, names: str = "ab"
) -> EncodedTexts:
    """Texts as they come from a model, made by hand; x is y unless given."""
    return EncodedTexts(
        name="made",
        attributes=tuple(names[: labels.shape[1]]),
        labels=labels.bool(),
        x=y.float() if x is None else x.float(),
        y=y.float(),
        codes=codes.float(),
        W_dec=rows.float(),
    )
