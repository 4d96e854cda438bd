"""What attention and the MLP read (`attn.hook_in`, `mlp.hook_in`), against plain PyTorch hooks on the library's own modules."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests.model.families import KINDS, make
from torch import Tensor, nn

from microtome.model import HookedModel, edits
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer

TOKENS = torch.tensor([[0, 17, 45, 80, 301, 12, 33, 8], [0, 9, 9, 250, 61, 7, 100, 3]])
ATTN, MLP = "blocks.1.attn.hook_in", "blocks.1.mlp.hook_in"
POINTS = pytest.mark.parametrize("point", [ATTN, MLP], ids=["attn", "mlp"])

# Of each kind: its blocks, and in a block the norm before attention, attention, the norm before the MLP, and the MLP; in the
# library's code, not taken from Microtome's specs. None: there is no norm, and the stream itself is read.
_LLAMA = ("model.layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_GEMMA2 = (*_LLAMA[:3], "pre_feedforward_layernorm", "mlp")
_OPT = ("model.decoder.layers", "self_attn_layer_norm", "self_attn", "final_layer_norm", "fc1")
_NEOX = ("gpt_neox.layers", "input_layernorm", "attention", "post_attention_layernorm", "mlp")
_BLOOM = ("transformer.h", "input_layernorm", "self_attention", "post_attention_layernorm", "mlp")
_GPT2 = ("transformer.h", "ln_1", "attn", "ln_2", "mlp")
MODULES: dict[str, tuple[str, str | None, str, str | None, str]] = {
    **dict.fromkeys(KINDS, _LLAMA),
    **dict.fromkeys(("gpt2", "gpt_neo"), _GPT2),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA2),
    **dict.fromkeys(("gpt_neox", "gpt_neox-serial"), _NEOX),
    **dict.fromkeys(("bloom", "falcon-rw"), _BLOOM),
    "gptj": (*_GPT2[:3], "ln_1", "mlp"),
    "opt": _OPT,
    "opt-350m": (_OPT[0], None, "self_attn", None, "fc1"),
    "falcon-7b": (*_BLOOM[:3], "input_layernorm", "mlp"),
    "falcon-40b": ("transformer.h", "ln_attn", "self_attention", "ln_mlp", "mlp"),
    "phi": (*_LLAMA[:3], "input_layernorm", "mlp"),
    "stablelm-parallel": (*_LLAMA[:3], "input_layernorm", "mlp"),
    "olmo2": ("model.layers", None, "self_attn", None, "mlp"),
}
GEMMAS = ("gemma", "gemma2", "gemma3")
EVERY = pytest.mark.parametrize("kind", list(MODULES))


@cache
def model_of(kind: str) -> HookedModel:
    return make(kind)


def module_of(model: HookedModel, point: str) -> nn.Module:
    blocks, _, attn, _, mlp = MODULES[model.name]
    return model.hf.get_submodule(f"{blocks}.1.{attn if point == ATTN else mlp}")


def norm_of(model: HookedModel, point: str) -> nn.Module | None:
    blocks, before_attn, _, before_mlp, _ = MODULES[model.name]
    norm = before_attn if point == ATTN else before_mlp
    return model.hf.get_submodule(f"{blocks}.1.{norm}") if norm else None


@contextmanager
def with_input(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Any:
    """Within the block the module reads what `fn` makes of its first input: a plain forward pre-hook."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": fn(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def bare(model: HookedModel) -> Tensor:
    logits: Tensor = model.hf(input_ids=TOKENS, use_cache=False).logits
    return logits


def stream_at(kind: str, point: str) -> str:
    """Where the stream is that is read without a norm (of OPT-350m, behind the norm of the last addition)."""
    return "blocks.1.hook_resid_pre" if point == ATTN else "blocks.1.hook_resid_mid"


@EVERY
@POINTS
def test_it_is_the_input_of_the_librarys_module(kind: str, point: str) -> None:
    model, seen = model_of(kind), []

    def look(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    with with_input(module_of(model, point), look):
        bare(model)
    found = model.activations(TOKENS, point)[point]
    assert found.shape == (2, 8, 32)
    assert torch.equal(found, seen[0].view(2, 8, 32))


@EVERY
@POINTS
def test_it_is_the_quotient_of_the_norm_with_its_weight_and_bias(kind: str, point: str) -> None:
    """Or what is read without a norm: the stream."""
    model = model_of(kind)
    norm = norm_of(model, point)
    if norm is None:
        if kind == "opt-350m" and point == MLP:
            pytest.skip("the stream behind the first norm of a block is no point of this family")
        at = stream_at(kind, point)
        found = model.activations(TOKENS, [point, at])
        assert torch.equal(found[point], found[at])
        return
    shared = norm is norm_of(model, ATTN)
    quotient = f"blocks.1.{'ln1' if point == ATTN or shared else 'ln2'}.hook_normalized"
    found = model.activations(TOKENS, [point, quotient])
    weights = dict(norm.named_parameters())
    weight = weights["weight"] + (1 if kind in GEMMAS else 0)
    expected = found[quotient] * weight + weights.get("bias", torch.zeros(32))
    torch.testing.assert_close(found[point], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[point], found[quotient], atol=1e-2), "these norms have learned something"


@EVERY
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@POINTS
def test_an_edit_is_that_of_a_plain_pre_hook(kind: str, point: str, in_place: bool) -> None:
    """Of one row, and of this reader alone: attention and an MLP beside it may share their norm, and without a norm the
    stream goes on as it was."""
    model = model_of(kind)

    def changed(x: Tensor) -> Tensor:
        whole = x.view(2, 8, 32)
        new = torch.cat([whole[:1], (whole[1:].roll(1, -1) * 0.5 + 0.25)])
        return new.view_as(x)

    def hook(x: Tensor, _: object) -> Tensor | None:
        if not in_place:
            return changed(x)
        x.copy_(changed(x))
        return None

    with with_input(module_of(model, point), changed):
        wanted = bare(model)
    edited = model.run_with_hooks(TOKENS, [(point, hook)])
    assert torch.equal(edited, wanted)
    assert not torch.equal(edited, bare(model))


@EVERY
def test_the_neurons_read_it(kind: str) -> None:
    """Through the weights as they are stored; what is before the norm's weight, through folded ones."""
    model = model_of(kind)
    if kind == "mixtral":
        return  # the experts' weights are no point's
    gated = "blocks.1.mlp.hook_pre_linear" in model.hook_points
    names = [MLP, "blocks.1.mlp.hook_pre", "blocks.1.ln1.hook_normalized", "blocks.1.ln2.hook_normalized"]
    found = model.activations(TOKENS, [name for name in names if name in model.hook_points])
    W, b = (model.W_gate[1], model.b_gate[1]) if gated else (model.W_in[1], model.b_in[1])
    torch.testing.assert_close(found[MLP] @ W + b, found["pre", 1], rtol=1e-4, atol=1e-4)
    quotient = next((name for name in names[:1:-1] if name in found), None)
    if quotient is None:
        return
    folded = model.folded(fold_norms=[quotient.split(".")[2]])
    W, b = (folded.W_gate[1], folded.b_gate[1]) if gated else (folded.W_in[1], folded.b_in[1])
    torch.testing.assert_close(found[quotient] @ W + b, found["pre", 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "falcon-40b", "gpt_neox", "phi"])
def test_edits_before_and_behind_the_norms_weight_compose(kind: str) -> None:
    """In the order of the forward pass: the point behind the weight sees the edit before it, and has the last word."""
    model = model_of(kind)
    quotient = "blocks.1.ln2.hook_normalized"
    quotient = quotient if quotient in model.hook_points else "blocks.1.ln1.hook_normalized"
    norm = norm_of(model, MLP)
    assert norm is not None
    weights = dict(norm.named_parameters())
    weight, bias = weights["weight"] + (kind in GEMMAS), weights.get("bias", torch.zeros(32))
    two = torch.full((32,), 2.0)
    seen: dict[str, Tensor] = {}

    def look(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.clone()

    with model.edited([edits.patch(MLP, two, positions=[3]), edits.patch(quotient, two, positions=[2, 3])]):
        model.run_with_hooks(TOKENS, [([quotient, MLP], look)])
    clean = model.activations(TOKENS, MLP)[MLP]
    torch.testing.assert_close(seen[MLP][:, 2], (2 * weight + bias).expand(2, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[MLP][:, 3], two.expand(2, -1))
    assert torch.equal(seen[MLP][:, [0, 1, 4, 5, 6, 7]], clean[:, [0, 1, 4, 5, 6, 7]])


@pytest.mark.parametrize("kind", ["phi", "olmo2", "llama"])
def test_the_mlps_copy_of_the_stream_comes_before_what_it_reads(kind: str) -> None:
    """`hook_mlp_in` is the stream before the norm, `mlp.hook_in` what the MLP gets."""
    model, seen = model_of(kind), []

    def look(x: Tensor, _: object) -> None:
        seen.append(x.clone())

    model.run_with_hooks(TOKENS, [("blocks.1.hook_mlp_in", lambda x, _: x * 0 + torch.arange(32.0)), (MLP, look)])
    norm = norm_of(model, MLP)
    stream = torch.arange(32.0).expand(2, 8, 32)
    torch.testing.assert_close(seen[0], stream if norm is None else norm(stream))
    clean = model.activations(TOKENS, MLP)[MLP]
    assert not torch.equal(seen[0], clean)


def test_a_head_with_its_own_copy_of_the_stream_reads_that_alone() -> None:
    """As docs/models.md says: an edit of what attention reads is not in a query whose copy was changed."""
    model, seen = model_of("llama"), []
    own = ("blocks.1.hook_q_input", lambda x, _: x + torch.arange(32.0))
    shared = (ATTN, lambda x, _: x * 2)
    for hooks in ([own], [own, shared], [shared]):
        points = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k"]
        model.run_with_hooks(TOKENS, [*hooks, (points, lambda x, _: seen.append(x.clone()))])
    (q_own, k_own), (q_both, k_both), (q_shared, k_shared) = seen[:2], seen[2:4], seen[4:]
    assert torch.equal(q_both, q_own)
    assert torch.equal(k_both, k_shared)
    assert not torch.equal(q_both, q_shared)
    assert not torch.equal(k_both, k_own)


@pytest.mark.parametrize("normalization", ["layer", "rms", "none"])
@pytest.mark.parametrize("settings", [{}, {"positions": "shortformer"}, {"activation": "swiglu"}], ids=str)
def test_the_transformer_from_scratch(normalization: str, settings: dict[str, str]) -> None:
    if normalization == "none" and settings:
        return
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "d_vocab": 320, "n_ctx": 16}
    config = ReferenceConfig(**sizes, normalization=normalization, start_std=0.3, **settings)  # type: ignore[arg-type]
    model = ReferenceTransformer.build(config, 0).hooked()
    block = model.hf.get_submodule("transformer.blocks.1")
    found = model.activations(TOKENS, [ATTN, MLP, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"])
    for point, ln, stream in ((ATTN, "ln1", "resid_pre"), (MLP, "ln2", "resid_mid")):
        norm = getattr(block, ln)
        expected = found[stream, 1] if norm is None else norm(found[stream, 1])
        torch.testing.assert_close(found[point], expected)
        with with_input(block.get_submodule("attn" if point == ATTN else "mlp"), lambda x: x * 0.5):
            wanted = bare(model)
        assert torch.equal(model.run_with_hooks(TOKENS, [(point, lambda x, _: x * 0.5)]), wanted)


@pytest.mark.parametrize(("d_mlp", "n_heads", "point"), [(0, 2, "mlp.hook_in"), (32, 0, "attn.hook_in")])
def test_parts_that_are_not_there_read_nothing(d_mlp: int, n_heads: int, point: str) -> None:
    config = ReferenceConfig(n_layers=2, d_model=16, n_heads=n_heads, d_head=8, d_mlp=d_mlp, d_vocab=320, n_ctx=16)
    model = ReferenceTransformer.build(config, 0).hooked()
    assert not any(name.endswith(point) for name in model.hook_points)
    assert sum(name.endswith(".hook_in") for name in model.hook_points) == 3  # two blocks', and the unembedding's


def test_names_globs_and_depth() -> None:
    model = model_of("llama")
    assert [str(name) for name in model.resolve("blocks.*.mlp.hook_in")] == [
        f"blocks.{i}.mlp.hook_in" for i in range(3)
    ]
    within = [str(name).removeprefix("blocks.1.") for name in model.resolve("blocks.1.*")]
    at = within.index
    assert at("ln1.hook_normalized") < at("attn.hook_in") < at("attn.hook_q")
    assert at("ln2.hook_normalized") < at("mlp.hook_in") < at("mlp.hook_pre")
    found = model.activations(TOKENS, [MLP, "blocks.1.hook_resid_pre"])
    assert torch.equal(found["in", 1, "mlp"], found[MLP])
    assert torch.equal(found["in", 1], found["resid_pre", 1]), "the block's input, in TransformerBridge's spelling"
    assert model.activations(TOKENS, [MLP, ATTN]).get(("in", 1)) is None


def test_a_run_ends_at_it() -> None:
    """The MLP itself is not computed any more."""
    model, ran = model_of("llama"), []
    handle = model.hf.get_submodule("model.layers.1.mlp.gate_proj").register_forward_hook(lambda *_: ran.append(1))
    model.activations(TOKENS, MLP)
    assert not ran
    model.activations(TOKENS, "blocks.1.mlp.hook_pre")
    handle.remove()
    assert ran


@pytest.mark.parametrize("kind", ["gemma2", "opt", "phi"])
def test_generation_reads_and_edits_it_as_one_pass_does(kind: str) -> None:
    """One token at a time, from the key/value cache."""
    model = make(kind, tokenizer=None)
    seen: list[Tensor] = []

    def halve(x: Tensor, _: object) -> Tensor:
        seen.append(x.clone())
        return x * 0.5

    past: Any = None
    with model.hooks([(MLP, halve)]):
        for i in range(TOKENS.shape[1]):
            out = model.hf(input_ids=TOKENS[:, i : i + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
    logits = model.run_with_hooks(TOKENS, [(MLP, halve)])
    *steps, whole = seen
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.logits[:, -1], logits[:, -1], rtol=1e-4, atol=1e-4)
