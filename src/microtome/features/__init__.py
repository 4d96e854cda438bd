"""Floor 5: the feature index. Opening one needs no torch, so the parts that build one are fetched when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microtome.features.build import build_index as build_index
    from microtome.features.config import IndexConfig as IndexConfig
    from microtome.features.index import FeatureIndex as FeatureIndex
    from microtome.features.index import open_index as open_index
    from microtome.features.results import Example as Example
    from microtome.features.results import Feature as Feature
    from microtome.features.results import FeaturePage as FeaturePage
    from microtome.features.results import FeatureRow as FeatureRow
    from microtome.features.results import IndexSummary as IndexSummary
    from microtome.features.results import PromptFeatures as PromptFeatures
    from microtome.features.summary import FeatureSummary as FeatureSummary
    from microtome.features.summary import merge as merge

_HOMES = {
    "build_index": "build",
    "IndexConfig": "config",
    "FeatureIndex": "index",
    "open_index": "index",
    "Example": "results",
    "Feature": "results",
    "FeaturePage": "results",
    "FeatureRow": "results",
    "IndexSummary": "results",
    "PromptFeatures": "results",
    "FeatureSummary": "summary",
    "merge": "summary",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'microtome.features' has no {name!r}; its names are {', '.join(_HOMES)}")
    value = getattr(importlib.import_module(f"microtome.features.{home}"), name)
    globals()[name] = value
    return value
