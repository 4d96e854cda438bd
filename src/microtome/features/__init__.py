"""Floor 5: the feature index. Opening one needs no torch, so the parts that build one are fetched when first used."""

from typing import TYPE_CHECKING

from microtome.common.lazy import lazy

_HOMES = {
    "build_index": "microtome.features.build",
    "IndexConfig": "microtome.features.config",
    "FeatureIndex": "microtome.features.index",
    "open_index": "microtome.features.index",
    "Example": "microtome.features.results",
    "Feature": "microtome.features.results",
    "FeaturePage": "microtome.features.results",
    "FeatureRow": "microtome.features.results",
    "IndexSummary": "microtome.features.results",
    "PromptFeatures": "microtome.features.results",
    "FeatureSummary": "microtome.features.summary",
    "merge": "microtome.features.summary",
}

__all__ = list(_HOMES)

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
else:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
