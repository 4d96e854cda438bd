"""Every family and kind of block: the model's own numbers untouched, and every point what its name promises."""

from functools import cache

import pytest
import torch
from tests.model.families import KINDS, make
from torch import Tensor

from microtome.model import HookedModel
from microtome.model.names import PATTERN, HookName
from microtome.model.prompts import Prompts

TOKENS = torch.tensor([[0, 17, 45, 80, 301, 12, 33, 8], [0, 9, 9, 250, 61, 7, 100, 3]])
EVERY = pytest.mark.parametrize("kind", list(KINDS))


@cache
def model_of(kind: str) -> HookedModel:
    return make(kind)


@cache
def everything(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all points of a clean run, those on request too."""
    logits, found = model_of(kind).run_with_cache(TOKENS, lambda name: True)
    return logits, dict(found)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_identical_to_the_librarys(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    bare = model.hf(input_ids=TOKENS, use_cache=False).logits
    assert bare.isfinite().all()
    assert torch.equal(model(TOKENS), bare)
    assert torch.equal(model.run_with_cache(TOKENS, "blocks.1.hook_resid_post")[0], bare)
    assert torch.equal(model.run_with_cache(TOKENS, lambda name: True)[0], bare)
    assert torch.equal(model.hf(input_ids=TOKENS, use_cache=False).logits, bare), "a hook stayed behind"


@EVERY
def test_each_point_has_the_shape_of_its_axes(kind: str) -> None:
    model = model_of(kind)
    sizes = {"batch": 2, "pos": 8, "query": 8, "key": 8, "one": 1}
    for text, tensor in everything(kind)[1].items():
        for axis, size in zip(HookName.parse(text).axes, tensor.shape, strict=True):
            expected = sizes.get(axis) or getattr(model.config, axis, None)
            batchless = text == "hook_pos_embed" and axis == "batch"
            assert axis == "routed" or size == expected or (batchless and size == 1), (text, axis)


@EVERY
def test_the_parts_of_a_block_add_up(kind: str) -> None:
    model, (_, found) = model_of(kind), everything(kind)
    groups = model.config.n_heads // model.config.n_kv_heads
    for i in range(3):
        at = {text.removeprefix(f"blocks.{i}."): tensor for text, tensor in found.items() if f"blocks.{i}." in text}
        if model.spec.additive:
            close(at["hook_resid_pre"] + at["hook_attn_out"] + at["hook_mlp_out"], at["hook_resid_post"])
        if "hook_resid_mid" in at and model.spec.additive:
            close(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
        values = at["attn.hook_v"].repeat_interleave(groups, dim=2)
        close(torch.einsum("bhqk,bkhd->bqhd", at["attn.hook_pattern"], values), at["attn.hook_z"])
        close(at["attn.hook_attn_scores"].softmax(-1), at["attn.hook_pattern"])
        close(at["attn.hook_pattern"].sum(-1), torch.ones(2, model.config.n_heads, 8))
        assert (at["attn.hook_attn_scores"].triu(1)[..., 0, 1:] == -torch.inf).all(), "the future is masked"
        if not model.spec.ln1_post:
            biases = dict(model.hf.named_parameters())
            bias = biases.get(f"{model.spec.blocks}.{i}.{model.spec.o}.bias", torch.zeros(32))
            close(at["attn.hook_result"].sum(2) + bias, at["hook_attn_out"])


@EVERY
def test_rotated_queries_and_keys_are_what_the_scores_are_made_of(kind: str) -> None:
    """Rotation keeps lengths, and q·k after it gives the scores up to the family's scale and soft-cap."""
    model, (_, found) = model_of(kind), everything(kind)
    if not model.spec.rotary:
        assert not any("hook_rot" in text for text in found)
        return
    groups = model.config.n_heads // model.config.n_kv_heads
    q, k = found["blocks.1.attn.hook_rot_q"], found["blocks.1.attn.hook_rot_k"].repeat_interleave(groups, dim=2)
    products = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = found["blocks.1.attn.hook_attn_scores"]
    seen = scores.isfinite()
    cap = getattr(model.hf.config, "attn_logit_softcapping", None)
    uncapped = torch.atanh(scores / cap) * cap if cap else scores
    ratio = (uncapped[seen] * products[seen]).sum() / products[seen].square().sum()
    close(products[seen] * ratio, uncapped[seen], 1e-4)
    normed_before = any(part in kind for part in ("qwen3", "gemma3", "olmo2", "stablelm-parallel"))
    if not normed_before:
        close(found["blocks.1.attn.hook_q"].norm(dim=-1), q.norm(dim=-1))


@EVERY
def test_an_edit_that_changes_nothing_changes_no_bit(kind: str) -> None:
    model, (clean, found) = model_of(kind), everything(kind)
    for text in found:
        assert torch.equal(model.run_with_hooks(TOKENS, [(text, lambda act, hook: act.clone())]), clean), text


@EVERY
def test_an_edit_of_one_row_leaves_the_other_alone(kind: str) -> None:
    """Bit for bit, but for experts, whose matrix products have other sizes when other tokens are routed."""
    model, (clean, found) = model_of(kind), everything(kind)
    for text, tensor in found.items():
        if tensor.shape[0] != 2 or not tensor.is_floating_point():
            continue

        def second_row(act: Tensor, hook: object) -> Tensor:
            return torch.cat([act[:1], act[1:] * 0.5])

        edited = model.run_with_hooks(TOKENS, [(text, second_row)])
        if kind == "mixtral":
            close(edited[0], clean[0])
        else:
            assert torch.equal(edited[0], clean[0]), text
        last = text == "unembed.hook_out" or "blocks.2" in text or tensor.shape[-1] == 1
        assert last or not torch.equal(edited[1], clean[1]), f"no effect: {text}"


@EVERY
def test_writing_in_place_and_returning_a_new_tensor_are_the_same(kind: str) -> None:
    model, found = model_of(kind), everything(kind)[1]

    def in_place(act: Tensor, hook: object) -> None:
        act.mul_(0.5)

    for text, tensor in found.items():
        if tensor.is_floating_point():
            new = model.run_with_hooks(TOKENS, [(text, lambda act, hook: act * 0.5)])
            close(model.run_with_hooks(TOKENS, [(text, in_place)]), new)


@EVERY
def test_an_edited_pattern_reweights_the_values(kind: str) -> None:
    """Attention to the own position alone gives each head its own value vector."""
    model = model_of(kind)
    groups = model.config.n_heads // model.config.n_kv_heads
    seen: dict[str, Tensor] = {}

    def keep(act: Tensor, hook: object) -> None:
        seen[getattr(hook, "name", "")] = act

    eye = torch.eye(8).expand(2, model.config.n_heads, 8, 8)
    values, z = "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"
    model.run_with_hooks(TOKENS, [("blocks.1.attn.hook_pattern", lambda act, hook: eye), ([values, z], keep)])
    close(seen[z], seen[values].repeat_interleave(groups, dim=2))


@EVERY
def test_patching_the_whole_stream_gives_the_other_run(kind: str) -> None:
    model = model_of(kind)
    other = TOKENS.flip(0)
    wanted, found = model.run_with_cache(other, ["blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"])
    for text in found:
        assert torch.equal(model.run_with_hooks(TOKENS, [(text, lambda act, hook: found[hook.name])]), wanted), text


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_result(kind: str, side: str) -> None:
    model = model_of(kind)
    short, long = TOKENS[0, :5], TOKENS[1]
    pad = torch.full((3,), 2)
    row = torch.cat([pad, short] if side == "left" else [short, pad])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = False
    batch = Prompts(torch.stack([row, long]), mask)
    logits, found = model.run_with_cache(batch, ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"])
    alone, alone_found = model.run_with_cache(short[None], ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"])
    there = mask[0]
    close(logits[0, there], alone[0], 2e-4)
    close(logits[1], model(long[None])[0], 2e-4)
    close(found["resid_post", 1][0, there], alone_found["resid_post", 1][0])
    close(found["pattern", 1][0][:, there][:, :, there], alone_found["pattern", 1][0])


@EVERY
def test_gradients_are_finite_differences(kind: str) -> None:
    """Along a random direction, at every point that has values of its own. The library computes softmax and norms in
    float32 even in a float64 model, which sets the step."""
    # the library's grouped expert product takes no float64; ReLU has kinks
    model = make(kind, torch.float32 if kind == "mixtral" else torch.float64, activation="gelu")
    names = [n for n in model.resolve(lambda name: "blocks.1" in name or "blocks" not in name) if _differentiable(n)]
    weights = torch.randn(TOKENS.shape[1], model.config.d_vocab, generator=torch.Generator().manual_seed(0)).to(
        model.dtype
    )

    def metric(logits: Tensor) -> Tensor:
        return (logits[0] * weights).sum()

    for name in names:
        text = str(name)
        _, found, gradients = model.gradients(TOKENS, text, metric)
        direction = torch.randn(found[text].shape, generator=torch.Generator().manual_seed(1)).to(model.dtype)
        if name.axes == PATTERN:
            direction = direction.tril()
        step = 1e-3 * max(float(found[text][found[text].isfinite()].std()), 1e-3)

        def moved(by: float, direction: Tensor = direction, text: str = text) -> float:
            return float(metric(model.run_with_hooks(TOKENS, [(text, lambda act, hook: act + by * direction)])))

        numeric = (moved(step) - moved(-step)) / (2 * step)
        analytic = float((gradients[text] * direction).sum())
        scale = max(1.0, abs(numeric), 0.1 * float(gradients[text].norm() * direction.norm()))
        assert abs(numeric - analytic) < 1e-2 * scale, (text, numeric, analytic)


def _differentiable(name: HookName) -> bool:
    """Not the token ids and indices, and not an expert's points, whose number of rows depends on the run."""
    return name.point not in ("hook_tokens", "mlp.hook_expert_indices") and name.expert is None


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance * max(scale, 1.0))
