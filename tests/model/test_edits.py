"""Edits: each against the same change made by a plain hook function, on all kinds of models; padding, gradients, means."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tests.model.families import KINDS, make
from torch import Tensor

from microtome.common.errors import ModelError
from microtome.model import HookedModel, HookPoint, edits
from microtome.model.names import PATTERN, ROUTED
from microtome.text import TokenDataset

TOKENS = torch.tensor([[0, 17, 45, 80, 301, 12, 33], [0, 9, 9, 250, 61, 7, 100], [0, 3, 8, 13, 21, 34, 55]])
EVERY = pytest.mark.parametrize("kind", list(KINDS))
Z, POST, RESID = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"
PATTERNS, SCORES = "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


@cache
def model_of(kind: str) -> HookedModel:
    return make(kind)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen_at(model: HookedModel, name: str, made: list[edits.Edit], tokens: Tensor = TOKENS) -> Tensor:
    """What is at a point after the edits."""
    with model.edited(made):
        return model.run_with_cache(tokens, name)[1][name]


# ---- each kind against a plain twin -------------------------------------------------------------------------------------


def _at(change: Callable[[Tensor], Tensor], *index: Any) -> Callable[[Tensor, HookPoint], Tensor]:
    def plain(act: Tensor, hook: HookPoint) -> Tensor:
        act = act.clone()
        act[index] = change(act[index])
        return act

    return plain


ALL = slice(None)
DIRECTIONS = noise(2, 32, seed=5)
Q = torch.linalg.qr(DIRECTIONS.T)[0]
UNIT = DIRECTIONS[0] / DIRECTIONS[0].norm()
TWINS = {
    "zero": (edits.zero(Z, head=3), Z, _at(torch.zeros_like, ALL, ALL, 3)),
    "zero neurons": (edits.zero(POST, units=[5, 60], rows=[1]), POST, _at(torch.zeros_like, 1, ALL, [5, 60])),
    "mean": (
        edits.mean(Z, noise(4, 8), head=2, positions=[4]),
        Z,
        _at(noise(4, 8)[2].expand_as, ALL, 4, 2),
    ),
    "mean of a head": (edits.mean(Z, noise(8), head=1), Z, _at(noise(8).expand_as, ALL, ALL, 1)),
    "scale": (edits.scale(RESID, 0.5, positions=slice(2, 5), rows=0), RESID, _at(lambda x: x * 0.5, 0, slice(2, 5))),
    "steer": (edits.steer(RESID, noise(32), scale=3, rows=[0, 2]), RESID, _at(lambda x: x + 3.0 * noise(32), [0, 2])),
    "patch": (
        edits.patch(RESID, noise(3, 7, 32), positions=[-1, 1]),
        RESID,
        _at(lambda x: noise(3, 7, 32)[:, [6, 1]], ALL, [6, 1]),
    ),
    "patch by the list": (
        edits.patch(RESID, noise(1, 2, 32), positions=[-1, 1], rows=[2]),
        RESID,
        _at(lambda x: noise(1, 2, 32)[0], 2, [6, 1]),
    ),
    "clamp": (edits.clamp(POST, min=-0.1, max=0.2), POST, _at(lambda x: x.clamp(-0.1, 0.2), ALL)),
    "clamp along": (
        edits.clamp(RESID, max=-1.0, direction=DIRECTIONS[0], positions=[3]),
        RESID,
        _at(lambda x: x + ((x @ UNIT).clamp(max=-1.0) - x @ UNIT)[..., None] * UNIT, ALL, 3),
    ),
    "project_out": (edits.project_out(RESID, DIRECTIONS, rows=[1]), RESID, _at(lambda x: x - x @ Q @ Q.T, 1)),
    "fn": (edits.fn(Z, lambda act, hook: act.flip(2), positions=[2]), Z, _at(lambda x: x.flip(1), ALL, 2)),
    "zero a pattern": (
        edits.zero(PATTERNS, heads=[0, 2], positions=[5], units=[1]),
        PATTERNS,
        _at(torch.zeros_like, ALL, [0, 2], 5, 1),
    ),
    "knock out a key": (
        edits.clamp(SCORES, max=-torch.inf, positions=slice(3, None), units=[-5], head=1),
        SCORES,
        _at(lambda x: x * 0 - torch.inf, ALL, 1, slice(3, None), 2),
    ),
    "steer scores": (edits.steer(SCORES, 2.0, units=[0]), SCORES, _at(lambda x: x + 2.0, ALL, ALL, ALL, 0)),
}


@pytest.mark.parametrize("case", list(TWINS))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_is_the_hook_function_it_stands_for(kind: str, case: str) -> None:
    edit, name, plain = TWINS[case]
    model = model_of(kind)
    wanted = model.run_with_hooks(TOKENS, [(name, plain)])
    with model.edited(edit):
        found = model(TOKENS)
    if case in ("clamp along", "project_out"):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, wanted)
    assert not torch.equal(found, model(TOKENS))


@EVERY
def test_what_is_not_addressed_does_not_change_by_a_bit(kind: str) -> None:
    """At every point in turn, some numbers of one row: the rest of the point and the other rows' logits stay."""
    model = model_of(kind)
    clean, cache = model.run_with_cache(TOKENS, lambda name: True)
    for name in model.resolve(lambda name: not name.startswith(("blocks.0", "blocks.2"))):
        before = cache[str(name)]
        if name.axes == ROUTED or not before.is_floating_point() or len(before) == 1:
            continue
        heads = {"heads": [-1]} if len(name.axes) == 4 else {}
        units = {"units": [0, -1]} if name.axes != PATTERN else {"units": [1, 4]}
        made = edits.scale(name, 1.5, rows=[1], positions=[2, 5], **heads, **units)  # type: ignore[arg-type]
        with model.edited(made):
            logits, after = model.run_with_cache(TOKENS, str(name))
        mask = torch.zeros_like(before, dtype=torch.bool)
        if name.axes == PATTERN:
            index = [[1], [3], [2, 5], [1, 4]]
        else:
            index = [[1], [2, 5], *([[before.shape[2] - 1]] if heads else []), [0, before.shape[-1] - 1]]
        mask[torch.meshgrid(*map(torch.tensor, index), indexing="ij")] = True
        assert torch.equal(after[str(name)][~mask], before[~mask]), name
        torch.testing.assert_close(after[str(name)][mask], before[mask] * 1.5)
        if kind == "mixtral":  # other tokens are routed, so the experts' products have other sizes
            torch.testing.assert_close(logits[[0, 2]], clean[[0, 2]])
        else:
            assert torch.equal(logits[[0, 2]], clean[[0, 2]]), name


