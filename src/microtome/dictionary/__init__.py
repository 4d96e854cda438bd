"""Floor 4: dictionaries. `train` makes one, `load_dictionary` opens one, `evaluate` measures one."""

from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.evaluate import EvaluateConfig, Evaluation, evaluate
from microtome.dictionary.formats import (
    load_cross_layer_transcoder,
    load_dictionaries,
    load_dictionary,
    read_dictionary,
    save_dictionary,
)
from microtome.dictionary.topk import TopKConfig, TopKSAE
from microtome.dictionary.trainer import TrainConfig, train

__all__ = [
    "CrossLayerTranscoder",
    "Dictionary",
    "EvaluateConfig",
    "Evaluation",
    "Origin",
    "SparseCodes",
    "TopKConfig",
    "TopKSAE",
    "TrainConfig",
    "evaluate",
    "load_cross_layer_transcoder",
    "load_dictionaries",
    "load_dictionary",
    "read_dictionary",
    "save_dictionary",
    "train",
]
