"""One head of a hook point as a point of its own: what is read, written and differentiated there, against the whole."""

from pathlib import Path

import pytest
import torch

from microtome.activations import HarvestConfig, harvest
from microtome.circuits import ablate_features, logit_attribution
from microtome.common.errors import ModelError
from microtome.dictionary import Dictionary, EvaluateConfig, Origin, evaluate
from microtome.dictionary.activation import ReLU, TopK
from microtome.dictionary.splice import spliced
from microtome.features import IndexConfig, build_index
from microtome.model import HookedModel, HookName, edits
from microtome.text import TokenDataset

TOKENS = torch.tensor([[0, 7, 3, 9, 4], [0, 5, 6, 2, 8]])


@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_v", "hook_rot_k", "hook_z", "hook_result"])
def test_a_head_is_a_part_of_its_point(point: str, tiny_llama: HookedModel) -> None:
    whole, one = f"blocks.1.attn.{point}", f"blocks.1.attn.{point}.1"
    cache = tiny_llama.activations(TOKENS, [one, whole])
    assert torch.equal(cache[one], cache[whole][:, :, 1])
    assert list(cache) == [whole, one]
    name = HookName.parse(one)
    assert (str(name), name.head, str(name.of_all_heads)) == (one, 1, whole)
    assert name.axes == tuple(axis for axis in name.of_all_heads.axes if "heads" not in axis)


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference"])
@pytest.mark.parametrize("way", ["return", "in place", "in place and return"])
def test_an_edit_of_one_head_is_that_of_the_whole(way: str, inference: bool, tiny_llama: HookedModel) -> None:
    def one(z: torch.Tensor, _: object) -> torch.Tensor | None:
        if way == "return":
            return z * 3 + 1
        z.mul_(3).add_(1)
        return z if way == "in place and return" else None

    def whole(z: torch.Tensor, _: object) -> torch.Tensor:
        return torch.cat([z[:, :, :2], z[:, :, 2:3] * 3 + 1, z[:, :, 3:]], 2)

    wanted = tiny_llama.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z", whole)])
    with torch.inference_mode(inference):
        for name in ("blocks.1.attn.hook_z.2", "blocks.1.attn.o.hook_in.2"):
            assert torch.equal(tiny_llama.run_with_hooks(TOKENS, [(name, one)]), wanted)
    assert not torch.equal(tiny_llama(TOKENS), wanted)


@pytest.mark.parametrize("point", ["attn.hook_rot_k", "hook_k_input", "attn.hook_result"])
def test_an_edit_of_one_head_where_the_library_has_no_such_tensor(point: str, tiny_llama: HookedModel) -> None:
    """Keys that queries share, a head's own copy of the stream, and what it writes: in place, as the head of the whole."""

    def one(x: torch.Tensor, _: object) -> None:
        x.neg_()

    def whole(x: torch.Tensor, _: object) -> torch.Tensor:
        return torch.cat([x[:, :, :1], -x[:, :, 1:2], x[:, :, 2:]], 2)

    wanted = tiny_llama.run_with_hooks(TOKENS, [(f"blocks.1.{point}", whole)])
    assert not torch.allclose(tiny_llama(TOKENS), wanted)
    for inference in (False, True):
        with torch.inference_mode(inference):
            torch.testing.assert_close(tiny_llama.run_with_hooks(TOKENS, [(f"blocks.1.{point}.1", one)]), wanted)


def test_a_capture_of_one_head_keeps_no_other_in_memory(tiny_llama: HookedModel) -> None:
    one = tiny_llama.activations(TOKENS, "blocks.1.attn.hook_z.2")["blocks.1.attn.hook_z.2"]
    assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


@pytest.mark.parametrize(("point", "head"), [("hook_k", 1), ("hook_v", 0), ("hook_z", 2)])
def test_an_edit_of_one_head_in_generation(point: str, head: int, tiny_llama: HookedModel) -> None:
    """With a key/value cache and without one: as an edit of the whole point that is told the head."""
    name, vector, clean = f"blocks.1.attn.{point}", torch.arange(8.0), tiny_llama.generate_details(TOKENS[:1])
    for use_cache in (True, False):
        found = []
        for edit in (edits.steer(f"{name}.{head}", vector), edits.steer(name, vector, head=head)):
            with tiny_llama.edited(edit):
                found += tiny_llama.generate_details(TOKENS[:1], max_new_tokens=6, use_cache=use_cache)
        assert torch.equal(found[0].tokens, found[1].tokens)
        assert torch.equal(found[0].logprobs, found[1].logprobs)
        assert not torch.allclose(found[0].logprobs, clean[0].logprobs[:6])


