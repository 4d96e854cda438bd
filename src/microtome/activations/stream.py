"""`ActivationStream`: shuffled batches from a source, through a buffer of bounded size.

1. Each epoch visits the blocks of the source in a new order drawn from the seed.
2. Rows fill a buffer. When it is full it is put into a random order, one half is given out as batches, and new rows
   take the places that became free. A row is thus mixed with rows from all over the source, and given out exactly once
   an epoch.
3. Which row is in which place depends on row *numbers* only. So `skip(n)` replays the plan without reading data, then
   reads just the rows that the buffer holds at that moment: resuming is exact and quick.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.activations.source import ActivationSource
from microtome.common.config import require
from microtome.common.device import derive_seed
from microtome.common.errors import InputError

_BUFFER_NUMBERS = 1 << 30  # in a buffer whose size was not said: 4 GiB in fp32


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Rows per batch, rows in the buffer, and the seed of the order.

    A buffer_size of 0 means as many rows as the source has, up to 262,144 and up to 4 GiB of numbers of four bytes (rows
    of more than 4,096 numbers are fewer).
    """

    batch_size: int = 2048
    buffer_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size must be positive", got=self.batch_size)
        require(
            self.buffer_size == 0 or self.buffer_size >= 2 * self.batch_size,
            "The buffer must hold at least two batches",
            got=f"buffer_size {self.buffer_size}, batch_size {self.batch_size}",
        )


class ActivationStream:
    """An endless iterator of batches `[batch_size, d]` (in the source's dtype), epoch after epoch.

    Raises InputError when the source has fewer rows than one batch, and when a row is not finite.
    """

    def __init__(self, source: ActivationSource, config: StreamConfig | None = None) -> None:
        self.source, self.config = source, config or StreamConfig()
        self.n_rows = int(source.block_rows.sum())
        batch = self.config.batch_size
        if self.n_rows < batch:
            raise InputError(
                "The source has fewer activations than one batch",
                got=f"{self.n_rows} rows, batches of {batch}",
                fix="Use more text or a smaller batch_size",
            )
        most = min(262_144, _BUFFER_NUMBERS // source.d)
        wanted = self.config.buffer_size or min(most, max(self.n_rows, 2 * batch))
        self.buffer_size = max(wanted // (2 * batch), 1) * 2 * batch
        self._first_row = np.concatenate([[0], np.cumsum(source.block_rows)])
        self._order = _row_order(self._first_row, self.config.seed)
        self._left_over = np.empty(0, dtype=np.int64)  # rows of the order that did not fit into the last refill
        self._held = np.empty(self.buffer_size, dtype=np.int64)  # the number of the row in each place
        self._free = np.arange(self.buffer_size)
        self._pending: list[Int[np.ndarray, " batch"]] = []  # places of the batches to come
        self._cycle = 0
        self._buffer: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Float[Tensor, "batch d"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch d"]:
        if not self._pending:
            places = self._refill()
            self._load(places)
        assert self._buffer is not None
        return self._buffer.index_select(0, torch.from_numpy(self._pending.pop(0)).to(self._buffer.device))

    def skip(self, n_batches: int) -> None:
        """Go on as if `n_batches` had been taken, reading only what the buffer then holds."""
        for _ in range(n_batches):
            if not self._pending:
                self._refill()
            self._pending.pop(0)
        if n_batches:
            self._load(np.arange(self.buffer_size))

    def _refill(self) -> Int[np.ndarray, " place"]:
        """Give the free places new row numbers and plan the batches of half the buffer; returns the places that
        changed."""
        filled = self._free
        rows = [self._left_over]
        n = len(self._left_over)
        while n < len(filled):
            rows.append(next(self._order))
            n += len(rows[-1])
        entering = np.concatenate(rows)
        self._held[filled], self._left_over = entering[: len(filled)], entering[len(filled) :]
        shuffled = np.random.default_rng(derive_seed(self.config.seed, "buffer", self._cycle)).permutation(
            self.buffer_size
        )
        self._cycle += 1
        self._free = shuffled[: self.buffer_size // 2]
        self._pending = list(self._free.reshape(-1, self.config.batch_size))
        return filled

    def _load(self, places: Int[np.ndarray, " place"]) -> None:
        """Read the rows that `places` hold, each block once.

        The block of which rows are left over is kept for the next refill: reading it again may mean a forward pass.
        """
        places = places[np.argsort(self._held[places], kind="stable")]
        rows = self._held[places]
        blocks = np.searchsorted(self._first_row, rows, side="right") - 1
        unfinished = np.searchsorted(self._first_row, self._left_over[:1], side="right") - 1
        kept: dict[int, Tensor] = {}
        for some in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(blocks)) + 1):
            block = int(blocks[some[0]])
            data = self._kept[block] if block in self._kept else self._read(block)
            if block in unfinished:
                kept[block] = data
            if self._buffer is None:
                self._buffer = torch.empty(self.buffer_size, self.source.d, dtype=data.dtype, device=data.device)
            local = torch.from_numpy(rows[some] - self._first_row[block]).to(data.device)
            self._buffer.index_copy_(0, torch.from_numpy(places[some]).to(data.device), data.index_select(0, local))
        self._kept = kept

    def _read(self, block: int) -> Float[Tensor, "row d"]:
        data = self.source.read(block)
        # NaN and infinity stay in a row's sum, which is far cheaper than asking each number; but it may overflow by itself.
        if not bool(torch.isfinite(data.sum(1)).all()) and not bool(torch.isfinite(data).all()):
            row = int((~torch.isfinite(data).all(1)).nonzero()[0])
            raise InputError(
                f"The activations at {', '.join(self.source.hook_names)} hold NaN or infinity",
                got=f"row {row} of block {block}",
                fix="Read them in bf16 or fp32",
            )
        return data


def _row_order(first_row: Int[np.ndarray, " block_and_one"], seed: int) -> Iterator[Int[np.ndarray, " row"]]:
    """Row numbers in the order in which they enter the buffer, a block at a time, for ever."""
    for epoch in itertools.count():
        order = np.random.default_rng(derive_seed(seed, "blocks", epoch)).permutation(len(first_row) - 1)
        for block in order:
            yield np.arange(first_row[block], first_row[block + 1])
