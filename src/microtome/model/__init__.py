"""Floor 2: language models. `load_model` opens one; `HookedModel` runs, reads and edits it by hook name."""

from microtome.model import edits
from microtome.model.cache import ActivationCache
from microtome.model.decomposition import Decomposition
from microtome.model.factored import FactoredMatrix
from microtome.model.hooked import HookedModel, HookPoint
from microtome.model.lm_training import TrainLMConfig, train_lm
from microtome.model.load import load_model, load_tokenizer
from microtome.model.names import HookName
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer
from microtome.model.weights import Weights

__all__ = [
    "ActivationCache",
    "Decomposition",
    "FactoredMatrix",
    "HookName",
    "HookPoint",
    "HookedModel",
    "ReferenceConfig",
    "ReferenceTransformer",
    "TrainLMConfig",
    "Weights",
    "edits",
    "load_model",
    "load_tokenizer",
    "train_lm",
]
