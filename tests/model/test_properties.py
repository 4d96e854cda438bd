"""What holds for any family, batch, padding and edit, tried on random ones."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.families import KINDS, make
from torch import Tensor

from microtome.model import HookedModel, edits
from microtome.model.names import ROUTED, HookName
from microtome.model.prompts import Prompts

TRIES = settings(max_examples=150, deadline=None, derandomize=True)
NOT_EDITED = ("hook_tokens", "hook_pos_embed", "mlp.hook_expert_indices")


@cache
def model_of(kind: str) -> HookedModel:
    return make(kind)


@st.composite
def batches(draw: st.DrawFn, rows: int | None = None) -> Prompts:
    """One to four rows of up to nine tokens, some of them padded on one side."""
    n = rows or draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    side = draw(st.sampled_from(["left", "right"]))
    longest = max(lengths)
    tokens = torch.tensor([[draw(st.integers(3, 319)) for _ in range(longest)] for _ in range(n)])
    mask = torch.stack([torch.arange(longest) < length for length in lengths])
    mask = mask.flip(1) if side == "left" else mask
    return Prompts(tokens, None if bool(mask.all()) else mask)


def point_of(data: st.DataObject, model: HookedModel) -> HookName:
    """A point that can be edited, costly ones among them."""
    names = [name for name in model.resolve(lambda n: True) if name.point not in NOT_EDITED and name.axes != ROUTED]
    name: HookName = data.draw(st.sampled_from(names))
    return name


@TRIES
@given(st.data())
def test_reading_and_writing_back_change_no_bit(data: st.DataObject) -> None:
    model = model_of(data.draw(st.sampled_from(list(KINDS))))
    batch = data.draw(batches())
    name = point_of(data, model)
    clean, cache = model.run_with_cache(batch, [name, "blocks.*.hook_resid_post"])
    assert torch.equal(clean, model(batch))
    with model.edited(edits.patch(name, cache[str(name)].clone())):
        assert torch.equal(model(batch), clean)


@TRIES
@given(st.data())
def test_edits_of_rows_are_separate_runs(data: st.DataObject) -> None:
    """Each row with its own edit, as one batch, is each row run with that edit alone."""
    model = model_of(data.draw(st.sampled_from(list(KINDS))))
    batch = data.draw(batches(rows=3))
    name = point_of(data, model)
    factors = [0.5, 1.0, 2.0]
    together = [edits.scale(name, factor, rows=[row]) for row, factor in enumerate(factors) if factor != 1.0]
    with model.edited(together):
        all_rows = model(batch)
    for row, factor in enumerate(factors):
        with model.edited([edits.scale(name, factor)] if factor != 1.0 else []):
            close(model(batch)[row], all_rows[row], batch, row)


@TRIES
@given(st.data())
def test_the_stream_of_another_run_makes_this_one_that_run(data: st.DataObject) -> None:
    model = model_of(data.draw(st.sampled_from(list(KINDS))))
    batch = data.draw(batches())
    other = Prompts(batch.tokens.flip(0), batch.mask)
    layer = data.draw(st.integers(0, 2))
    wanted, cache = model.run_with_cache(other, f"blocks.{layer}.hook_resid_post")
    with model.edited(edits.patch(f"blocks.{layer}.hook_resid_post", cache)):
        assert torch.equal(model(batch), wanted)


@TRIES
@given(st.data())
def test_a_row_is_what_it_would_be_alone(data: st.DataObject) -> None:
    """Neither its companions nor its padding change a row."""
    model = model_of(data.draw(st.sampled_from(list(KINDS))))
    batch = data.draw(batches())
    logits = model(batch)
    for row in range(len(batch.tokens)):
        there = torch.ones_like(batch.tokens[row], dtype=torch.bool) if batch.mask is None else batch.mask[row]
        alone = model(batch.tokens[row][there][None])[0]
        torch.testing.assert_close(logits[row][there], alone, rtol=1e-3, atol=5e-4)


def close(found: Tensor, expected: Tensor, batch: Prompts, row: int) -> None:
    there = slice(None) if batch.mask is None else batch.mask[row]
    torch.testing.assert_close(found[there], expected[there], rtol=1e-3, atol=5e-4)
