"""`HookedModel` against the bare Hugging Face module, on random models of each family and on the built-in one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from microtome.common.errors import InputError, ModelError
from microtome.model import HookedModel, HookPoint
from microtome.model.names import ON_REQUEST

TOKENS = torch.tensor([[0, 17, 45, 80, 301, 12, 33], [0, 9, 9, 250, 61, 7, 100]])
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
Make = Callable[[str], HookedModel]


@FAMILIES
def test_logits_are_bit_identical_to_the_librarys(tiny: Make, family: str) -> None:
    model = tiny(family)
    bare = model.hf(input_ids=TOKENS).logits
    assert torch.equal(model(TOKENS), bare)
    assert torch.equal(model.run_with_cache(TOKENS)[0], bare)
    assert torch.equal(model(TOKENS), bare), "a hook stayed behind"


def test_the_built_in_models_logits_are_bit_identical(smol: HookedModel) -> None:
    tokens = smol.to_tokens("When Mary and John went to the store, John gave a drink to")
    logits, cache = smol.run_with_cache(tokens, "blocks.*.hook_resid_pre")
    assert torch.equal(logits, smol.hf(input_ids=tokens).logits)
    assert len(cache) == smol.config.n_layers
    assert smol.to_string(logits[0, -1].argmax()[None]) == " Mary"


@FAMILIES
def test_the_parts_add_up(tiny: Make, family: str) -> None:
    model = tiny(family)
    _, cache = model.run_with_cache(TOKENS)
    for layer in range(model.config.n_layers):
        mid = cache["resid_pre", layer] + cache["attn_out", layer]
        torch.testing.assert_close(mid, cache["resid_mid", layer])
        torch.testing.assert_close(mid + cache["mlp_out", layer], cache["resid_post", layer])
    embedded = cache["embed"] + (cache["pos_embed"] if family == "gpt2" else 0)
    torch.testing.assert_close(embedded, cache["resid_pre", 0])
    torch.testing.assert_close(cache["unembed.hook_in"] @ model.W_U, cache["unembed.hook_out"])


def test_heads_and_neurons_add_up_to_what_their_block_writes(tiny_llama: HookedModel) -> None:
    _, cache = tiny_llama.run_with_cache(TOKENS)
    block = tiny_llama.hf.get_submodule("model.layers.1")
    o_proj = block.get_submodule("self_attn.o_proj").get_parameter("weight")
    assert cache["z", 1].shape == (2, 7, 4, 8)
    torch.testing.assert_close(cache["z", 1].flatten(2) @ o_proj.T, cache["attn_out", 1])
    pre, linear = cache["blocks.1.mlp.hook_pre"], cache["blocks.1.mlp.hook_pre_linear"]
    torch.testing.assert_close(torch.nn.functional.silu(pre) * linear, cache["blocks.1.mlp.hook_post"])


@FAMILIES
def test_what_is_costly_is_captured_on_request_alone(tiny: Make, family: str) -> None:
    model = tiny(family)
    _, cache = model.run_with_cache(TOKENS)
    assert list(cache) == [str(name) for name in model.resolve(lambda n: True) if name.point not in ON_REQUEST]
    assert model.resolve("blocks.1.*") == [name for name in model.resolve("*") if name.layer == 1]
    _, results = model.run_with_cache(TOKENS, "blocks.*.attn.hook_result")
    assert [tuple(results[name].shape) for name in results] == [(2, 7, 4, 32)] * 3


@FAMILIES
def test_writing_a_value_back_changes_nothing(tiny: Make, family: str) -> None:
    model = tiny(family)
    clean = model(TOKENS)
    for name in model.hook_points:
        assert torch.equal(model.run_with_hooks(TOKENS, [(name, lambda act, hook: act.clone())]), clean), name


@FAMILIES
def test_patching_the_residual_stream_gives_the_other_run(tiny: Make, family: str) -> None:
    """With one prompt's whole residual stream at any depth, the rest of the pass is that prompt's own."""
    model = tiny(family)
    other = TOKENS.flip(0)
    wanted, cache = model.run_with_cache(other)
    for name in model.resolve(lambda n: "hook_resid" in n):
        patched = model.run_with_hooks(TOKENS, [(name, lambda act, hook: cache[hook.name])])
        assert torch.equal(patched, wanted), name


@FAMILIES
def test_an_edit_reaches_what_comes_after_and_nothing_before(tiny: Make, family: str) -> None:
    model = tiny(family)
    _, clean = model.run_with_cache(TOKENS)
    seen: dict[str, Tensor] = {}

    def look(act: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = act.clone()

    for point in ("hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post", "hook_resid_mid"):
        edited = f"blocks.1.{point}"
        model.run_with_hooks(TOKENS, [(edited, lambda act, hook: act * 0), ("*", look)])
        assert torch.equal(seen["blocks.1.hook_resid_pre"], clean["resid_pre", 1])
        assert not torch.equal(seen["blocks.1.hook_resid_post"], clean["resid_post", 1]), point
    # zero in the middle of the stream: only the MLP's answer to zeros is left
    assert torch.equal(seen["blocks.1.hook_resid_post"], seen["blocks.1.hook_mlp_out"])


def test_a_run_without_logits_stops_at_the_deepest_point(tiny_llama: HookedModel) -> None:
    reached: list[str] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out, i=i: reached.append(str(i)))
        for i, layer in enumerate(tiny_llama.hf.get_submodule("model.layers").children())
    ]
    cache = tiny_llama.activations(TOKENS, ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"])
    for handle in handles:
        handle.remove()
    assert reached == ["0"]
    _, full = tiny_llama.run_with_cache(TOKENS)
    assert list(cache) == ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_pre"]
    assert all(torch.equal(cache[name], full[name]) for name in cache)


def test_captures_slice_and_cast_inside_the_hook(tiny_llama: HookedModel) -> None:
    name = "blocks.2.hook_resid_pre"
    whole = tiny_llama.activations(TOKENS, name)[name]
    part = tiny_llama.activations(TOKENS, name, positions=[-1, 2], dtype=torch.bfloat16)[name]
    assert torch.equal(part, whole[:, [-1, 2]].bfloat16())
    assert torch.equal(tiny_llama.activations(TOKENS, name, positions=slice(1, 3))[name], whole[:, 1:3])


def test_resolve_takes_names_globs_and_predicates(tiny_llama: HookedModel) -> None:
    by_glob = tiny_llama.resolve("blocks.*.hook_mlp_out")
    assert [str(n) for n in by_glob] == [f"blocks.{i}.hook_mlp_out" for i in range(3)]
    assert tiny_llama.resolve(lambda n: n.endswith("hook_mlp_out")) == by_glob
    assert tiny_llama.resolve([*reversed(by_glob), "blocks.1.*mlp_out"]) == by_glob


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.1.hook_resid_per", r"blocks\.1\.hook_resid_pre"),
        ("blocks.3.hook_resid_pre", "layer from 0 to 2"),
        ("blocks.*.nothing", "No hook point"),
        ("hook_pos_embed", "Unknown hook point"),
        ([], "No hook point was asked for"),
    ],
)
def test_a_wrong_name_is_refused(tiny_llama: HookedModel, names: str | list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_llama.run_with_cache(TOKENS, names)


def test_a_hook_that_never_fires_is_an_error(tiny_llama: HookedModel) -> None:
    """The run stops before the last layer, so a hook there sees nothing: that must not pass in silence."""
    hooked = tiny_llama.hooks([("blocks.2.hook_mlp_out", lambda act, hook: None)])
    with pytest.raises(ModelError, match=r"never reached.*blocks\.2\.hook_mlp_out"), hooked:
        tiny_llama.activations(TOKENS, "blocks.0.hook_resid_pre")


def test_a_tensor_of_another_shape_is_refused_and_no_hook_stays(tiny_llama: HookedModel) -> None:
    clean = tiny_llama(TOKENS)
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.hook_z returned a tensor of another shape.*n_heads"):
        tiny_llama.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z", lambda act, hook: act[:, :1])])
    assert torch.equal(tiny_llama(TOKENS), clean)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 65, dtype=torch.long), "longer than the model's"),
        (torch.tensor([[320]]), "outside the vocabulary"),
        (torch.tensor([[-1]]), "outside the vocabulary"),
        (torch.zeros(1, 0, dtype=torch.long), "integers"),
        (torch.zeros(1, 3), "integers"),
        (torch.zeros(1, 1, 3, dtype=torch.long), "integers"),
        ("", "a text is empty"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused(tiny_llama: HookedModel, tokens: str | Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_llama(tokens)


def test_padding_on_the_right_changes_no_logit(tiny_llama: HookedModel) -> None:
    short, long = "The cat", "The cat sat on the mat, and the dog looked on."
    both = tiny_llama(tiny_llama.to_tokens([short, long]))
    alone = tiny_llama(tiny_llama.to_tokens(short))
    torch.testing.assert_close(both[:1, : alone.shape[1]], alone)


def test_the_cache_says_what_it_has(tiny_llama: HookedModel) -> None:
    _, cache = tiny_llama.run_with_cache(TOKENS, ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"])
    assert torch.equal(cache["resid_pre", 1], cache["blocks.1.hook_resid_pre"])
    assert "[2, 7, 4, 8]" in repr(cache)
    with pytest.raises(ModelError, match=r"blocks\.1\.hook_resid_pre"):
        cache["resid_post", 1]


def test_a_model_without_tokenizer_takes_token_ids(tiny_llama: HookedModel) -> None:
    bare = HookedModel(tiny_llama.hf, None, name="bare", spec=tiny_llama.spec)
    assert torch.equal(bare(TOKENS), tiny_llama(TOKENS))
    with pytest.raises(ModelError, match="without a tokenizer"):
        bare("text")


def test_weights_are_views_under_the_fields_names(tiny: Make) -> None:
    model = tiny("gpt2")
    assert model.W_E.shape == (320, 32)
    assert model.W_U.shape == (32, 320)
    assert model.W_U.data_ptr() == model.W_E.data_ptr(), "tied weights are one"
