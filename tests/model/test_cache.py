"""`ActivationCache`: names and short forms, parts of a cache, and caches on the disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from microtome.common.errors import ArtifactError, InputError, ModelError
from microtome.model import ActivationCache, HookName

from .runs import TOKENS, captured


def same(found: ActivationCache, expected: ActivationCache) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("resid_pre", 1), "blocks.1.hook_resid_pre"),
        (("z", 1), "blocks.1.attn.hook_z"),
        (("post", 2), "blocks.2.mlp.hook_post"),
        (("hook_attn_out", 0), "blocks.0.hook_attn_out"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("hook_normalized", 1, "ln1"), "blocks.1.ln1.hook_normalized"),
        (("ln1.hook_scale", 1), "blocks.1.ln1.hook_scale"),
        ("embed", "hook_embed"),
        ("scale", "ln_final.hook_scale"),
        ("blocks.2.hook_out", "blocks.2.hook_resid_post"),
        ("blocks.2.attn.o.hook_in", "blocks.2.attn.hook_z"),
        ("blocks.2.mlp.in.hook_out", "blocks.2.mlp.hook_pre_linear"),
        ("blocks.2.mlp.gate.hook_out", "blocks.2.mlp.hook_pre"),
        (HookName("hook_resid_pre", 2), "blocks.2.hook_resid_pre"),
    ],
)
def test_spellings_of_a_name(key: str | tuple[str, int], name: str) -> None:
    cache = captured("llama").cache
    assert cache[key] is cache[name]
    assert key in cache


def test_a_name_that_is_not_there() -> None:
    cache = captured("llama").model.activations(TOKENS, "blocks.*.hook_resid_pre")
    assert "blocks.1.hook_resid_post" not in cache
    assert ("z", 1) not in cache  # type: ignore[comparison-overlap]
    assert cache.get("blocks.1.hook_resid_post") is None
    with pytest.raises(ModelError, match=r"Did you mean 'blocks\.1\.hook_resid_pre'"):
        cache["resid_post", 1]


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, -1, slice(1, 2), [1, 0]])
def test_rows(which: int | slice | list[int]) -> None:
    cache = captured("gpt2").cache
    part = cache.rows(which)
    kept = torch.arange(2)[which].reshape(-1)
    assert list(part) == list(cache)
    for name in cache:
        expected = cache[name] if name == "hook_pos_embed" else cache[name][kept]
        assert torch.equal(part[name], expected)


@pytest.mark.parametrize("which", [0, -1, slice(2, 5), [3, 1]])
def test_positions_are_those_of_a_run_that_kept_only_them(which: int | slice | list[int]) -> None:
    model, _, cache = captured("llama")
    _, expected = model.run_with_cache(TOKENS, positions=[which] if isinstance(which, int) else which)
    same(cache.positions(which), expected)


def test_heads_are_those_of_a_run_that_kept_only_them() -> None:
    model, _, cache = captured("gpt2")
    _, expected = model.run_with_cache(TOKENS, heads=[3, 1])
    same(cache.heads([3, 1]), expected)
    assert cache.heads(2)["pattern", 0].shape == (2, 1, 7, 7)


def test_parts_that_are_not_there() -> None:
    cache = captured("llama").cache
    with pytest.raises(InputError, match=r"no such row of hook_tokens. Got: 2. Expected: -2 to 1"):
        cache.rows(2)
    with pytest.raises(InputError, match="no such position"):
        cache.positions([7])
    with pytest.raises(InputError, match=r"no such head of blocks.0.attn.hook_q. Got: 4"):
        cache.heads(4)
    experts = captured("mixtral").model.activations(TOKENS, "blocks.0.mlp.experts.1.hook_post")
    for part in (experts.rows, experts.positions):
        with pytest.raises(ModelError, match="are of all"):
            part(0)


def test_dtype_and_device() -> None:
    cache = captured("llama").cache
    half = cache.to(torch.bfloat16).to("cpu")
    assert half["resid_pre", 1].dtype == torch.bfloat16
    assert half["hook_tokens"].dtype == torch.int64
    assert torch.equal(half["z", 1], cache["z", 1].bfloat16())
    assert cache.to(torch.device("meta"))["z", 1].is_meta


def test_ungrouped_keys_and_values() -> None:
    cache = captured("llama").cache
    for key in (("v", 1), "blocks.1.attn.hook_rot_k"):
        values = cache.ungrouped(key)
        assert values.shape == (2, 7, 4, 8)
        for head in range(4):
            assert torch.equal(values[:, :, head], cache[key][:, :, head // 2])
    z = torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], cache.ungrouped(("v", 1)))
    torch.testing.assert_close(z, cache["z", 1])
    with pytest.raises(InputError, match="Only keys and values are grouped"):
        cache.ungrouped(("q", 1))
    assert torch.equal(cache.rows(0).ungrouped(("k", 0)), cache.ungrouped(("k", 0))[:1])


# ---- on the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run.safetensors", "deep/run.safetensors", "run"])
def test_a_saved_cache_comes_back(place: str, tmp_path: Path) -> None:
    model, _, cache = captured("llama")
    saved = cache.save(tmp_path / place)
    assert saved == tmp_path / place
    again = ActivationCache.load(saved)
    same(again, cache)
    with pytest.raises(ModelError, match="does not know its model.*weights=model.weights"):
        again.decompose_residual()
    known = ActivationCache.load(saved, weights=model.weights)
    assert torch.equal(known.decompose_residual().total(), cache.decompose_residual().total())


def test_an_artifact_says_what_made_it(tmp_path: Path) -> None:
    captured("gpt2").cache.save(tmp_path / "run")
    files = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert files == ["activations.safetensors", "config.json", "provenance.json"]


def test_tokens_go_in_and_parts_too(tmp_path: Path) -> None:
    model, _, cache = captured("gpt2")
    part = model.activations(TOKENS, "blocks.*.attn.hook_[qv]").rows(1).heads([0, 2])
    part.save(tmp_path / "part.safetensors", tokens=TOKENS[1:])
    again = ActivationCache.load(tmp_path / "part.safetensors")
    assert torch.equal(again["hook_tokens"], TOKENS[1:])
    assert torch.equal(again["v", 2], cache["v", 2][1:, :, [0, 2]])


def test_what_is_there_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    cache = captured("gpt2").cache
    for place in ("run.safetensors", "run"):
        cache.save(tmp_path / place)
        with pytest.raises(ArtifactError, match="already there"):
            cache.rows(0).save(tmp_path / place)
        cache.rows(0).save(tmp_path / place, overwrite=True)
        same(ActivationCache.load(tmp_path / place), cache.rows(0))


def test_files_that_hold_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        ActivationCache.load(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x09" * 40)
    with pytest.raises(ArtifactError, match="cannot be read"):
        ActivationCache.load(tmp_path / "broken.safetensors")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read.*lm_head.weight"):
        ActivationCache.load(tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="no activation cache"):
        ActivationCache.load(tmp_path / "nowhere")
