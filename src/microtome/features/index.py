"""Opens a feature index and answers questions about it, without a model and without torch.

The Parquet files are read through DuckDB in this process. The numbers of all latents are loaded once (they are what
lists are sorted and filtered by); histograms, logits and examples are read from their row group when a latent is asked
for. Every call uses a cursor of its own, so an index may be shared by threads, until one closes it.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from microtome.common.artifacts import fingerprint, read_head, read_json
from microtome.common.assets import shipped_or
from microtome.common.config import from_dict
from microtome.common.errors import ArtifactError, ConfigError, InputError, unknown_name
from microtome.features.config import KIND, IndexRecord
from microtome.features.results import (
    Band,
    Example,
    Feature,
    FeaturePage,
    FeatureRow,
    Histogram,
    IndexSummary,
    Neighbour,
    PromptFeatures,
    TokenEffect,
)
from microtome.text.strings import TokenStrings

if TYPE_CHECKING:
    from microtome.dictionary import DictionaryOrSet
    from microtome.features.prompt import Reader
    from microtome.model import HookedModel

TABLES = ("features", "histogram", "examples")
SORTS = (
    "feature",
    "count",
    "n_sequences",
    "density",
    "mean",
    "std",
    "max",
    "top_token",
    "encoder_norm",
    "decoder_norm",
    "bias",
)
_ROW = "feature, count, n_sequences, density, mean, std, max, top_token, encoder_norm, decoder_norm, bias"
_LOAD = f"""
SET GLOBAL parquet_metadata_cache = true;
CREATE TABLE rows AS SELECT {_ROW} FROM features_file ORDER BY feature;
CREATE TABLE peaks AS SELECT feature, token, value FROM examples_file WHERE kind = 'top';
CREATE TABLE promoted AS SELECT feature, unnest(top_logit_ids) AS token FROM features_file WHERE count > 0;
"""  # noqa: S608 – constants of this module
_DETAILS = """
SELECT top_logit_ids, top_logit_values, bottom_logit_ids, bottom_logit_values, neighbour_ids, neighbour_cosines,
    band_sequences
