"""The one-pass state against a plain loop over dense activations, and against itself for any split among workers."""

import itertools

import numpy as np
import pytest

from microtome.common.errors import ConfigError, InputError
from microtome.features import FeatureSummary, IndexConfig, merge
from microtome.features.config import BINS, OCTAVES, histogram_edges
from microtome.features.summary import window_keys
from microtome.features.write import band_sequences, choose_examples

D_SAE, CONTEXT, N, K = 24, 20, 60, 5
NO_TOKENS = np.zeros((1, CONTEXT), np.int64)
CONFIG = IndexConfig(top=4, bands=3, per_band=2, window=8, histogram_top=5, seed=3)


class Data:
    """Random codes of N sequences: some positions are not counted, some latents are dead, rare or everywhere; values
    tie.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = rng.integers(0, 50, (N, CONTEXT))
        self.tokens[20:26] = self.tokens[20]  # text that repeats, with other values
        self.counted = rng.random((N, CONTEXT)) > 0.1
        self.counted[:, 0] = False
        self.counted[7] = False
        popularity = rng.gamma(0.4, 1.0, D_SAE)
        popularity[3] = 0.0
        dense = rng.gamma(1.0, 2.0, (N, CONTEXT, D_SAE)) * (rng.random((N, CONTEXT, D_SAE)) < popularity * 0.3)
        dense[:, :, 5] = rng.gamma(2.0, 1.0, (N, CONTEXT))
        # Coarse values, so that many are equal; and a wide range, so that bands and bins are filled.
        dense = np.where(dense > 0, 2.0 ** (np.minimum(np.round(dense * 4) / 4, 7.5) - 3), 0.0)
        dense[:, :, 3] = 0.0
        rank = np.argsort(-dense, axis=2, kind="stable")[:, :, :K]
        self.dense = np.zeros_like(dense, dtype=np.float32)
        np.put_along_axis(self.dense, rank, np.take_along_axis(dense, rank, 2).astype(np.float32), 2)
        self.dense[~self.counted] = 0.0
        self.indices = rank.astype(np.int32)
        self.values = np.take_along_axis(self.dense, rank, 2)

    def window(self, sequence: int, position: int) -> bytes:
        begin = min(max(position - CONFIG.lead, 0), CONTEXT - CONFIG.window)
        return self.tokens[sequence, begin : begin + CONFIG.window].tobytes()

    def summary(self, ranges: list[tuple[int, int]], batch: int = 7, config: IndexConfig = CONFIG) -> FeatureSummary:
        state = FeatureSummary(D_SAE, CONTEXT, config)
        for start, stop in ranges:
            for first in range(start, stop, batch):
                rows = slice(first, min(first + batch, stop))
                mask = self.counted[rows]
                state.update(first, self.tokens[rows], mask, self.indices[rows][mask], self.values[rows][mask])
        return state


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


@pytest.fixture(scope="module")
def whole(data: Data) -> FeatureSummary:
    state = data.summary([(0, N)])
    state.settle()
    return state


def assert_same_bits(a: FeatureSummary, b: FeatureSummary) -> None:
    left, right = a.arrays(), b.arrays()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def test_statistics_equal_a_plain_loop(data: Data, whole: FeatureSummary) -> None:
    edges = np.array(histogram_edges(5)[1:-1], np.float32)
    assert whole.n_tokens == data.counted.sum()
    for f in range(D_SAE):
        fired = data.dense[:, :, f][data.dense[:, :, f] > 0].astype(np.float64)
        assert whole.count[f] == len(fired)
        assert whole.n_sequences[f] == sum(data.dense[s, :, f].max() > 0 for s in range(N))
        assert whole.maximum[f] == max(fired, default=0)
        np.testing.assert_allclose(whole.sum.total()[f], sum(fired), rtol=1e-10)
        np.testing.assert_allclose(whole.squares.total()[f], sum(fired**2), rtol=1e-10)
        bins = [0] * BINS
        for value in fired:
            bins[sum(edge <= value for edge in edges)] += 1
        assert whole.histogram[f].tolist() == bins


def plain_band(peak: float, strongest: float) -> int:
    """Counted in octaves below the strongest peak, from the definition."""
    below = int(np.floor(np.log2(strongest)) - max(np.floor(np.log2(peak)), 5 - OCTAVES))
    return max(CONFIG.bands - 1 - below, 0)


def test_examples_equal_a_plain_loop(data: Data, whole: FeatureSummary) -> None:
    chosen = choose_examples(whole)
    entries = chosen.entries
    starts = entries.ends - entries.lengths
    for f in range(D_SAE):
        dense = data.dense[:, :, f]
        peaks = sorted((-dense[s].max(), s, int(dense[s].argmax())) for s in range(N) if dense[s].max() > 0)
        mine = np.flatnonzero((entries.feature == f) & (chosen.band < 0))
        first_of = {data.window(s, p): (v, s, p) for v, s, p in reversed(peaks)}
        distinct = [peak for peak in peaks if peak in first_of.values()]
        got = [(-float(entries.value[i]), int(entries.sequence[i]), int(entries.position[i])) for i in mine]
        assert got == [(float(v), s, p) for v, s, p in distinct[: CONFIG.top]]
        assert chosen.rank[mine].tolist() == list(range(len(mine)))
        in_bands = [0] * CONFIG.bands
        for value, _, _ in peaks:
            in_bands[plain_band(-value, -peaks[0][0])] += 1
        assert band_sequences(whole)[f].tolist() == in_bands
        for i in np.flatnonzero(entries.feature == f):
            s, p = int(entries.sequence[i]), int(entries.position[i])
            begin = min(max(p - CONFIG.lead, 0), CONTEXT - CONFIG.window)
            window = dense[s, begin : begin + CONFIG.window]
            run = slice(starts[i], entries.ends[i])
            assert entries.act_at[run].tolist() == np.flatnonzero(window).tolist()
            assert entries.act_value[run].tolist() == window[window > 0].tolist()


def test_samples_are_the_smallest_hashes_of_their_band(data: Data, whole: FeatureSummary) -> None:
    # Keep everything once: the hashes of all peaks are then known, and the smallest of each band must be what was kept.
    config = IndexConfig(top=1, bands=3, per_band=1000, window=8, histogram_top=5, seed=3)
    everything = data.summary([(0, N)], config=config)
    everything.settle()
    every, kept = everything.sample.kept, whole.sample.kept
    assert len(every) == whole.n_sequences.sum()
    for f in range(D_SAE):
        for band in range(CONFIG.bands):
            all_here = [
                int(every.order[i])
                for i in np.flatnonzero(every.feature == f)
                if plain_band(float(every.value[i]), float(whole.maximum[f])) == band
            ]
            here = [
                int(kept.order[i])
                for i in np.flatnonzero(kept.feature == f)
                if plain_band(float(kept.value[i]), float(whole.maximum[f])) == band
            ]
            assert here == sorted(all_here)[: CONFIG.per_band]


def test_samples_depend_on_the_seed_and_not_on_place(data: Data) -> None:
    other = IndexConfig(top=4, bands=3, per_band=2, window=8, histogram_top=5, seed=4)
    a, b = data.summary([(0, N)]), data.summary([(0, N)], config=other)
    a.settle()
    b.settle()
    assert a.sample.kept.sequence.tolist() != b.sample.kept.sequence.tolist()
    assert a.top.kept.arrays()["order"].tolist() == b.top.kept.arrays()["order"].tolist()
    drawn = np.bincount(a.sample.kept.sequence, minlength=N)
    assert drawn[: N // 2].sum() > 0
    assert drawn[N // 2 :].sum() > 0


@pytest.mark.parametrize("batch", [1, 2, 13, 60])
def test_batches_do_not_matter(data: Data, whole: FeatureSummary, batch: int) -> None:
    assert_same_bits(whole, data.summary([(0, N)], batch=batch))


def test_workers_and_their_order_do_not_matter(data: Data, whole: FeatureSummary) -> None:
    cuts = [(0, 11), (11, 12), (12, 40), (40, N)]
    for order in itertools.permutations(cuts):
        states = [data.summary([part], batch=5) for part in order]
        left = states[0]
        for state in states[1:]:
            left = merge(left, state)
        assert_same_bits(whole, left)
    a, b, c, d = (data.summary([part]) for part in cuts)
    assert_same_bits(merge(merge(a, b), merge(c, d)), merge(a, merge(merge(d, b), c)))


@pytest.mark.parametrize("seed", range(12))
def test_random_splits(data: Data, whole: FeatureSummary, seed: int) -> None:
    rng = np.random.default_rng(seed)
    borders = [0, *sorted(rng.choice(np.arange(1, N), rng.integers(1, 9), replace=False).tolist()), N]
    parts = [borders[i : i + 2] for i in range(len(borders) - 1)]
    owner = rng.integers(0, 3, len(parts))
    states = [
        data.summary([(a, b) for (a, b), o in zip(parts, owner, strict=True) if o == w], batch=int(rng.integers(1, 30)))
        for w in rng.permutation(3)
    ]
    assert_same_bits(whole, merge(states[0], merge(states[1], states[2])))


def test_many_pending_entries_are_sorted_in_early(
    whole: FeatureSummary, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microtome.features.reservoir.PENDING", 3)
    assert_same_bits(whole, data.summary([(0, N)], batch=2))


def test_merging_nothing_changes_nothing(data: Data, whole: FeatureSummary) -> None:
    assert_same_bits(whole, merge(FeatureSummary(D_SAE, CONTEXT, CONFIG), whole))


def test_saved_and_read_back(data: Data, whole: FeatureSummary) -> None:
    half = data.summary([(0, 30)])
    again = FeatureSummary.from_arrays(half.arrays(), CONTEXT, CONFIG)
    assert_same_bits(half, again)
    assert again.covered == [(0, 30)]
    assert_same_bits(whole, merge(again, data.summary([(30, N)])))
    again.count += 1
    assert again.count.tolist() != half.count.tolist()


def test_the_same_sequences_do_not_count_twice(data: Data) -> None:
    state = data.summary([(0, 10), (20, 30)])
    assert state.covered == [(0, 10), (20, 30)]
    with pytest.raises(InputError, match="already counted"):
        merge(state, data.summary([(29, 31)]))
    with pytest.raises(InputError, match="already counted"):
        state.update(
            5, data.tokens[5:6], data.counted[5:6], data.indices[5][data.counted[5]], data.values[5][data.counted[5]]
        )
    assert merge(state, data.summary([(10, 20)])).covered == [(0, 30)]


def test_other_settings_do_not_merge(data: Data) -> None:
    other = IndexConfig(top=4, bands=3, per_band=2, window=8, histogram_top=6)
    with pytest.raises(InputError, match="different settings"):
        merge(data.summary([(0, 2)]), data.summary([(2, 4)], config=other))


@pytest.mark.parametrize(("value", "says"), [(np.nan, "not finite"), (np.inf, "not finite"), (2.0**21, "too large")])
def test_impossible_values(value: float, says: str) -> None:
    state = FeatureSummary(D_SAE, CONTEXT, CONFIG)
    values = np.array([[1.0, value]], np.float32)
    with pytest.raises(InputError, match=says):
        state.update(0, NO_TOKENS, _one_position(), np.array([[0, 1]], np.int32), values)


def test_latents_that_are_not_there_and_codes_that_do_not_fit() -> None:
    state = FeatureSummary(D_SAE, CONTEXT, CONFIG)
    with pytest.raises(InputError, match="latent that is not there"):
        state.update(0, NO_TOKENS, _one_position(), np.array([[D_SAE]], np.int32), np.ones((1, 1), np.float32))
    assert (state.n_tokens, state.covered) == (0, [])
    with pytest.raises(InputError, match="do not fit"):
        FeatureSummary(D_SAE, CONTEXT, CONFIG).update(
            0, NO_TOKENS, _one_position(), np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
        )


def _one_position() -> np.ndarray:
    counted = np.zeros((1, CONTEXT), np.bool_)
    counted[0, 4] = True
    return counted


def test_equal_windows_have_equal_keys() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (40, 12))
    keys = window_keys(tokens, 4)
    assert keys.shape == (40, 9)
    by_key: dict[int, set[bytes]] = {}
    for s, start in np.ndindex(keys.shape):
        by_key.setdefault(int(keys[s, start]), set()).add(tokens[s, start : start + 4].tobytes())
    assert all(len(windows) == 1 for windows in by_key.values())
    assert len(by_key) == len({w for windows in by_key.values() for w in windows}) > 50


@pytest.mark.parametrize("top", [-3, 5, 20])
def test_bins_are_those_of_the_edges(top: int) -> None:
    state = FeatureSummary(1, CONTEXT, IndexConfig(histogram_top=top))
    edges = np.array(histogram_edges(top), np.float32)
    rng = np.random.default_rng(0)
    values = np.concatenate([edges, np.nextafter(edges, 0), np.exp2(rng.uniform(-40, 30, 5000)), [1e-45, 1e-38]])
    values = values.astype(np.float32)
    assert state.bin(values).tolist() == np.searchsorted(edges[1:-1], values, side="right").tolist()


def test_values_beyond_the_histogram_count_to_its_ends() -> None:
    state = FeatureSummary(2, CONTEXT, CONFIG)
    values = np.array([[1e-30, 1e5]], np.float32)
    state.update(0, NO_TOKENS, _one_position(), np.array([[0, 1]], np.int32), values)
    assert (state.histogram[0, 0], state.histogram[1, -1]) == (1, 1)
    assert (state.octaves[0, 0], state.octaves[1, -1]) == (1, 1)
    assert len(choose_examples(state).entries) == 2


def test_settings_are_checked() -> None:
    for wrong in ({"top": 0}, {"window": 0}, {"bands": 17}, {"before": 32}, {"per_band": -1}, {"histogram_top": 500}):
        with pytest.raises(ConfigError):
            IndexConfig(**wrong)
    with pytest.raises(ConfigError, match="histogram_top"):
        FeatureSummary(4, 8, IndexConfig())
