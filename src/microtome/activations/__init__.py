"""Floor 3: activations. `harvest` writes a store; `ActivationStream` gives shuffled batches from a store or straight
from the model."""

from microtome.activations.array import ArraySource
from microtome.activations.harvest import HarvestConfig, harvest
from microtome.activations.paired import PairedSource
from microtome.activations.source import ActivationSource, ModelSource, StoreSource
from microtome.activations.store import ActivationStore
from microtome.activations.stream import ActivationStream, StreamConfig

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "ActivationStream",
    "ArraySource",
    "HarvestConfig",
    "ModelSource",
    "PairedSource",
    "StoreSource",
    "StreamConfig",
    "harvest",
]
