"""The state of one pass over sparse codes, for all latents at once.

1. `update` takes the codes of a batch of sequences, sorts them by (latent, sequence, position), and reduces the runs:
   counts, exact sums, maxima, histogram, and for each (sequence, latent) its peak.
2. A peak that may belong to the top examples of its latent, or to the sample of its band, is kept with its window's
   activations.
3. `merge` joins the states of two workers. Everything kept is a set, an integer or a maximum, so the result has the
   same bits for any number of workers, in any order, with any batches.

Nothing here is as large as latents × vocabulary or latents × tokens: a state of 65,536 latents takes about 0.3 GB.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64, UInt64

from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.features.config import BINS, BINS_PER_OCTAVE, OCTAVES, IndexConfig, histogram_edges
from microtome.features.exact import ExactSum
from microtome.features.reservoir import OPEN, Entries, Reservoir, ragged, runs

_LOW = np.uint64(0xFFFF_FFFF)
_LARGEST = 2.0**20


@dataclass(frozen=True)
class _Peaks:
    """The firings of a batch, sorted by (latent, sequence, position), and their runs of one (latent, sequence) pair."""

    feature: Int64[np.ndarray, "n"]
    position: Int64[np.ndarray, "n"]
    value: Float32[np.ndarray, "n"]
    starts: Int64[np.ndarray, "run"]
    lengths: Int64[np.ndarray, "run"]
    # One a run:
    latent: Int64[np.ndarray, "run"]
    sequence: Int64[np.ndarray, "run"]
    peak: Float32[np.ndarray, "run"]
    peak_at: Int64[np.ndarray, "run"]


class FeatureSummary:
    """Statistics and examples of `d_sae` latents over some sequences of a token dataset.

    `n_tokens` counts the positions that were encoded; `covered` lists the sequence ranges seen, sorted and joined. A
    state that is merged with one of the same sequences raises InputError: they would count twice.
    """

    def __init__(self, d_sae: int, context: int, config: IndexConfig) -> None:
        require(config.histogram_top is not None, "A summary needs histogram_top", expected="an exponent of two")
        require(context <= 32767, "The context is too long for an index", got=context, expected="at most 32,767 tokens")
        self.d_sae, self.context, self.config = d_sae, context, config
        self.bottom = (config.histogram_top or 0) - OCTAVES
        self.inner = np.array(histogram_edges(OCTAVES)[1:BINS_PER_OCTAVE], np.float32)
        """The edges inside an octave, as multiples of its lower end."""
        self.n_tokens = 0
        self.covered: list[tuple[int, int]] = []
        self.count = np.zeros(d_sae, np.int64)
        self.n_sequences = np.zeros(d_sae, np.int64)
        self.maximum = np.zeros(d_sae, np.float32)
        self.sum = ExactSum.zeros(d_sae)
        self.squares = ExactSum.zeros(d_sae)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.octaves = np.zeros((d_sae, OCTAVES), np.int64)
        """Sequences by the octave of their peak."""
        self.top = Reservoir(d_sae, config.top, lambda e: e.feature.astype(np.int64), distinct=True)
        self.sample = Reservoir(d_sae * config.bands, config.per_band, self._band_group)
        self._sample_limits = np.full((d_sae, OCTAVES), OPEN if config.per_band else 0, np.uint64)

    def update(
        self,
        first: int,
        tokens: Int[np.ndarray, "sequences context"],
        counted: Bool[np.ndarray, "sequences context"],
        indices: Int[np.ndarray, "tokens k"],
        values: Float32[np.ndarray, "tokens k"],
    ) -> None:
        """Add sequences `first`, `first` + 1, …: their tokens, and the codes of the `counted` positions, row by row.

        A value of 0 (or below) is no firing. Raises InputError, and adds nothing, for values that are not finite or
        above 2**20, for latents that are not there, and for sequences that were seen before.
        """
        firing = self._sorted_firings(first, counted, indices, values)
        self._cover([(first, first + len(counted))])
        self.n_tokens += len(indices)
        if len(firing.value):
            self._count(firing)
            self._offer(firing, first, tokens)

    def _sorted_firings(
        self,
        first: int,
        counted: Bool[np.ndarray, "sequences context"],
        indices: Int[np.ndarray, "tokens k"],
        values: Float32[np.ndarray, "tokens k"],
    ) -> _Peaks:
        cells = np.flatnonzero(counted)
        if len(cells) != len(indices):
            raise InputError("The codes do not fit the counted positions", got=len(indices), expected=len(cells))
        if len(values) and not np.isfinite(values.max()):
            raise InputError("Some activations are not finite", got=values.max(), fix="Check the dictionary's weights")
        if len(values) and values.max() > _LARGEST:
            raise InputError("An activation is too large", got=values.max(), expected=f"at most {_LARGEST:,.0f}")
        row, column = np.nonzero(values > 0)
        latent = indices[row, column].astype(np.int64)
        if len(latent) and (latent.min() < 0 or latent.max() >= self.d_sae):
            raise InputError("A code names a latent that is not there", expected=f"latents 0…{self.d_sae - 1}")
        key = latent * counted.size + cells[row]
        by = np.argsort(key)
        key, value = key[by], np.ascontiguousarray(values[row, column][by], np.float32)
        pair, position = np.divmod(key, self.context)
        starts = runs(pair)
        # The bits of positive floats are ordered as they are; below them, the earliest position wins a tie.
        packed = (value.view(np.int32).astype(np.int64) << 16) | (self.context - 1 - position)
        best = np.maximum.reduceat(packed, starts) if len(starts) else packed
        run_latent, run_sequence = np.divmod(pair[starts], len(counted)) if len(counted) else (starts, starts)
        return _Peaks(
            feature=key // max(counted.size, 1),
            position=position,
            value=value,
            starts=starts,
            lengths=np.diff(starts, append=len(key)),
            latent=run_latent,
            sequence=run_sequence + first,
            peak=(best >> 16).astype(np.int32).view(np.float32),
            peak_at=self.context - 1 - (best & 0xFFFF),
        )

    def _count(self, firing: _Peaks) -> None:
        starts = runs(firing.feature)
        latents = firing.feature[starts]
        self.count[latents] += np.diff(starts, append=len(firing.feature))
        wide = firing.value.astype(np.float64)
        self.sum.add(latents, wide, starts)
        self.squares.add(latents, wide * wide, starts)
        pair_starts = runs(firing.latent)
        self.n_sequences[latents] += np.diff(pair_starts, append=len(firing.latent))
        self.maximum[latents] = np.maximum(self.maximum[latents], np.maximum.reduceat(firing.peak, pair_starts))
        np.add.at(self.histogram.reshape(-1), firing.feature * BINS + self.bin(firing.value), 1)
        np.add.at(self.octaves.reshape(-1), firing.latent * OCTAVES + self.octave(firing.peak), 1)

    def octave(self, values: Float32[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Which of the histogram's 16 octaves each value lies in; values beyond it count to the nearest."""
        exponent = (values.view(np.int32) >> 23).astype(np.int64) - 127
        return np.asarray(np.clip(exponent - self.bottom, 0, OCTAVES - 1))

    def bin(self, values: Float32[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Which bin of the histogram each value lies in, exactly by the float32 edges."""
        fraction = (values.view(np.int32) & 0x7FFFFF) | 0x3F800000  # the value, moved to its place in [1, 2)
        bins = self.octave(values) * BINS_PER_OCTAVE
        for edge in self.inner.view(np.int32):
            bins += fraction >= edge
        exponent = values.view(np.int32) >> 23
        bins[exponent - 127 < self.bottom] = 0
        bins[exponent - 127 >= self.bottom + OCTAVES] = BINS - 1
        return bins

    def band(self, latent: Int64[np.ndarray, "*n"], octave: Int64[np.ndarray, "*n"]) -> Int64[np.ndarray, "*n"]:
        """The band of a peak in `octave`: that of the latent's maximum is the last, each octave below one less."""
        below = self.octave(self.maximum)[latent] - octave
        return np.asarray(np.clip(self.config.bands - 1 - below, 0, self.config.bands - 1))

    def _band_group(self, entries: Entries) -> Int64[np.ndarray, "n"]:
        latent = entries.feature.astype(np.int64)
        return np.asarray(latent * self.config.bands + self.band(latent, self.octave(entries.value)))

    def _offer(self, firing: _Peaks, first: int, tokens: Int[np.ndarray, "sequences context"]) -> None:
        keys = window_keys(tokens, min(self.config.window, self.context))
        sequence = firing.sequence.astype(np.uint64)
        bits = firing.peak.view(np.uint32).astype(np.uint64)
        order = ((_LOW - bits) << np.uint64(32)) | sequence
        enters = np.flatnonzero(order < self.top.limits[firing.latent])
        self.top.offer(self._cut(firing, order, enters, first, keys))
        order = (_hash(sequence, firing.latent.astype(np.uint64), self.config.seed) << np.uint64(32)) | sequence
        enters = np.flatnonzero(order < self._sample_limits[firing.latent, self.octave(firing.peak)])
        if self.sample.offer(self._cut(firing, order, enters, first, keys)):
            self._refresh_sample_limits()

    def _refresh_sample_limits(self) -> None:
        """The bands' limits, by octave. An octave above a latent's maximum so far has none: it will shift the bands."""
        latent, octave = np.divmod(np.arange(self.d_sae * OCTAVES, dtype=np.int64), OCTAVES)
        limits = self.sample.limits[latent * self.config.bands + self.band(latent, octave)]
        limits[octave > self.octave(self.maximum)[latent]] = OPEN if self.config.per_band else 0
        self._sample_limits = limits.reshape(self.d_sae, OCTAVES)

    def window_start(self, position: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Where the window of a peak begins: `lead` tokens before it, moved to lie within the sequence."""
        last = max(self.context - self.config.window, 0)
        return np.asarray(np.clip(position - self.config.lead, 0, last))

    def _cut(
        self,
        firing: _Peaks,
        order: UInt64[np.ndarray, "run"],
        chosen: Int64[np.ndarray, "m"],
        first: int,
        keys: UInt64[np.ndarray, "sequences start"],
    ) -> Entries:
        """The chosen runs as entries, with the firings that lie in their windows."""
        begin = self.window_start(firing.peak_at[chosen])
        lengths = firing.lengths[chosen]
        at = ragged(firing.starts[chosen], lengths)
        owner = np.repeat(np.arange(len(chosen), dtype=np.int64), lengths)
        offset = firing.position[at] - begin[owner]
        inside = (offset >= 0) & (offset < self.config.window)
        return Entries(
            feature=firing.latent[chosen].astype(np.int32),
            order=order[chosen],
            value=firing.peak[chosen],
            position=firing.peak_at[chosen].astype(np.int32),
            key=keys[firing.sequence[chosen] - first, begin],
            ends=np.cumsum(np.bincount(owner[inside], minlength=len(chosen))).astype(np.int64),
            act_at=offset[inside].astype(np.int16),
            act_value=firing.value[at[inside]],
        )

    def settle(self) -> None:
        """Bring the state into its canonical form: equal contents have equal bits."""
        self.top.settle()
        self.sample.settle()
        self._refresh_sample_limits()

    def _cover(self, ranges: list[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(self.covered + [r for r in ranges if r[0] < r[1]]):
            if joined and start < joined[-1][1]:
                again = f"sequences {start}…{min(stop, joined[-1][1]) - 1}"
                raise InputError("Some sequences are already counted", got=again)
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        self.covered = joined

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as named arrays, canonical; `from_arrays` is the inverse. They belong to the state: copy to
        edit.
        """
        self.settle()
        plain = ("count", "n_sequences", "maximum", "histogram", "octaves")
        state: dict[str, np.ndarray] = {name: getattr(self, name) for name in plain}
        for name, exact in (("sum", self.sum), ("squares", self.squares)):
            state |= {f"{name}.whole": exact.whole, f"{name}.fraction": exact.fraction}
        for name, reservoir in (("top", self.top), ("sample", self.sample)):
            state |= {f"{name}.{key}": array for key, array in reservoir.kept.arrays().items()}
        state["covered"] = np.array(self.covered, np.int64).reshape(-1, 2)
        state["n_tokens"] = np.array([self.n_tokens], np.int64)
        return state

    @classmethod
    def from_arrays(cls, state: dict[str, np.ndarray], context: int, config: IndexConfig) -> "FeatureSummary":
        state = {name: array.copy() for name, array in state.items()}
        new = cls(len(state["count"]), context, config)
        for name in ("count", "n_sequences", "maximum", "histogram", "octaves"):
            setattr(new, name, state[name])
        new.sum = ExactSum(state["sum.whole"], state["sum.fraction"])
        new.squares = ExactSum(state["squares.whole"], state["squares.fraction"])
        for name, reservoir in (("top", new.top), ("sample", new.sample)):
            reservoir.kept = Entries(**{key: state[f"{name}.{key}"] for key in Entries.empty().arrays()})
        new.covered = [(int(start), int(stop)) for start, stop in state["covered"]]
        new.n_tokens = int(state["n_tokens"][0])
        new.settle()
        return new


def merge(a: FeatureSummary, b: FeatureSummary) -> FeatureSummary:
    """The state of both: as if one worker had seen all the sequences. `a` and `b` stay as they are.

    Raises InputError when the two have other settings, or sequences in common.
    """
    if (a.d_sae, a.context, a.config) != (b.d_sae, b.context, b.config):
        raise InputError("These summaries have different settings", got=b.config, expected=a.config)
    both = FeatureSummary(a.d_sae, a.context, a.config)
    both._cover(a.covered + b.covered)  # noqa: SLF001 – its own class
    both.n_tokens = a.n_tokens + b.n_tokens
    both.count, both.n_sequences = a.count + b.count, a.n_sequences + b.n_sequences
    both.maximum = np.maximum(a.maximum, b.maximum)
    both.sum, both.squares = a.sum.plus(b.sum), a.squares.plus(b.squares)
    both.histogram, both.octaves = a.histogram + b.histogram, a.octaves + b.octaves
    for part in (a, b):
        part.settle()
        both.top.offer(part.top.kept)
        both.sample.offer(part.sample.kept)
    both.settle()
    return both


def window_keys(tokens: Int[np.ndarray, "sequences context"], window: int) -> UInt64[np.ndarray, "sequences start"]:
    """A 64-bit hash of the tokens of every window, by its start: Σ mix(token) · b^place, the place counted in the
    window.

    All windows come from one running sum over the whole sequence, divided by b^start (b is odd, so modulo 2**64 it can
    be).
    """
    base, inverse = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    context = tokens.shape[1]
    powers = np.cumprod(np.array([1] + [base] * (context - 1), np.uint64), dtype=np.uint64)
    back = np.cumprod(np.array([1] + [inverse] * (context - window), np.uint64), dtype=np.uint64)
    sums = np.zeros((len(tokens), context + 1), np.uint64)
    np.cumsum(_mix(tokens.astype(np.uint64) + np.uint64(1)) * powers, axis=1, dtype=np.uint64, out=sums[:, 1:])
    return np.asarray((sums[:, window:] - sums[:, : context + 1 - window]) * back)


def _hash(sequence: UInt64[np.ndarray, "n"], latent: UInt64[np.ndarray, "n"], seed: int) -> UInt64[np.ndarray, "n"]:
    """32 bits that look random, a function of the three numbers alone."""
    x = _mix(latent * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF))
    return _mix(x + sequence) >> np.uint64(32)


def _mix(x: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers after which every bit depends on all."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
