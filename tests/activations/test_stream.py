"""The shuffled stream: every row once an epoch, mixed, bounded, seeded, resumed exactly; from a store and from the model."""

import gc
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.activations import (
    ActivationSource,
    ActivationStream,
    ArraySource,
    HarvestConfig,
    ModelSource,
    StoreSource,
    StreamConfig,
    harvest,
)
from microtome.common.config import JsonObject
from microtome.common.errors import ConfigError, InputError
from microtome.model import HookedModel
from microtome.text import TokenDataset

HOOK = "blocks.2.hook_resid_pre"


class CountingSource(ActivationSource):
    """Rows that are their own numbers, and a count of what was read."""

    hook_names, widths, model_name = ("here",), (2,), "none"

    def __init__(self, sizes: list[int]) -> None:
        self.n_blocks, self.reads = len(sizes), Counter[int]()
        self.sizes = np.array(sizes)

    @property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return self.sizes

    def read(self, block: int) -> Float[Tensor, "row d"]:
        self.reads[block] += 1
        first = int(self.sizes[:block].sum())
        numbers = torch.arange(first, first + int(self.sizes[block]), dtype=torch.float32)
        return torch.stack([numbers, -numbers], 1)

    def describe(self) -> JsonObject:
        return {}


SIZES = [7, 12, 1, 30, 9, 5, 16, 0, 20, 4, 11, 25, 8, 3, 9]


def numbers(stream: ActivationStream, n_batches: int) -> list[int]:
    batches = [next(stream) for _ in range(n_batches)]
    assert all(torch.equal(batch[:, 0], -batch[:, 1]) for batch in batches)
    return [int(n) for batch in batches for n in batch[:, 0]]


@pytest.mark.parametrize("buffer_size", [8, 16, 40, 160, 0])
def test_every_row_comes_equally_often(buffer_size: int) -> None:
    """160 rows in batches of 4. Rows still in the buffer apart, after e epochs' worth each was given e times."""
    stream = ActivationStream(CountingSource(SIZES), StreamConfig(batch_size=4, buffer_size=buffer_size))
    given = Counter(numbers(stream, 160 * 5 // 4))
    held = Counter(stream._held[np.setdiff1d(np.arange(stream.buffer_size), stream._free)].tolist())
    assert set(given) == set(range(160))
    total = given + held
    assert max(total.values()) - min(total.values()) <= 1


def test_the_order_is_mixed_and_belongs_to_the_seed() -> None:
    def order(seed: int) -> list[int]:
        return numbers(
            ActivationStream(CountingSource([10] * 40), StreamConfig(batch_size=8, buffer_size=128, seed=seed)), 40
        )

    assert order(1) == order(1) != order(2)
    steps = np.abs(np.diff(order(1)))
    assert np.median(steps) > 40, "neighbours in the source are not neighbours in the stream"


@pytest.mark.parametrize("n", [1, 5, 19, 40, 133])
def test_skipping_is_exact_and_reads_only_the_buffer(n: int) -> None:
    config = StreamConfig(batch_size=4, buffer_size=24, seed=3)
    whole = ActivationStream(CountingSource(SIZES), config)
    expected = numbers(whole, n + 50)[4 * n :]
    source = CountingSource(SIZES)
    resumed = ActivationStream(source, config)
    resumed.skip(n)
    assert sum(source.reads.values()) <= 24
    assert numbers(resumed, 50) == expected


def test_a_stream_that_nobody_holds_is_freed_at_once() -> None:
    """Its buffer can be the largest thing in a process, and would else wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        stream = ActivationStream(CountingSource(SIZES), StreamConfig(batch_size=16))
        next(stream)
        gone = weakref.ref(stream)
        del stream
        assert gone() is None
    finally:
        gc.enable()


def test_a_block_is_read_about_once_an_epoch() -> None:
    source = CountingSource([10] * 40)
    stream = ActivationStream(source, StreamConfig(batch_size=8, buffer_size=64))
    numbers(stream, 200)
    assert sum(source.reads.values()) <= 40 * 4 + 7  # four epochs, and what fills the buffer


def test_store_and_model_give_the_same_batches_without_special_tokens(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    part = tiny_dataset.slice(0, 37)
    store = harvest(tiny_llama, part, HOOK, tmp_path / "s", config=HarvestConfig(dtype="fp32", batch_tokens=96))
    config = StreamConfig(batch_size=16, buffer_size=64)
    from_store = ActivationStream(StoreSource(store, sequences_per_block=4), config)
    from_model = ActivationStream(ModelSource(tiny_llama, part, HOOK, sequences_per_block=4), config)
    tokens = part.batch(0, 37)
    special = np.isin(tokens, part.special_ids)
    assert special[:, 0].all()
    assert special[:, 1:].any(), "the data has separators, or the test shows nothing"
    assert from_store.n_rows == from_model.n_rows == (~special).sum()
    for _ in range(2 * from_store.n_rows // 16):
        torch.testing.assert_close(next(from_store), next(from_model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stops_the_stream_when_it_is_read(bad: float) -> None:
    rows = torch.ones(64, 3)
    rows[37, 1] = bad
    stream = ActivationStream(ArraySource(rows, hook_names="here", rows_per_block=8), StreamConfig(batch_size=8))
    with pytest.raises(InputError, match=r"at here hold NaN or infinity.*row 5 of block 4"):
        next(stream)


def test_finite_rows_whose_sum_overflows_are_no_error() -> None:
    rows = torch.full((16, 4), 3e38)
    assert torch.equal(next(ActivationStream(ArraySource(rows), StreamConfig(batch_size=4))), rows[:4])
    half = torch.full((16, 4), 60_000.0, dtype=torch.float16)
    assert torch.equal(next(ActivationStream(ArraySource(half), StreamConfig(batch_size=4))), half[:4])


@pytest.mark.parametrize(("d", "rows"), [(2, 262_144), (4096, 262_144), (14_336, 73_728), (1 << 21, 4096)])
def test_the_buffer_that_nobody_sized_is_bounded_in_bytes(d: int, rows: int) -> None:
    """2³⁰ numbers at most, in whole pairs of batches; one pair in any case."""

    class Wide(CountingSource):
        widths = (d,)

    assert ActivationStream(Wide([1 << 20])).buffer_size == rows


def test_a_source_shorter_than_a_batch_and_bad_configs() -> None:
    with pytest.raises(InputError, match="fewer activations than one batch"):
        ActivationStream(CountingSource([5, 6]), StreamConfig(batch_size=16))
    with pytest.raises(ConfigError, match="two batches"):
        StreamConfig(batch_size=16, buffer_size=20)
