"""The measurements beside `evaluate`, by name, as the command asks for them; texts are encoded once for all that read
them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from microtome.common.config import to_dict
from microtome.common.errors import unknown_name
from microtome.dictionary.absorption import absorption
from microtome.dictionary.disentanglement import disentanglement
from microtome.dictionary.entities import Entities
from microtome.dictionary.geometry import geometry
from microtome.dictionary.labelled import EncodedTexts, LabelledTexts, encode_texts
from microtome.dictionary.masks import MaskConfig
from microtome.dictionary.probe_tasks import built_in_tasks
from microtome.dictionary.probing import check_probing, probing
from microtome.dictionary.surface import SparseDictionary
from microtome.dictionary.targeted import check_scr, check_tpp, scr, tpp
from microtome.model import HookedModel

METRICS = ("core", "geometry", "probing", "absorption", "scr", "tpp", "ravel")


@dataclass(frozen=True)
class Measures:
    """Measurements of one dictionary. `texts` are labelled ones in place of the built-in tasks, `entities` in place of the
    cities; `mask` says how RAVEL's masks are learned, None that none are."""

    model: HookedModel
    dictionary: SparseDictionary
    texts: Sequence[LabelledTexts] | None = None
    entities: Entities | None = None
    mask: MaskConfig | None = None

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """The measurements of these names as plain values. Raises ConfigError for an unknown name."""
        check_names(names)
        makers: dict[str, Callable[[], Any]] = {
            "geometry": lambda: to_dict(geometry(self.dictionary)),
            "probing": lambda: to_dict(probing(self.encoded)),
            "absorption": lambda: to_dict(absorption(self.model, self.dictionary)),
            "scr": lambda: [to_dict(one) for one in scr(self.encoded)],
            "tpp": lambda: [to_dict(one) for one in tpp(self.encoded)],
            "ravel": lambda: to_dict(disentanglement(self.model, self.dictionary, self.entities, mask=self.mask)),
        }
        return {name: finite(makers[name]()) for name in names if name in makers}

    @cached_property
    def encoded(self) -> list[EncodedTexts]:
        """The texts of all tasks, encoded."""
        return [encode_texts(self.model, self.dictionary, task) for task in self.texts or built_in_tasks()]


def check_texts(names: Sequence[str], texts: Sequence[LabelledTexts]) -> None:
    """Raise InputError where the texts do not suffice for one of the measurements `names`, before anything is run."""
    if "tpp" in names:
        check_tpp(texts)
        check_probing([one for one in texts if len(one.attributes) > 1])
    if "scr" in names:
        check_scr(texts)
    if "probing" in names:
        check_probing(texts)


def finite(value: Any) -> Any:
    """Plain values with None for numbers that are none (a letter without a word to test, say): JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a measurement that there is not."""
    for name in names:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
