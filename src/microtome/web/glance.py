"""What makes a feature recognisable at a glance: the token it fires on most and those it promotes. Read once, for all."""

from dataclasses import dataclass

import pyarrow.parquet as pq

from microtome.features import FeatureIndex
from microtome.text.strings import TokenStrings


@dataclass(frozen=True)
class Glance:
    """Display strings, `promotes` strongest first; `top_token` is None for a feature that never fired."""

    top_token: str | None
    promotes: list[str]
    density: float
    max: float
    layer: int | None


class Glances:
    """The glances of all features of an index; `glances[12]` is feature 12's."""

    def __init__(self, index: FeatureIndex, n: int = 5) -> None:
        columns = ["feature", "top_token", "top_logit_ids", "density", "max"]
        table = pq.read_table(index.path / "features.parquet", columns=columns)
        self._strings: TokenStrings = index.strings
        self._layer_of = index.layer_of
        self._rows: dict[int, tuple[int, list[int], float, float]] = {
            feature: (token, logits[:n], density, top)
            for feature, token, logits, density, top in zip(*(table[c].to_pylist() for c in columns), strict=True)
        }

    def __getitem__(self, feature: int) -> Glance:
        token, logits, density, top = self._rows[feature]
        one = self._strings.one
        return Glance(
            one(token) if token >= 0 else None, [one(t) for t in logits], density, top, self._layer_of(feature)
        )
