"""Does a dictionary belong to a model? Whatever reads a model through a dictionary asks this first."""

import torch

from microtome.common.errors import ConfigError
from microtome.dictionary.dictionary import Dictionary
from microtome.model import HookedModel


def check_fit(model: HookedModel, sae: Dictionary) -> None:
    """Raise ConfigError when the dictionary was trained on another model or has another width than its hook point there,
    ModelError when the model has no such hook point. Runs the model on two tokens, up to that point."""
    if sae.model_name not in ("unknown", model.name):
        raise ConfigError(
            "The dictionary was trained on another model",
            got=f"model {model.name}",
            expected=sae.model_name,
            fix=f"Load {sae.model_name}, or a dictionary of {model.name}",
        )
    probe = model.activations(torch.zeros(1, 2, dtype=torch.long), sae.hook_name)
    width = probe[sae.hook_name][0, 0].numel()
    if width != sae.d_in:
        raise ConfigError(
            f"The dictionary does not fit {sae.hook_name}", got=f"d_in {sae.d_in}", expected=f"{width}, the width there"
        )
