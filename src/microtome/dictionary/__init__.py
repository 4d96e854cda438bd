"""Floor 4: dictionaries. `train` makes them, `load_dictionary` opens one, `evaluate` measures one, `compare` several."""

from microtome.dictionary.absorption import Absorption, absorption
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.comparison import Comparison, compare
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
from microtome.dictionary.dictionary_set import DictionarySet
from microtome.dictionary.disentanglement import Disentanglement, disentanglement
from microtome.dictionary.entities import Entities, cities, read_entities
from microtome.dictionary.evaluate import EvaluateConfig, Evaluation, evaluate, evaluate_all
from microtome.dictionary.formats import (
    DictionaryOrSet,
    load_any_dictionary,
    load_cross_layer_transcoder,
    load_dictionaries,
    load_dictionary,
    load_dictionary_or_set,
    load_dictionary_set,
    read_dictionary,
    save_dictionary,
)
from microtome.dictionary.geometry import Geometry, geometry
from microtome.dictionary.labelled import EncodedTexts, LabelledTexts, encode_texts, read_labelled
from microtome.dictionary.letters import FirstLetters, first_letters
from microtome.dictionary.masks import MaskConfig
from microtome.dictionary.probe_tasks import built_in_tasks
from microtome.dictionary.probing import Probing, probing
from microtome.dictionary.replacement import as_replacement, replacement_logits
from microtome.dictionary.signs import split_signs
from microtome.dictionary.similarity import Similarity, similarity
from microtome.dictionary.surface import ContextDictionary, LayeredDictionary, SparseDictionary
from microtome.dictionary.targeted import scr, tpp
from microtome.dictionary.temporal import TemporalDictionary
from microtome.dictionary.trainer import TrainConfig, train, train_cross_layer

__all__ = [
    "Absorption",
    "BatchTopKConfig",
    "Comparison",
    "ContextDictionary",
    "CrossLayerTranscoder",
    "Dictionary",
    "DictionaryConfig",
    "DictionaryOrSet",
    "DictionarySet",
    "Disentanglement",
    "EncodedTexts",
    "Entities",
    "EvaluateConfig",
    "Evaluation",
    "FirstLetters",
    "GatedConfig",
    "Geometry",
    "JumpReLUConfig",
    "LabelledTexts",
    "LayeredDictionary",
    "MaskConfig",
    "MatryoshkaConfig",
    "Origin",
    "PAnnealConfig",
    "Probing",
    "ReLUConfig",
    "Similarity",
    "SparseCodes",
    "SparseDictionary",
    "TemporalDictionary",
    "TopKConfig",
    "TrainConfig",
    "absorption",
    "as_replacement",
    "built_in_tasks",
    "cities",
    "compare",
    "disentanglement",
    "encode_texts",
    "evaluate",
    "evaluate_all",
    "first_letters",
    "geometry",
    "load_any_dictionary",
    "load_cross_layer_transcoder",
    "load_dictionaries",
    "load_dictionary",
    "load_dictionary_or_set",
    "load_dictionary_set",
    "parse_config",
    "probing",
    "read_dictionary",
    "read_entities",
    "read_labelled",
    "replacement_logits",
    "save_dictionary",
    "scr",
    "similarity",
    "split_signs",
    "tpp",
    "train",
    "train_cross_layer",
]
