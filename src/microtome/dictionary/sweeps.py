"""Lists of configs for one training: all combinations of some settings, one dictionary for each layer, or a file."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from microtome.common.errors import ConfigError
from microtome.dictionary.config import DictionaryConfig, parse_config

C = TypeVar("C", bound=DictionaryConfig)


def combinations(settings: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[DictionaryConfig]:
    """A config for each combination of the values on the `axes`; `settings` are what all have in common."""
    return [
        parse_config({**settings, **dict(zip(axes, values, strict=True))})
        for values in itertools.product(*axes.values())
    ]


def per_layer(config: C, inputs: Sequence[str], outputs: Sequence[str] = ()) -> list[C]:
    """One transcoder for each pair of hook points, or without `outputs` one autoencoder for each point, with the settings
    of `config`.

    Raises ConfigError for no points, and when there are not as many outputs as inputs.
    """
    if not inputs:
        raise ConfigError("Dictionaries of several layers need hook points", got="none", fix="Name them (--hook)")
    if not outputs:
        return [replace(config, inputs=(name,), outputs=()) for name in inputs]
    if len(inputs) != len(outputs):
        raise ConfigError(
            "Transcoders of several layers need an output for each input",
            got=f"{len(inputs)} inputs, {len(outputs)} outputs",
        )
    return [replace(config, inputs=(a,), outputs=(b,)) for a, b in zip(inputs, outputs, strict=True)]


def read_configs(file: str | Path) -> list[DictionaryConfig]:
    """The configs in a JSON file: a list of objects, or one object, whose `sweep` (if it has one) names axes:
    `{"architecture": "topk", "d_sae": 4608, "sweep": {"k": [16, 32], "seed": [0, 1, 2]}}`.

    Raises ConfigError for a file that is not there or does not hold that.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"There is no file {file}", expected="a JSON file with the settings of dictionaries")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    items = data if isinstance(data, list) else [data]
    configs: list[DictionaryConfig] = []
    for item in items:
        if not isinstance(item, dict):
            raise ConfigError(f"{file} holds something else", got=type(item).__name__, expected="objects of settings")
        settings = dict(item)
        axes = settings.pop("sweep", {})
        if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
            raise ConfigError(f"The sweep in {file} names lists of values", got=axes, expected='{"k": [16, 32]}')
        configs += combinations(settings, axes)
    return configs
