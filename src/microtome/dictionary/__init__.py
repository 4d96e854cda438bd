"""Floor 4: dictionaries. `train` makes them, `load_dictionary` opens one, `evaluate` measures one."""

from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
    parse_config,
)
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
from microtome.dictionary.trainer import TrainConfig, train

__all__ = [
    "BatchTopKConfig",
    "CrossLayerTranscoder",
    "Dictionary",
    "DictionaryConfig",
    "EvaluateConfig",
    "Evaluation",
    "GatedConfig",
    "JumpReLUConfig",
    "MatryoshkaConfig",
    "Origin",
    "PAnnealConfig",
    "ReLUConfig",
    "SparseCodes",
    "TopKConfig",
    "TrainConfig",
    "evaluate",
    "load_cross_layer_transcoder",
    "load_dictionaries",
    "load_dictionary",
    "parse_config",
    "read_dictionary",
    "save_dictionary",
    "train",
]
