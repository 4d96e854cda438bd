"""Floor 2: language models. `load_model` opens one; `HookedModel` runs, reads and edits it by hook name."""

from microtome.model import edits
from microtome.model.cache import ActivationCache
from microtome.model.hooked import HookedModel, HookPoint
from microtome.model.load import load_model
from microtome.model.names import HookName

__all__ = ["ActivationCache", "HookName", "HookPoint", "HookedModel", "edits", "load_model"]