@EVERY
def test_rows_are_separate_runs(kind: str) -> None:
    """Three interventions as one batch, each on a row of its own, are the three runs."""
    model = model_of(kind)
    places: list[dict[str, Any]] = [
        {"name": Z, "head": 2},
        {"name": RESID, "positions": [-2]},
        {"name": "blocks.0.hook_mlp_out"},
    ]
    same = TOKENS[:1].repeat(3, 1)
    with model.edited([edits.zero(**place, rows=i) for i, place in enumerate(places)]):
        together = model(same)
    for i, place in enumerate(places):
        with model.edited(edits.zero(**place)):
            alone = model(same)[i]
        if kind == "mixtral":  # which rows share an expert's product changes its rounding
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(together[i], alone)


@EVERY
def test_a_points_own_value_changes_nothing_and_anothers_gives_the_other_run(kind: str) -> None:
    model = model_of(kind)
    clean, own = model.run_with_cache(TOKENS, lambda name: True)
    points = [name for name in model.resolve(lambda name: True) if name.axes != ROUTED]
    with model.edited([edits.patch(name, own) for name in points]):
        assert torch.equal(model(TOKENS), clean)
    wanted, other = model.run_with_cache(TOKENS.flip(0), "blocks.*.hook_resid_pre")
    for layer in range(3):
        with model.edited(edits.patch(f"blocks.{layer}.hook_resid_pre", other)):
            assert torch.equal(model(TOKENS), wanted)
    with model.edited(edits.patch("blocks.[12].hook_resid_pre", other)):
        assert torch.equal(model(TOKENS), wanted)


