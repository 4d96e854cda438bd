"""Does a dictionary belong to a model? Whatever reads a model through a dictionary asks this first."""

import torch

from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.surface import SparseDictionary, points
from microtome.model import HookedModel


def check_fit(model: HookedModel, sae: SparseDictionary) -> None:
    """Raise ConfigError when the dictionary was trained on another model or has another width than its hook points there,
    ModelError when the model has no such hook point, InputError for weights that are no numbers. Runs the model on two
    tokens, up to the deepest of them."""
    if sae.origin.model_name not in ("unknown", model.name):
        raise ConfigError(
            "The dictionary was trained on another model",
            got=f"model {model.name}",
            expected=sae.origin.model_name,
            fix=f"Load {sae.origin.model_name}, or a dictionary of {model.name}",
        )
    if any(bool(weights.isnan().any()) for weights in sae.parameters()):
        raise InputError(
            "The dictionary has weights that are no numbers (NaN)",
            fix="Did its training diverge? Take an earlier checkpoint, or train with a lower learning rate",
        )
    probe = model.activations(torch.zeros(1, 2, dtype=torch.long), points([sae]))
    sides = (("d_in", sae.d_in, sae.origin.inputs), ("d_out", sae.d_out, sae.origin.outputs))
    for name, size, places in sides:
        width = sum(probe[place][0, 0].numel() for place in places)
        if width != size:
            raise ConfigError(
                f"The dictionary does not fit {', '.join(places)}",
                got=f"{name} {size}",
                expected=f"{width}, the width there",
            )