FROM features_file WHERE feature = ?
"""
_EXAMPLES = """
SELECT feature, kind, band, rank, value, sequence, position, start, tokens, act_at, act_value, document
FROM examples_file WHERE feature = ? AND kind = ? ORDER BY band DESC, rank LIMIT ? OFFSET ?
"""
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


def open_index(path: str | Path) -> "FeatureIndex":
    """The feature index in the folder `path`; the name `"demo"` opens the one that ships with Microtome.

    Raises ArtifactError when it is missing, unfinished, of another kind, or damaged.
    """
    return FeatureIndex(shipped_or(path, "index"))


class FeatureIndex:
    """A feature index on disk: lists, statistics, examples and search. Open one with `open_index`, close it with
    `close()` or by `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head = read_head(path, KIND)
        self.record = from_dict(IndexRecord, head)
        self._fingerprint = fingerprint(head)  # of what is written: a field that is new since then does not change it
        self.strings = TokenStrings.open(path / "tokenizer.json")
        totals = _totals(path)
        ends = list(accumulate((each.n_latents for each in self.record.layers), initial=0))
        self._layers = [
            (each.layer, range(*latents)) for each, latents in zip(self.record.layers, pairwise(ends), strict=True)
        ]
        self._reader: Reader | None = None
        db = duckdb.connect(config=_SETTINGS)
        self._db: duckdb.DuckDBPyConnection | None = db
        try:
            for table in TABLES:
                db.from_parquet(str(path / f"{table}.parquet")).create_view(f"{table}_file")
            db.execute(_LOAD)
            self.summary = self._summarise(*totals)
        except duckdb.Error as error:
            self.close()
            raise _damaged(path, error) from error
        except ArtifactError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files and of what was loaded; nothing can be asked afterwards. Closing twice does no harm."""
        if self._db is not None:
            self._db.close()
        self._db = self._reader = None

    def __enter__(self) -> "FeatureIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        s = self.summary
        return f"FeatureIndex({str(self.path)!r}: {s.d_sae:,} latents at {s.hook_name} of {s.model})"

    def __len__(self) -> int:
        return self.record.d_sae

    def features(  # noqa: PLR0913 – one keyword a filter
        self,
        *,
        sort: str = "density",
        descending: bool = True,
        offset: int = 0,
        limit: int = 100,
        min_density: float | None = None,
        max_density: float | None = None,
        min_max: float | None = None,
        alive: bool | None = True,
        token: str | None = None,
        text: str | None = None,
        layer: int | None = None,
    ) -> FeaturePage:
        """Rows `offset` … `offset + limit` of the latents that pass every filter given, sorted by a statistic.

        `token`: in some top example the peak token contains this, whatever the case. `text`: found by `search`. `layer`:
        reads this block (one of `summary.layers`). Raises ConfigError for a statistic or a layer that is not there.
        """
        if sort not in SORTS:
            raise unknown_name("statistic", sort, SORTS)
        where = ["true"]
        values: list[object] = []
        for condition, value in (("density >= ?", min_density), ("density <= ?", max_density), ("max >= ?", min_max)):
            if value is not None:
                where.append(condition)
                values.append(value)
        if alive is not None:
            where.append("count > 0" if alive else "count = 0")
        if token:
            where.append("feature IN (SELECT feature FROM peaks WHERE token IN (SELECT unnest(?::INT[])))")
            values.append(self.strings.matching(token))
        if text:
            where.append("feature IN (SELECT unnest(?::INT[]))")
            values.append([feature for feature, _ in self._matches(text)])
        if layer is not None:
            where.append(f"({' OR '.join(['feature BETWEEN ? AND ?'] * len(found := self._of_layer(layer)))})")
            values += [edge for latents in found for edge in (latents.start, latents.stop - 1)]
        condition = " AND ".join(where)
        # The statistic is one of SORTS and the conditions are those above; what a user wrote is only in `values`.
        total = self._ask(f"SELECT count(*) FROM rows WHERE {condition}", values)[0][0]  # noqa: S608
        order = f"{sort} {'DESC' if descending else 'ASC'}, feature"
        sql = f"SELECT {_ROW} FROM rows WHERE {condition} ORDER BY {order} LIMIT ? OFFSET ?"  # noqa: S608
        rows = self._ask(sql, [*values, max(limit, 0), max(offset, 0)])
        return FeaturePage(total, [self._row(r) for r in rows])

    def feature(self, feature: int) -> Feature:
        """All about one latent but its examples. Raises InputError when there is no such latent."""
        self._check(feature)
        top_ids, top_values, low_ids, low_values, near_ids, cosines, in_bands = self._ask(_DETAILS, [feature])[0]
        row = self._row(self._ask(f"SELECT {_ROW} FROM rows WHERE feature = ?", [feature])[0])  # noqa: S608
        sampled = self._ask("SELECT band, count(*) FROM examples_file WHERE feature = ? GROUP BY band", [feature])
        kept: dict[int, int] = dict(sampled)
        return Feature(
            row=row,
            histogram=self._histogram(feature),
            top_logits=self._effects(top_ids, top_values),
            bottom_logits=self._effects(low_ids, low_values),
            neighbours=[Neighbour(i, c) for i, c in zip(near_ids, cosines, strict=True)],
            bands=self._bands(row, kept, in_bands),
            n_top=kept.get(-1, 0),
        )

    def examples(self, feature: int, kind: str = "top", limit: int = 20, offset: int = 0) -> list[Example]:
        """Examples of one latent: `kind` "top", strongest first, or "sample", the strongest band first.

        Raises InputError when there is no such latent, ConfigError for another kind.
        """
        self._check(feature)
        if kind not in ("top", "sample"):
            raise unknown_name("kind of example", kind, ("top", "sample"))
        values = [feature, kind, max(limit, 0), max(offset, 0)]
        return [self._example(r) for r in self._ask(_EXAMPLES, values)]

    def search(self, text: str, limit: int = 50) -> list[FeatureRow]:
        """Latents that answer to the words of `text`, best first.

        A latent scores by the share of its top examples' activation that peaks on a token containing a word, and half
        as much by the share of the tokens it promotes that do. Words of one or two letters must be whole tokens.
        """
        best = [feature for feature, _ in self._matches(text)[:limit]]
        sql = f"SELECT {_ROW} FROM rows WHERE feature IN (SELECT unnest(?::INT[]))"  # noqa: S608
        rows = {r[0]: self._row(r) for r in self._ask(sql, [best])}
        return [rows[feature] for feature in best]

    def layer_of(self, feature: int) -> int | None:
        """The block that a latent reads, where the latents of the index read different ones."""
        return next((layer for layer, latents in self._layers if feature in latents), None)

    def tokens_to_strings(self, ids: Sequence[int]) -> list[str]:
        """Display strings of tokens that stand in this order: a character in pieces is shown on its last piece."""
        return self.strings.show(ids)

    def top_features(
        self,
        text: str,
        *,
        model: "HookedModel | None" = None,
        dictionary: "DictionaryOrSet | None" = None,
        k: int | None = None,
    ) -> PromptFeatures:
        """The latents that fire on each token of `text`, strongest first, at most `k` a token.

        Without `model` or `dictionary`, those that the index was built with are loaded, and kept for the next call.
        Raises ArtifactError when the dictionary is not the one that the index describes.
        """
        from microtome.features.prompt import Reader

        if model is not None or dictionary is not None:
            return Reader.of(self.record, self.path, model, dictionary).read(text, self.strings, k)
        if self._reader is None:
            self._reader = Reader.of(self.record, self.path)
        return self._reader.read(text, self.strings, k)

    def _ask(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._db is None:
            raise InputError(f"The feature index {self.path} is closed", fix="Open it again (open_index)")
        try:
            with self._db.cursor() as cursor:
                return cursor.execute(sql, list(values)).fetchall()
        except duckdb.Error as error:
            raise _damaged(self.path, error) from error

    def _check(self, feature: int) -> None:
        if not 0 <= feature < self.record.d_sae:
            raise InputError("There is no such latent", got=feature, expected=f"0…{self.record.d_sae - 1}")

    def _row(self, values: tuple[Any, ...]) -> FeatureRow:
        names = _ROW.split(", ")
        token = values[names.index("top_token")]
        found = dict(zip(names, values, strict=True))
        return FeatureRow(**found, layer=self.layer_of(found["feature"]), top_token_string=self.strings.one(token))

    def _of_layer(self, layer: int) -> list[range]:
        """The latents that read a block."""
        found = [latents for at, latents in self._layers if at == layer]
        if not found:
            there = ", ".join(map(str, self.summary.layers)) or "none: all latents read the same"
            raise ConfigError("The index has no latents of this layer alone", got=layer, expected=there)
        return found

    def _effects(self, ids: list[int], values: list[float]) -> list[TokenEffect]:
        return [TokenEffect(i, self.strings.one(i), v) for i, v in zip(ids, values, strict=True)]

    def _histogram(self, feature: int) -> Histogram:
        """From the first to the last bin that is not empty."""
        found = self._ask("SELECT bin, count FROM histogram_file WHERE feature = ? ORDER BY bin", [feature])
        if not found:
            return Histogram([], [])
        counts = dict(found)
        bins = range(found[0][0], found[-1][0] + 1)
        edges = self.record.histogram_edges
        return Histogram(list(edges[bins.start : bins.stop + 1]), [counts.get(b, 0) for b in bins])

    def _bands(self, row: FeatureRow, kept: dict[int, int], totals: list[int]) -> list[Band]:
        if not row.alive:
            return []
        top_octave = math.frexp(row.max)[1]
        bands = []
        for band, total in enumerate(totals):
            high = 2.0 ** (top_octave - (len(totals) - 1 - band))
            bands.append(Band(band, high / 2 if band else 0.0, high, kept.get(band, 0), total))
        return bands

    def _example(self, values: tuple[Any, ...]) -> Example:
        feature, kind, band, rank, value, sequence, position, start, tokens, act_at, act_value, document = values
        activations = [0.0] * len(tokens)
        for at, activation in zip(act_at, act_value, strict=True):
            activations[at] = activation
        return Example(
            feature=feature,
            kind=kind,
            band=band,
            rank=rank,
            value=value,
            sequence=sequence,
            position=position,
            start=start,
            peak=position - start,
            token_ids=tokens,
            tokens=self.strings.show(tokens),
            activations=activations,
            document=document,
        )

    def _matches(self, text: str) -> list[tuple[int, float]]:
        words = text.split()
        scores: dict[int, float] = {}
        for word in words:
            ids = self.strings.matching(word)
            if len(word) < 3:
                ids = [i for i in ids if self.strings.one(i).strip().casefold() == word.casefold()]
            for feature, score in self._ask(_MATCHES, [ids, ids]):
                scores[feature] = scores.get(feature, 0.0) + score
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))

    def _summarise(self, n_tokens: int, metrics: dict[str, float]) -> IndexSummary:
        r = self.record
        densities = np.array([d for (d,) in self._ask("SELECT density FROM rows WHERE count > 0")])
        n_rows = self._ask("SELECT count(*) FROM rows")[0][0]
        if n_rows != r.d_sae:
            raise _damaged(self.path, f"features.parquet has {n_rows} rows for {r.d_sae} latents")
        lowest = math.floor(math.log10(1 / max(n_tokens, 1)))
        edges = 10.0 ** np.arange(lowest, 0.01, 0.25)
        counts = np.histogram(densities, edges)[0]
        return IndexSummary(
            model=r.model,
            dictionary=r.dictionary,
            hook_name=r.hook_name,
            d_in=r.d_in,
            d_sae=r.d_sae,
            k=r.k,
            architecture=r.architecture,
            dataset=r.dataset,
            n_tokens=n_tokens,
            n_sequences=r.n_sequences,
            context=r.context,
            n_alive=len(densities),
            n_dead=r.d_sae - len(densities),
            density_histogram=([float(e) for e in edges], [int(c) for c in counts]),
            fingerprint=self._fingerprint,
            neuronpedia=r.neuronpedia,
            layers=tuple(sorted({layer for layer, _ in self._layers if layer is not None})),
            metrics=metrics,
        )


_MATCHES = """
WITH hit AS (
    SELECT feature, coalesce(sum(value) FILTER (token IN (SELECT unnest(?::INT[]))), 0) / sum(value) AS score
    FROM peaks GROUP BY feature
), said AS (
    SELECT feature, count(*) FILTER (token IN (SELECT unnest(?::INT[]))) / count(*) AS score
    FROM promoted GROUP BY feature
)
SELECT feature, hit.score + coalesce(said.score, 0) / 2 FROM hit LEFT JOIN said USING (feature)
WHERE hit.score + coalesce(said.score, 0) > 0
"""


def _totals(path: Path) -> tuple[int, dict[str, float]]:
    """Tokens counted, and the dictionary's metrics if they were known."""
    if not (path / "summary.json").exists():
        raise _damaged(path, "summary.json is missing")
    metrics = read_json(path / "metrics.json") if (path / "metrics.json").exists() else {}
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return int(read_json(path / "summary.json")["n_tokens"]), numbers


def _damaged(path: Path, error: object) -> ArtifactError:
    return ArtifactError(f"The feature index {path} is damaged: {error}", fix="Build it again (microtome index)")
