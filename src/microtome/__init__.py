"""Microtome opens language models at any point and breaks what flows there into sparse, interpretable features.

`import microtome as mt` loads nothing heavy. Each public name is fetched from its part of the package when it is first
used; the table below is the whole public surface.
"""

from typing import TYPE_CHECKING

from microtome.common.lazy import lazy

__version__ = "0.1.0"

# Where each public name lives, in the order of the data's path.
_HOMES = {
    "open_corpus": "microtome.text",
    "TokenizeConfig": "microtome.text",
    "tokenize_corpus": "microtome.text",
    "TokenDataset": "microtome.text",
    "load_model": "microtome.model",
    "edits": "microtome.model.edits",
    "HarvestConfig": "microtome.activations",
    "harvest": "microtome.activations",
    "TopKConfig": "microtome.dictionary",
    "BatchTopKConfig": "microtome.dictionary",
    "GatedConfig": "microtome.dictionary",
    "JumpReLUConfig": "microtome.dictionary",
    "MatryoshkaConfig": "microtome.dictionary",
    "PAnnealConfig": "microtome.dictionary",
    "ReLUConfig": "microtome.dictionary",
    "TrainConfig": "microtome.dictionary",
    "train": "microtome.dictionary",
    "train_cross_layer": "microtome.dictionary",
    "load_dictionary": "microtome.dictionary",
    "EvaluateConfig": "microtome.dictionary",
    "evaluate": "microtome.dictionary",
    "compare": "microtome.dictionary",
    "IndexConfig": "microtome.features",
    "build_index": "microtome.features",
    "open_index": "microtome.features",
    "replicate": "microtome.replications",
    "circuits": "microtome.circuits",
    "toy": "microtome.toy",
    "MicrotomeError": "microtome.common.errors",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 – the names are strings; the linter cannot see through the star

if TYPE_CHECKING:
    from microtome import circuits as circuits
    from microtome import toy as toy
    from microtome.activations import HarvestConfig as HarvestConfig
    from microtome.activations import harvest as harvest
    from microtome.common.errors import MicrotomeError as MicrotomeError
    from microtome.dictionary import BatchTopKConfig as BatchTopKConfig
    from microtome.dictionary import EvaluateConfig as EvaluateConfig
    from microtome.dictionary import GatedConfig as GatedConfig
    from microtome.dictionary import JumpReLUConfig as JumpReLUConfig
    from microtome.dictionary import MatryoshkaConfig as MatryoshkaConfig
    from microtome.dictionary import PAnnealConfig as PAnnealConfig
    from microtome.dictionary import ReLUConfig as ReLUConfig
    from microtome.dictionary import TopKConfig as TopKConfig
    from microtome.dictionary import TrainConfig as TrainConfig
    from microtome.dictionary import compare as compare
    from microtome.dictionary import evaluate as evaluate
    from microtome.dictionary import load_dictionary as load_dictionary
    from microtome.dictionary import train as train
    from microtome.dictionary import train_cross_layer as train_cross_layer
    from microtome.features import IndexConfig as IndexConfig
    from microtome.features import build_index as build_index
    from microtome.features import open_index as open_index
    from microtome.model import edits as edits
    from microtome.model import load_model as load_model
    from microtome.replications import replicate as replicate
    from microtome.text import TokenDataset as TokenDataset
    from microtome.text import TokenizeConfig as TokenizeConfig
    from microtome.text import open_corpus as open_corpus
    from microtome.text import tokenize_corpus as tokenize_corpus
else:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
