"""Floor 3: activations. `harvest` writes a store; `ActivationStream` gives shuffled batches from a store or straight
from the model."""

from microtome.activations.harvest import HarvestConfig, harvest
from microtome.activations.source import ModelSource, StoreSource
from microtome.activations.store import ActivationStore
from microtome.activations.stream import ActivationStream, StreamConfig

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "HarvestConfig",
    "ModelSource",
    "StoreSource",
    "StreamConfig",
    "harvest",
]
