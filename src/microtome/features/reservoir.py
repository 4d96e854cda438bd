"""Which examples to keep: of each group, the k with the smallest order.

An example stands for one (sequence, latent) pair and is kept with the activations in its window, cut from the batch in
hand, so nothing is read a second time. `order` is unique within a group and fixed by the pair alone. So what is kept is
a function of the set that was offered, whatever the batches, workers and merges were.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float32, Int16, Int32, Int64, UInt64

PENDING = 50_000
"""So many entries wait before they are sorted in (or as many as are kept, if that is more)."""
OPEN = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""The limit of a group that is not full: everything is below it."""


@dataclass(frozen=True)
class Entries:
    """Examples as columns. The activations in the windows lie one after another; each example's end at `ends`."""

    feature: Int32[np.ndarray, "n"]
    order: UInt64[np.ndarray, "n"]
    """The high 32 bits rank the example; the low ones are its sequence, which breaks ties."""
    value: Float32[np.ndarray, "n"]
    position: Int32[np.ndarray, "n"]
    key: UInt64[np.ndarray, "n"]
    """A hash of the window's tokens: examples of the same words have the same key."""
    ends: Int64[np.ndarray, "n"]
    act_at: Int16[np.ndarray, "m"]
    act_value: Float32[np.ndarray, "m"]

    def __len__(self) -> int:
        return len(self.feature)

    @property
    def sequence(self) -> Int64[np.ndarray, "n"]:
        return (self.order & np.uint64(0xFFFF_FFFF)).astype(np.int64)

    @property
    def lengths(self) -> Int64[np.ndarray, "n"]:
        return np.asarray(np.diff(self.ends, prepend=np.int64(0)))

    def take(self, rows: Int64[np.ndarray, "k"]) -> "Entries":
        lengths = self.lengths[rows]
        at = ragged(self.ends[rows] - lengths, lengths)
        columns = (self.feature[rows], self.order[rows], self.value[rows], self.position[rows], self.key[rows])
        return Entries(*columns, np.cumsum(lengths), self.act_at[at], self.act_value[at])

    def arrays(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def empty() -> "Entries":
        i64 = np.zeros(0, np.int64)
        i32, f32 = i64.astype(np.int32), i64.astype(np.float32)
        u64 = i64.astype(np.uint64)
        return Entries(i32, u64, f32, i32, u64, i64, i64.astype(np.int16), f32)

    @staticmethod
    def concat(parts: Sequence["Entries"]) -> "Entries":
        if len(parts) == 1:
            return parts[0]
        joined = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Entries)}
        joined["ends"] = np.cumsum(np.concatenate([p.lengths for p in parts]))
        return Entries(**joined)


def ragged(starts: Int64[np.ndarray, "n"], lengths: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "m"]:
    """The numbers starts[i] … starts[i] + lengths[i] − 1 of every i, in one array."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths))


class Reservoir:
    """The `size` entries of smallest order in each group. `group_of` gives the groups when it is time to choose.

    With `distinct`, entries of one group and one key count as one, the first of them in order.
    New entries wait in `pending` and are sorted in when they are many; `limits` (the order below which an entry may
    still enter its group) are as of then, so they may be too generous in between and never too strict.
    """

    def __init__(
        self, n_groups: int, size: int, group_of: Callable[[Entries], Int64[np.ndarray, "n"]], *, distinct: bool = False
    ) -> None:
        self.size, self.group_of, self.distinct = size, group_of, distinct
        self.limits: UInt64[np.ndarray, group] = np.full(n_groups, OPEN if size else 0, np.uint64)
        self.kept = Entries.empty()
        self._pending: list[Entries] = []
        self._waiting = 0

    def offer(self, entries: Entries) -> bool:
        """Add `entries`; True if they were sorted in and `limits` are new."""
        self._pending.append(entries)
        self._waiting += len(entries)
        if self._waiting > max(PENDING, len(self.kept)):
            self.settle()
            return True
        return False

    def settle(self) -> Entries:
        """Choose among all that was offered. What is kept is sorted by group, then order."""
        pool = Entries.concat([self.kept, *self._pending])
        self._pending, self._waiting = [], 0
        group = self.group_of(pool)
        by = np.lexsort((pool.order, group))
        if self.distinct:
            by = by[_firsts(group[by], pool.key[by])]
        rank = rank_in_runs(group[by])
        self.kept = pool.take(by[rank < self.size])
        group = self.group_of(self.kept)
        full = rank_in_runs(group) == self.size - 1
        self.limits[:] = OPEN if self.size else 0
        self.limits[group[full]] = self.kept.order[full]
        return self.kept


def _firsts(group: Int64[np.ndarray, "n"], key: UInt64[np.ndarray, "n"]) -> Int64[np.ndarray, "k"]:
    """Where each (group, key) pair stands for the first time, ascending."""
    by = np.lexsort((key, group))
    group, key = group[by], key[by]
    new = np.ones(len(by), np.bool_)
    new[1:] = (group[1:] != group[:-1]) | (key[1:] != key[:-1])
    return np.sort(by[new])


def runs(keys: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "run"]:
    """Where each run of equal keys begins."""
    if len(keys) == 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))


def rank_in_runs(keys: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """For each of sorted `keys`, how many equal ones stand before it."""
    starts = runs(keys)
    lengths = np.diff(starts, append=len(keys))
    return np.asarray(np.arange(len(keys), dtype=np.int64) - np.repeat(starts, lengths))
