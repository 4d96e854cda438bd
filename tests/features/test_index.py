"""The reader: lists, filters, features, examples, search, and what it says of damaged folders."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.features import FeatureIndex, open_index

from .tiny import BOS, D_SAE, DEAD, N_SEQUENCES, WORDS, make_codes, make_tokenizer, make_tokens


def test_summary(tiny_index: FeatureIndex) -> None:
    summary = tiny_index.summary
    assert (summary.d_sae, summary.n_dead, summary.n_alive) == (D_SAE, len(DEAD), D_SAE - len(DEAD))
    assert summary.metrics["fvu"] == 0.12
    assert sum(summary.density_histogram[1]) == summary.n_alive
    assert repr(tiny_index).startswith("FeatureIndex(")
    assert len(tiny_index) == D_SAE


def test_the_fingerprint_is_of_what_is_written(tiny_path: Path, tmp_path: Path) -> None:
    older = shutil.copytree(tiny_path, tmp_path / "older")
    head = json.loads((older / "config.json").read_text(encoding="utf-8"))
    del head["config"]["layers"]  # as before there was this field
    (older / "config.json").write_text(json.dumps(head), encoding="utf-8")
    written = json.dumps(head["config"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with open_index(older) as index:
        assert index.summary.fingerprint == hashlib.sha256(written.encode()).hexdigest()[:16]


def test_rows_equal_plain_statistics(tiny_index: FeatureIndex) -> None:
    tokenizer = make_tokenizer()
    tokens = make_tokens(tokenizer)
    indices, values = make_codes(tokens, tokenizer)
    dense = np.zeros((len(indices), D_SAE))
    np.put_along_axis(dense, indices.astype(np.int64), values, axis=1)
    rows = tiny_index.features(sort="feature", descending=False, alive=None).rows
    assert [r.feature for r in rows] == list(range(D_SAE))
    for r in rows:
        fired = dense[dense[:, r.feature] > 0, r.feature]
        per_sequence = dense[:, r.feature].reshape(N_SEQUENCES, -1).max(axis=1)
        assert (r.count, r.n_sequences) == (len(fired), int(np.count_nonzero(per_sequence)))
        assert r.density == len(fired) / len(dense)
        if len(fired):
            np.testing.assert_allclose([r.mean, r.std, r.max], [fired.mean(), fired.std(), fired.max()], rtol=2e-6)
        else:
            assert (r.mean, r.std, r.max, r.top_token, r.top_token_string) == (0, 0, 0, -1, "")


def test_sorts_pages_and_filters(tiny_index: FeatureIndex) -> None:
    everything = tiny_index.features(sort="max", limit=D_SAE).rows
    assert [r.max for r in everything] == sorted((r.max for r in everything), reverse=True)
    pages = [r for start in range(0, D_SAE, 10) for r in tiny_index.features(sort="max", offset=start, limit=10).rows]
    assert pages == everything
    middle = everything[len(everything) // 2].max
    strong = tiny_index.features(min_max=middle)
    assert strong.total == sum(r.max >= middle for r in everything)
    assert all(r.max >= middle for r in strong.rows)
    low, high = 0.02, 0.05
    between = tiny_index.features(min_density=low, max_density=high)
    assert between.total == sum(low <= r.density <= high for r in everything) > 0
    assert {r.feature for r in tiny_index.features(alive=False).rows} == set(DEAD)
    assert tiny_index.features(alive=None).total == D_SAE


def test_unknown_statistic_lists_the_nearest(tiny_index: FeatureIndex) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'density'"):
        tiny_index.features(sort="densiti")
    with pytest.raises(ConfigError, match="Unknown statistic"):
        tiny_index.features(sort="density; DROP TABLE rows")
    assert tiny_index.features().total > 0


def test_search_finds_the_latents_of_a_word(tiny_index: FeatureIndex) -> None:
    for latent, word in WORDS.items():
        assert tiny_index.search(word.strip().upper())[0].feature == latent
        assert latent in {r.feature for r in tiny_index.features(token=word.strip()).rows}
        assert latent in {r.feature for r in tiny_index.features(text=word).rows}
    assert tiny_index.search("zzzzqq") == []
    assert tiny_index.features(token="'; DROP TABLE rows; --").total == 0


def test_feature_has_its_parts(tiny_index: FeatureIndex) -> None:
    feature = tiny_index.feature(1)
    assert feature.row.top_token_string == " court"
    assert sum(feature.histogram.counts) == feature.row.count
    assert len(feature.histogram.edges) == len(feature.histogram.counts) + 1
    assert len(feature.top_logits) == len(feature.bottom_logits) == len(feature.neighbours) == 10
    assert feature.top_logits[0].value > 0 > feature.bottom_logits[0].value
    assert 1 not in [n.feature for n in feature.neighbours]
    assert sum(band.of for band in feature.bands) == feature.row.n_sequences
    assert feature.bands[-1].low <= feature.row.max < feature.bands[-1].high
    samples = tiny_index.examples(1, "sample")
    for band in feature.bands:
        inside = [e for e in samples if e.band == band.band]
        assert len(inside) == band.sampled <= band.of
        assert all(band.low <= e.value < band.high for e in inside)


def test_examples_show_their_window(tiny_index: FeatureIndex) -> None:
    examples = tiny_index.examples(1, limit=100)
    assert len(examples) == 12 == tiny_index.feature(1).n_top
    assert [e.value for e in examples] == sorted((e.value for e in examples), reverse=True)
    assert tiny_index.examples(1, limit=3, offset=2) == examples[2:5]
    tokens = make_tokens(make_tokenizer())
    for e in examples:
        assert len(e.tokens) == len(e.activations) == len(e.token_ids) == 16
        assert max(e.activations) == e.activations[e.peak] == e.value
        assert e.token_ids == tokens[e.sequence, e.start : e.start + 16].tolist()
        assert e.document == f"texts.txt#{e.sequence}"


def test_dead_latents_are_honest(tiny_index: FeatureIndex) -> None:
    dead = tiny_index.feature(DEAD[0])
    assert not dead.row.alive
    assert (dead.histogram.counts, dead.bands, dead.n_top) == ([], [], 0)
    assert tiny_index.examples(DEAD[0]) == tiny_index.examples(DEAD[0], "sample") == []
    assert len(dead.top_logits) == 10


def test_out_of_range_and_unknown_kind(tiny_index: FeatureIndex) -> None:
    for wrong in (-1, D_SAE):
        with pytest.raises(InputError, match="no such latent"):
            tiny_index.feature(wrong)
        with pytest.raises(InputError, match="no such latent"):
            tiny_index.examples(wrong)
    with pytest.raises(ConfigError, match="kind of example"):
        tiny_index.examples(0, "best")


def test_threads_may_share_an_index(tiny_index: FeatureIndex) -> None:
    expected = [tiny_index.examples(f) for f in range(D_SAE)]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(f for f in range(D_SAE) if tiny_index.examples(f) != expected[f])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.parametrize(
    "name", ["features.parquet", "histogram.parquet", "examples.parquet", "tokenizer.json", "summary.json"]
)
def test_missing_and_damaged_files(tiny_path: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "index"
    shutil.copytree(tiny_path, copy)
    (copy / name).write_bytes(b"{not this")
    with pytest.raises(ArtifactError, match=r"damaged"):
        open_index(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=r"damaged|missing"):
        open_index(copy)


def test_a_cut_table_is_an_error_when_it_is_read(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "index"
    shutil.copytree(tiny_path, copy)
    with open_index(copy) as index:
        (copy / "examples.parquet").write_bytes(b"PAR1")
        with pytest.raises(ArtifactError, match="damaged"):
            index.examples(3)


def test_a_closed_index_says_so(tiny_path: Path) -> None:
    with open_index(tiny_path) as index:
        assert index.feature(1).row.feature == 1
    with pytest.raises(InputError, match="is closed"):
        index.feature(1)
    index.close()


def test_missing_unfinished_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no feature_index"):
        open_index(tmp_path / "none")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(ArtifactError, match="not finished"):
        open_index(tmp_path / "half")


def test_browsing_needs_no_torch(tiny_path: Path) -> None:
    code = (
        f"import sys, microtome.features as f; i = f.open_index({str(tiny_path)!r}); i.feature(1); i.examples(1);"
        "i.search('a');"
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_bos_is_never_a_peak(tiny_index: FeatureIndex) -> None:
    bos = tiny_index.record.bos_id
    assert tiny_index.tokens_to_strings([bos or 0]) == [BOS]
    for f in range(D_SAE):
        for e in tiny_index.examples(f):
            assert e.position > 0
            assert e.token_ids[e.peak] != bos
