"""Writes an index's Parquet files: sorted by latent, in row groups of few latents, so that a reader touches only one.

`features.parquet` has a row a latent, `histogram.parquet` a row for each bin that is not empty, `examples.parquet` a
row an example. Token ids are stored, not strings.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32, Int64, Integer, UInt64

from microtome.common.artifacts import atomic_file
from microtome.features.reservoir import Entries, ragged, rank_in_runs
from microtome.features.summary import FeatureSummary

FEATURES, HISTOGRAM, EXAMPLES = "features.parquet", "histogram.parquet", "examples.parquet"
_GROUP = 256
"""Latents in a row group."""
_FEW_VALUES = ["kind", "band", "document"]
"""Columns worth a dictionary; the others are smaller without one."""

Tokens = Integer[np.ndarray, "sequences context"]
DocumentOf = Callable[[int, int], str | None]


@dataclass(frozen=True)
class WeightFacts:
    """What the index says of each latent from its weights alone; row i is latent i."""

    top_logit_ids: Int32[np.ndarray, "d_sae logits"]
    top_logit_values: Float32[np.ndarray, "d_sae logits"]
    bottom_logit_ids: Int32[np.ndarray, "d_sae logits"]
    bottom_logit_values: Float32[np.ndarray, "d_sae logits"]
    neighbour_ids: Int32[np.ndarray, "d_sae neighbours"]
    neighbour_cosines: Float32[np.ndarray, "d_sae neighbours"]
    encoder_norm: Float32[np.ndarray, " d_sae"]
    decoder_norm: Float32[np.ndarray, " d_sae"]
    bias: Float32[np.ndarray, " d_sae"]


@dataclass(frozen=True)
class Examples:
    """The rows of `examples.parquet`: sorted by latent, then top before samples, then band, then rank."""

    entries: Entries
    band: Int64[np.ndarray, "n"]
    rank: Int64[np.ndarray, "n"]


def write_tables(
    folder: Path,
    summary: FeatureSummary,
    facts: WeightFacts,
    tokens: Tokens,
    document_of: DocumentOf | None = None,
) -> None:
    """Write the three Parquet files into `folder`. `tokens` are those of the dataset that was summarised.

    `document_of(sequence, position)` names the document a token is from, or None.
    """
    examples = choose_examples(summary)
    _write(folder / FEATURES, _feature_tables(summary, facts, top_tokens(summary, examples, tokens)))
    _write(folder / HISTOGRAM, _histogram_tables(summary))
    _write(folder / EXAMPLES, _example_tables(summary, examples, tokens, document_of))


def choose_examples(summary: FeatureSummary) -> Examples:
    """The top examples, and the samples of each band without those whose window is already among the top."""
    summary.settle()
    top, sample = summary.top.kept, summary.sample.kept
    in_top = np.isin(_named(sample), _named(top))
    sample = sample.take(np.flatnonzero(~in_top))
    latent = sample.feature.astype(np.int64)
    band = summary.band(latent, summary.octave(sample.value))
    top_rank, sample_rank = rank_in_runs(top.feature.astype(np.int64)), rank_in_runs(latent * 1000 + band)
    both = Entries.concat([top, sample])
    bands = np.concatenate([np.full(len(top), -1, np.int64), band])
    ranks = np.concatenate([top_rank, sample_rank])
    by = np.lexsort((ranks, bands, both.feature))
    return Examples(both.take(by), bands[by], ranks[by])


def _named(entries: Entries) -> UInt64[np.ndarray, "n"]:
    """One number for a latent and a window."""
    return np.asarray(entries.key ^ (entries.feature.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))


def top_tokens(summary: FeatureSummary, examples: Examples, tokens: Tokens) -> Int32[np.ndarray, " d_sae"]:
    """For each latent, the token with the most activation, summed over the windows of its top examples; −1 if dead.

    Of equal sums the smaller id wins. An exact sum over all tokens would need a table of latents × vocabulary.
    """
    top = examples.entries.take(np.flatnonzero(examples.band < 0))
    owner = np.repeat(np.arange(len(top), dtype=np.int64), top.lengths)
    start = summary.window_start(top.position.astype(np.int64))
    token = tokens[top.sequence[owner], start[owner] + top.act_at].astype(np.int64)
    key = top.feature[owner].astype(np.int64) * 2**32 + token
    by = np.argsort(key, kind="stable")
    pairs, starts = np.unique(key[by], return_index=True)
    sums = np.add.reduceat(top.act_value[by].astype(np.float64), starts) if len(starts) else np.zeros(0)
    latent, token = np.divmod(pairs, 2**32)
    best = np.lexsort((token, -sums, latent))
    best = best[rank_in_runs(latent[best]) == 0]
    result = np.full(summary.d_sae, -1, np.int32)
    result[latent[best]] = token[best]
    return result


def _feature_tables(
    summary: FeatureSummary, facts: WeightFacts, tokens: Int32[np.ndarray, " d_sae"]
) -> Iterator[pa.Table]:
    count = summary.count
    firings = np.maximum(count, 1)
    mean = summary.sum.total() / firings
    variance = np.maximum(summary.squares.total() / firings - mean**2, 0.0)
    columns: dict[str, pa.Array] = {
        "feature": np.arange(summary.d_sae, dtype=np.int32),
        "count": count,
        "n_sequences": summary.n_sequences,
        "density": count / max(summary.n_tokens, 1),
        "mean": mean.astype(np.float32),
        "std": np.sqrt(variance).astype(np.float32),
        "max": summary.maximum,
        "top_token": tokens,
    }
    columns |= {f.name: getattr(facts, f.name) for f in fields(facts)}
    columns["band_sequences"] = band_sequences(summary)
    table = pa.table({name: _column(values) for name, values in columns.items()})
    for start in range(0, summary.d_sae, _GROUP):
        yield table.slice(start, _GROUP)


def band_sequences(summary: FeatureSummary) -> Int64[np.ndarray, "d_sae bands"]:
    """In how many sequences each latent peaks in each of its bands."""
    latent, octave = np.divmod(np.arange(summary.octaves.size, dtype=np.int64), summary.octaves.shape[1])
    totals = np.zeros((summary.d_sae, summary.config.bands), np.int64)
    np.add.at(totals, (latent, summary.band(latent, octave)), summary.octaves.reshape(-1))
    return totals


def _column(values: np.ndarray) -> pa.Array:
    """A column of numbers, or of lists if `values` has two axes."""
    if values.ndim == 1:
        return pa.array(values)
    rows, width = values.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * np.int32(width))
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).reshape(-1)))


def _histogram_tables(summary: FeatureSummary) -> Iterator[pa.Table]:
    for start in range(0, summary.d_sae, _GROUP):
        part = summary.histogram[start : start + _GROUP]
        latent, bins = np.nonzero(part)
        columns = ((latent + start).astype(np.int32), bins.astype(np.int16), part[latent, bins])
        yield pa.table({name: pa.array(c) for name, c in zip(("feature", "bin", "count"), columns, strict=True)})


def _example_tables(
    summary: FeatureSummary, examples: Examples, tokens: Tokens, document_of: DocumentOf | None
) -> Iterator[pa.Table]:
    cuts = np.searchsorted(examples.entries.feature, np.arange(0, summary.d_sae + _GROUP, _GROUP))
    for start, stop in itertools.pairwise(cuts):
        rows = np.arange(start, stop, dtype=np.int64)
        part = Examples(examples.entries.take(rows), examples.band[rows], examples.rank[rows])
        yield _example_table(summary, part, tokens, document_of)


def _example_table(summary: FeatureSummary, part: Examples, tokens: Tokens, document_of: DocumentOf | None) -> pa.Table:
    entries = part.entries
    sequence, position = entries.sequence, entries.position.astype(np.int64)
    start = summary.window_start(position)
    width = min(summary.config.window, summary.context)
    window = ragged(start, np.full(len(entries), width, np.int64))
    window_tokens = tokens[np.repeat(sequence, width), window].astype(np.int32).reshape(-1, width)
    offsets = pa.array(np.concatenate([[0], entries.ends]).astype(np.int32))
    names = [document_of(int(s), int(p)) for s, p in zip(sequence, position, strict=True)] if document_of else None
    return pa.table(
        {
            "feature": pa.array(entries.feature),
            "kind": pa.array(np.where(part.band < 0, "top", "sample"), pa.string()),
            "band": pa.array(part.band.astype(np.int16)),
            "rank": pa.array(part.rank.astype(np.int16)),
            "value": pa.array(entries.value),
            "sequence": pa.array(sequence.astype(np.int32)),
            "position": pa.array(position.astype(np.int16)),
            "start": pa.array(start.astype(np.int16)),
            "token": pa.array(tokens[sequence, position].astype(np.int32)),
            "tokens": _column(window_tokens),
            "act_at": pa.ListArray.from_arrays(offsets, pa.array(entries.act_at)),
            "act_value": pa.ListArray.from_arrays(offsets, pa.array(entries.act_value)),
            "document": pa.array(names if names is not None else [None] * len(entries), pa.string()),
        }
    )


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    few = [name for name in _FEW_VALUES if name in schema.names]
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=9, use_dictionary=few)


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    """One row group a table, none left half-written."""
    with atomic_file(path) as temporary:
        writer: pq.ParquetWriter | None = None
        try:
            for table in tables:
                writer = writer or _writer(temporary, table.schema)
                writer.write_table(table, row_group_size=max(len(table), 1))
        finally:
            if writer is not None:
                writer.close()
