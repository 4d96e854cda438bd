"""Edits: each against the same change made by a plain hook function, on all kinds of models; addresses, files, errors."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from tests.model.families import KINDS, make
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError, InputError, MicrotomeError, ModelError
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


# ---- as values ----------------------------------------------------------------------------------------------------------

LIST = [
    edits.zero(Z, head=3, rows=[0], positions=slice(2, None)),
    edits.mean(RESID, noise(32), positions=[-1]),
    edits.resample(RESID, noise(3, 7, 32), seed=4),
    edits.patch("blocks.*.hook_resid_pre", {f"blocks.{i}.hook_resid_pre": noise(3, 7, 32, seed=i) for i in range(3)}),
    edits.scale(POST, 0.5, units=[1, 2]),
    edits.steer(RESID, noise(32), scale=4),
    edits.clamp(POST, min=0.0),
    edits.clamp(SCORES, max=-torch.inf, units=[0], positions=slice(1, None)),
    edits.project_out(RESID, noise(2, 32)),
]


def test_a_list_is_saved_and_comes_back_the_same(tmp_path: Path) -> None:
    path = edits.save(tmp_path / "list.safetensors", LIST)
    loaded = edits.load(path)
    assert loaded == LIST
    model = model_of("llama")
    with model.edited(LIST):
        wanted = model(TOKENS)
    with model.edited(loaded):
        assert torch.equal(model(TOKENS), wanted)


def test_edits_compare_by_all_their_parts() -> None:
    assert edits.steer(RESID, noise(32)) == edits.steer(RESID, noise(32))
    others = [
        edits.steer(RESID, noise(32, seed=1)),
        edits.steer(RESID, noise(32), scale=2),
        edits.steer(RESID, noise(32), rows=0),
    ]
    assert all(edits.steer(RESID, noise(32)) != other for other in others)
    assert edits.zero(Z) != "zero"


def test_edits_print_what_they_do() -> None:
    assert repr(LIST[0]) == f"zero('{Z}', positions=slice(2, None, None), heads=[3], rows=[0])"
    assert repr(LIST[5]) == f"steer('{RESID}', vector=[32], scale=4)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: {**head, "more": 1}, "keys are others"),
        (lambda head: {**head, "format": 2}, "format version"),
        (lambda head: {**head, "edits": [{**head["edits"][0], "kind": "zap"}]}, "zap"),
        (lambda head: {**head, "edits": [{**head["edits"][0], "kind": "patch"}]}, "lacks a part"),
        (lambda head: {**head, "edits": [{**head["edits"][0], "where": {"row": [1]}}]}, "'rows'"),
        (lambda head: {**head, "edits": [{**head["edits"][0], "where": {"rows": ["a"]}}]}, "whole numbers"),
        (lambda head: {**head, "edits": [{**head["edits"][0], "numbers": {"factor": 1}}]}, "factor"),
        (lambda head: {**head, "edits": 3}, "list of edits"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = edits.save(tmp_path / "list.safetensors", LIST[:1])
    with safetensors.safe_open(str(path), "pt") as file:
        [(key, head)] = file.metadata().items()
    safetensors.torch.save_file({}, path, metadata={key: json.dumps(change(json.loads(head)))})
    with pytest.raises(ArtifactError, match=message):
        edits.load(path)


def test_no_file_another_file_and_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        edits.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ArtifactError, match="cannot be read"):
        edits.load(tmp_path / "text")
    safetensors.torch.save_file({"a": noise(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="holds no edits"):
        edits.load(tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="function cannot be saved"):
        edits.save(tmp_path / "code.safetensors", [edits.fn(Z, lambda act, hook: act)])


# ---- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_edit", "error", "message"),
    [
        (lambda: edits.zero("blocks.1.hook_resid_per"), ModelError, "hook_resid_pre"),
        (lambda: edits.zero(Z, head=4), InputError, "no such head.*0 to 3"),
        (lambda: edits.zero("blocks.1.attn.hook_v", head=2), InputError, "no such head.*0 to 1"),
        (lambda: edits.zero(RESID, head=0), InputError, "no heads"),
        (lambda: edits.zero(POST, units=[64]), InputError, "no such unit.*0 to 63"),
        (lambda: edits.zero(POST, rows=[3]), InputError, "row that is not in the batch.*0 to 2"),
        (lambda: edits.zero(POST, positions=[7]), InputError, "position.*-7 to 6"),
        (lambda: edits.zero(POST, positions=[-8]), InputError, "position.*-7 to 6"),
        (lambda: edits.steer(RESID, noise(31)), InputError, r"vector of steer.*\[31\].*batch, pos, 32"),
        (lambda: edits.patch(Z, noise(3, 7, 4, 9)), InputError, "source of patch"),
        (lambda: edits.patch(RESID, noise(2, 7, 32)), InputError, "number of rows.*1 or 3"),
        (lambda: edits.patch(RESID, noise(3, 5, 32)), InputError, "number of positions.*7, as the prompt"),
        (lambda: edits.project_out(RESID, noise(2, 31)), InputError, "directions of project_out"),
        (lambda: edits.zero("hook_tokens"), ModelError, "whole numbers.*patch"),
        (lambda: edits.steer(PATTERNS, 1.0), ModelError, "steer cannot be used"),
        (lambda: edits.steer(SCORES, noise(7)), InputError, "does not fit"),
        (lambda: edits.zero("blocks.1.ln1.hook_scale"), ModelError, "divides"),
        (lambda: edits.zero("blocks.*.hook_nothing"), ModelError, "matches"),
        (lambda: edits.zero("hook_tokens", units=[1]), ModelError, "whole numbers"),
        (lambda: edits.zero(Z, head=1, heads=[2]), ConfigError, "either head or heads"),
        (lambda: edits.zero(Z, row=1), ConfigError, "'rows'"),  # type: ignore[call-arg]
        (lambda: edits.zero(Z, rows=[]), ConfigError, "whole numbers"),
        (lambda: edits.zero(Z, rows=[1, 1]), ConfigError, "twice"),
        (lambda: edits.zero(Z, positions=slice(5, 1, -1)), ConfigError, "goes forward"),
        (lambda: edits.scale(Z, float("nan")), ConfigError, "factor must be a number"),
        (lambda: edits.clamp(Z), ConfigError, "min, a max or both"),
        (lambda: edits.clamp(Z, min=1, max=0), ConfigError, "in order"),
        (lambda: edits.clamp(Z, min=1, direction=noise(2, 8)), InputError, "direction"),
        (lambda: edits.clamp(Z, min=1, direction=noise(8), units=[1]), InputError, "units"),
        (lambda: edits.project_out(Z, torch.zeros(8)), InputError, "all zero"),
        (lambda: edits.project_out(Z, noise(8), units=[1]), InputError, "units"),
        (lambda: edits.steer(RESID, noise(32) / 0), InputError, "not finite"),
        (lambda: edits.resample(RESID, noise(1, 7, 32)), InputError, "several rows"),
        (lambda: edits.resample(RESID, noise(7, 32)), InputError, "source of resample"),
        (lambda: edits.patch("blocks.*.hook_z", {RESID: noise(3, 7, 32)}), ModelError, "Nothing in the cache"),
        (lambda: edits.fn(Z, lambda act, hook: act[:1]), ModelError, "another shape"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(
    make_edit: Callable[[], edits.Edit], error: type[MicrotomeError], message: str
) -> None:
    model = model_of("llama")
    clean = model(TOKENS)
    with pytest.raises(error, match=message), model.edited(make_edit()):
        model(TOKENS)
    assert torch.equal(model(TOKENS), clean)


def test_rows_and_positions_of_an_experts_tokens_are_refused() -> None:
    with (
        pytest.raises(InputError, match="no fixed places"),
        model_of("mixtral").edited(edits.zero("blocks.1.mlp.experts.2.hook_post", rows=[1])),
    ):
        pass


def test_shared_position_embeddings_cannot_be_edited_for_one_row() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="share"), model.edited(edits.zero("hook_pos_embed", rows=[1])):
        model(TOKENS)
    with model.edited(edits.zero("hook_pos_embed", positions=[1])):
        seen = model.run_with_cache(TOKENS, "hook_pos_embed")[1]["hook_pos_embed"]
    assert torch.equal(seen[:, 1], torch.zeros(1, 32))


def test_an_edit_that_never_took_effect_is_an_error() -> None:
    model = model_of("llama")
    with pytest.raises(ModelError, match="never took effect.*resid_post"), model.edited(edits.zero(RESID)):
        model.activations(TOKENS, "blocks.0.hook_resid_pre")
    with pytest.raises(ModelError, match="never took effect"), model.edited(edits.zero(RESID, positions=slice(7, 9))):
        model(TOKENS)


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    clean = model(TOKENS)
    with pytest.raises(ZeroDivisionError), model.edited(edits.zero(RESID)):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), clean)
    assert not model.hf._forward_pre_hooks
