"""Floor 4: dictionaries. `train` makes one, `load_dictionary` opens one, `evaluate` measures one."""

from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.evaluate import EvaluateConfig, Evaluation, evaluate
from microtome.dictionary.formats import load_dictionary, save_dictionary
from microtome.dictionary.topk import TopKConfig, TopKSAE
from microtome.dictionary.trainer import TrainConfig, train

__all__ = [
    "Dictionary",
    "EvaluateConfig",
    "Evaluation",
    "Origin",
    "SparseCodes",
    "TopKConfig",
    "TopKSAE",
    "TrainConfig",
    "evaluate",
    "load_dictionary",
    "save_dictionary",
    "train",
]