def test_tokens_can_be_patched_and_resampled() -> None:
    model = model_of("llama")
    with model.edited(edits.patch("hook_tokens", TOKENS.flip(0), rows=[0])):
        assert torch.equal(model(TOKENS)[0], model(TOKENS.flip(0))[0])


def test_a_neuron_of_an_expert_is_zeroed_for_the_tokens_routed_to_it() -> None:
    model = model_of("mixtral")
    name = "blocks.1.mlp.experts.2.hook_post"
    seen = seen_at(model, name, [edits.zero(name, units=[7])])
    clean = model.run_with_cache(TOKENS, name)[1][name]
    assert len(clean)
    assert torch.equal(seen[:, 7], torch.zeros(len(clean)))
    assert torch.equal(seen[:, :7], clean[:, :7])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_half_precision_is_edited_in_half_precision_and_summed_in_single(kind: str) -> None:
    model = make(kind, torch.bfloat16)
    clean = model.run_with_cache(TOKENS, RESID)[1][RESID]
    seen = seen_at(model, RESID, [edits.steer(RESID, noise(32), rows=[1], positions=[3])])
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen[1, 3], clean[1, 3] + noise(32).bfloat16())
    seen[1, 3] = clean[1, 3]
    assert torch.equal(seen, clean)
    left = seen_at(model, RESID, [edits.project_out(RESID, DIRECTIONS)])
    wanted = clean.float() - clean.float() @ Q @ Q.T
    torch.testing.assert_close(left, wanted.bfloat16(), rtol=1e-2, atol=1e-3)


def test_keys_that_cannot_be_seen_stay_hidden() -> None:
    model = model_of("llama")
    for made in (edits.zero(SCORES), edits.clamp(SCORES, min=0.5), edits.scale(SCORES, -1.0), edits.steer(SCORES, 1.0)):
        pattern = seen_at(model, PATTERNS, [made])
        assert torch.equal(pattern, pattern.tril())
        torch.testing.assert_close(pattern.sum(-1), torch.ones(3, 4, 7))
    even = seen_at(model, PATTERNS, [edits.zero(SCORES)])
    torch.testing.assert_close(even[:, :, 6], torch.full((3, 4, 7), 1 / 7))


def test_resampling_gives_each_row_anothers() -> None:
    model = model_of("llama")
    source = model.run_with_cache(TOKENS, RESID)[1]
    seen = seen_at(model, RESID, [edits.resample(RESID, source, seed=1)])
    came = [next(j for j in range(3) if torch.equal(row, source[RESID][j])) for row in seen]
    assert sorted(came) == [0, 1, 2]
    assert all(i != j for i, j in enumerate(came))
    again = seen_at(model, RESID, [edits.resample(RESID, source, seed=1)])
    assert torch.equal(seen, again)


def test_nothing_is_left_along_projected_out_directions() -> None:
    dependent = torch.stack([DIRECTIONS[0], DIRECTIONS[1], DIRECTIONS[0] - 2 * DIRECTIONS[1]])
    seen = seen_at(model_of("llama"), RESID, [edits.project_out(RESID, dependent)])
    assert (seen @ DIRECTIONS.T).abs().max() < 1e-4
    head = seen_at(model_of("llama"), Z, [edits.project_out(Z, noise(8), head=1)])
    assert (head[:, :, 1] @ noise(8)).abs().max() < 1e-5


