"""Edits as values: compared, printed, saved and loaded; and those that cannot be, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from tests.model.test_edits import PATTERNS, POST, RESID, SCORES, TOKENS, Z, model_of, noise

from microtome.common.errors import ArtifactError, ConfigError, InputError, MicrotomeError, ModelError
from microtome.model import edits

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