def test_the_gradient_at_one_head(tiny_llama: HookedModel) -> None:
    both = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_v.1"]
    _, values, gradients = tiny_llama.gradients(TOKENS, both, lambda logits: logits[:, -1, 5].sum())
    _, _, alone = tiny_llama.gradients(TOKENS, "blocks.1.attn.hook_z.2", lambda logits: logits[:, -1, 5].sum())
    torch.testing.assert_close(alone["blocks.1.attn.hook_z.2"], gradients[both[0]][:, :, 2])
    _, _, whole = tiny_llama.gradients(TOKENS, "blocks.1.attn.hook_v", lambda logits: logits[:, -1, 5].sum())
    torch.testing.assert_close(gradients[both[1]], whole["blocks.1.attn.hook_v"][:, :, 1])
    assert values[both[1]].shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.attn.hook_z.4", "head 4. Expected: a head from 0 to 3"),
        ("blocks.1.attn.hook_k.2", "head 2. Expected: a head from 0 to 1"),
        ("blocks.1.attn.hook_z.x", "head x. Expected: a head from 0 to 3"),
        ("blocks.1.attn.hook_z.-1", "head -1"),
        ("blocks.1.hook_resid_pre.0", "hook point of tiny-llama"),
        ("blocks.1.attn.hook_pattern.0", "hook point of tiny-llama"),
        ("blocks.*.attn.hook_z.4", "No hook point of tiny-llama matches"),
        ("blocks.*.hook_resid_pre.0", "No hook point of tiny-llama matches"),
        ("blocks.*.attn.hook_pattern.*", "No hook point of tiny-llama matches"),
    ],
)
def test_heads_that_are_not_there(name: str, message: str, tiny_llama: HookedModel) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_llama.activations(TOKENS, name)


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("blocks.*.attn.hook_z.3", [f"blocks.{i}.attn.hook_z.3" for i in range(3)]),
        ("blocks.1.attn.hook_z.*", [f"blocks.1.attn.hook_z.{head}" for head in range(4)]),
        ("blocks.1.attn.hook_v.*", [f"blocks.1.attn.hook_v.{head}" for head in range(2)]),
        ("blocks.1.attn.hook_[qkv].2", ["blocks.1.attn.hook_q.2"]),
        ("blocks.1.attn.hook_z.[02]", ["blocks.1.attn.hook_z.0", "blocks.1.attn.hook_z.2"]),
        ("blocks.[01].*hook_result.1", [f"blocks.{i}.attn.hook_result.1" for i in range(2)]),
    ],
)
def test_globs_of_heads(glob: str, names: list[str], tiny_llama: HookedModel) -> None:
    """Of the heads that there are: queries have four, keys and values two."""
    assert [str(name) for name in tiny_llama.resolve(glob)] == names


def test_globs_of_points_find_no_heads(tiny_llama: HookedModel) -> None:
    for glob in ("*", "blocks.*.*", "*.*.attn.*", "blocks.1.attn.hook_*"):
        assert all(name.head is None for name in tiny_llama.resolve(glob)), glob


def test_another_shape_for_one_head(tiny_llama: HookedModel) -> None:
    with pytest.raises(ModelError, match=r"hook_z.2 returned .* \(2, 5, 1\). Expected: \(2, 5, 8\)"):
        tiny_llama.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z.2", lambda z, _: z[..., :1])])


def test_an_index_of_one_head(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    """From the model and from a harvest of that head: the counts of a plain run."""
    hook, data = "blocks.1.attn.hook_z.2", tiny_dataset.slice(0, 4)
    sae = Dictionary(8, 16, ReLU(), origin=Origin.at("tiny-llama", hook), center=False).requires_grad_(False)
    sae.encoder.copy_(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    tokens = torch.from_numpy(data.batch(0, data.n_sequences))
    rows = tiny_llama.run_with_cache(tokens)[1]["blocks.1.attn.hook_z"][:, :, 2][
        ~torch.isin(tokens, torch.tensor([0, 1]))
    ]
    wanted = (sae.encode(rows).to_dense() > 0).sum(0).tolist()
    store = harvest(tiny_llama, data, [hook], tmp_path / "store", config=HarvestConfig(dtype="fp32"))
    for name, kept in {"run": None, "stored": store}.items():
        config = IndexConfig(sink_norm=float("inf"))
        index = build_index(tiny_llama, sae, data, tmp_path / name, config=config, store=kept)
        assert [index.feature(i).row.count for i in range(16)] == wanted
        assert index.summary.hook_name == hook


def test_a_dictionary_of_one_head(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    """Measured on its own width, and put back in the place of that head alone: one that reproduces it changes nothing."""
    hook = "blocks.1.attn.hook_z.2"
    same = Dictionary(8, 16, ReLU(), origin=Origin.at("tiny-llama", hook), center=False)
    with torch.no_grad():
        same.encoder.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
        same.W_dec.copy_(same.encoder)
    small = EvaluateConfig(n_tokens=500, function_tokens=48)
    found = evaluate(tiny_llama, same, tiny_dataset, small)
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.delta_ce == pytest.approx(0, abs=1e-6)
    zero = torch.zeros(2, 5, 8)
    logits = spliced(tiny_llama, TOKENS, {hook: zero}, torch.ones(2, 5, dtype=torch.bool))
    wanted = tiny_llama.run_with_hooks(
        TOKENS, [("blocks.1.attn.hook_z", lambda z, _: z * (torch.arange(4) != 2).float()[:, None])]
    )
    torch.testing.assert_close(logits, wanted)
    found_without = ablate_features(tiny_llama, TOKENS, lambda logits: logits[:, -1, 5], same, hook, [3])
    z = tiny_llama.activations(TOKENS, "blocks.1.attn.hook_z")["blocks.1.attn.hook_z"].clone()
    z[:, :, 2, 3] -= z[:, :, 2, 3].relu()
    without = tiny_llama.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z", lambda _, hook: z)])[:, -1, 5]
    torch.testing.assert_close(found_without.values[0], without)
    assert not torch.allclose(without, tiny_llama(TOKENS)[:, -1, 5])
    other = Dictionary(8, 16, TopK(2), origin=Origin.at("tiny-llama", hook))
    with pytest.raises(ModelError, match="not written into the stream. Got: blocks.1.attn.hook_z.2"):
        logit_attribution(tiny_llama, TOKENS, answer=5, by="feature", dictionary=other)