def test_edits_act_in_their_order_and_nest() -> None:
    model = model_of("llama")
    first, second = edits.steer(RESID, noise(32)), edits.scale(RESID, 2.0)
    clean = model.run_with_cache(TOKENS, RESID)[1][RESID]
    with model.edited([first, second]) as listed:
        assert listed == [first, second]
        assert torch.equal(model.run_with_cache(TOKENS, RESID)[1][RESID], (clean + noise(32)) * 2)
    with model.edited(second), model.edited(first):
        assert torch.equal(model.run_with_cache(TOKENS, RESID)[1][RESID], clean * 2 + noise(32))


# ---- padding and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [[-1], [1, 2], slice(-2, None), slice(1, -1)], ids=str)
def test_positions_count_in_each_rows_own_text(tiny_llama: HookedModel, side: Any, positions: Any) -> None:
    texts = ["The cat sat on the mat, and", "def main(", "Goal! Two minutes"]
    vector = noise(32)
    batch = tiny_llama.prompts(texts, side=side)
    assert batch.mask is not None
    with tiny_llama.edited(edits.steer("blocks.0.hook_resid_post", vector, positions=positions)):
        together = tiny_llama(batch)
        for text, row, there in zip(texts, together, batch.mask, strict=True):
            alone = tiny_llama(text)[0]
            torch.testing.assert_close(row[there], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [RESID, PATTERNS.replace("pattern", "z"), "blocks.1.ln2.hook_normalized"])
def test_gradients_reach_the_vector_and_are_the_finite_differences(name: str) -> None:
    model = make("gpt2", torch.float64)  # the library norms Llama in float32
    size = 8 if name == Z else 32
    vector = noise(size).double().requires_grad_()
    step = noise(size, seed=1).double() * 1e-5

    def value(v: Tensor) -> Tensor:
        with model.edited(edits.steer(name, v, scale=0.5, rows=[1], positions=[3])):
            return model(TOKENS).log_softmax(-1)[1, -1, 5]

    value(vector).backward()
    assert vector.grad is not None
    with torch.no_grad():
        difference = value(vector + step) - value(vector - step)
    torch.testing.assert_close(2 * (vector.grad * step).sum(), difference, rtol=1e-5, atol=1e-12)


def test_gradients_at_an_edited_point_are_those_behind_the_edit() -> None:
    model = model_of("llama")

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].sum()

    with model.edited(edits.scale(RESID, 2.0)):
        value, acts, grads = model.gradients(TOKENS, RESID, metric)
    plain = model.gradients(TOKENS, RESID, metric)
    patched = model.run_with_hooks(TOKENS, [(RESID, lambda act, hook: act * 2)])
    torch.testing.assert_close(value, metric(patched))
    assert torch.equal(acts[RESID], plain[1][RESID] * 2)
    assert not torch.equal(grads[RESID], plain[2][RESID])


# ---- means --------------------------------------------------------------------------------------------------------------


def test_means_are_those_of_all_activations(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    names = [RESID, Z]
    found = edits.mean_of(tiny_llama, tiny_dataset, names, batch=32)
    tokens = torch.from_numpy(tiny_dataset.batch(0, tiny_dataset.n_sequences))
    every = tiny_llama.activations(tokens, names)
    for name in names:
        torch.testing.assert_close(found[name], every[name].double().mean((0, 1)), rtol=1e-6, atol=1e-7)
    with tiny_llama.edited(edits.mean(Z, found, head=1)):
        seen = tiny_llama.activations(tokens[:2], Z)[Z]
    assert torch.equal(seen[:, :, 1], found[Z][1].float().expand(2, 24, 8))


def test_means_leave_padding_and_other_positions_out(tiny_llama: HookedModel) -> None:
    texts = ["The cat sat on the mat", "Goal!"]
    found = edits.mean_of(tiny_llama, texts, RESID, positions=slice(1, None), batch=1)[RESID]
    rows = torch.cat([tiny_llama.activations(text, RESID)[RESID][0, 1:] for text in texts])
    torch.testing.assert_close(found, rows.double().mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="no mean over positions"):
        edits.mean_of(tiny_llama, texts, PATTERNS)
