"""Decompositions of the residual stream, of every kind of model: labels, exact sums, and logits made from the parts."""

import pytest
import torch
from torch import Tensor

from microtome.common.errors import InputError, ModelError
from microtome.model import HookedModel
from microtome.model.decomposition import Decomposition
from microtome.model.generic import UnknownFamilyWarning, generic_spec
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer

from .families import make
from .runs import ALL, TOKENS, behind, captured

ADDITIVE = [kind for kind in ALL if kind != "opt-350m"]
KINDS = pytest.mark.parametrize("kind", ADDITIVE)
SERIAL = [k for k in ADDITIVE if not captured(k).model.spec.parallel]
NEURONS = [(0, 3), (1, 60), (0, 5), (1, 0)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within the tolerance, relative to the largest value."""
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- sums -----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_every_decomposition_sums_to_the_stream(kind: str, layer: int | None) -> None:
    cache = captured(kind).cache
    stream = cache["resid_post", 2] if layer is None else cache["resid_pre", layer]
    neurons = NEURONS[: 2 * (layer or 0)] if kind != "mixtral" and layer != 1 else []
    for parts in (
        cache.decompose_residual(layer),
        cache.head_results(layer),
        cache.neuron_results(layer, neurons),
    ):
        assert parts.values.shape == (len(parts.labels), 2, 7, 32)
        close(parts.total(), stream)


@pytest.mark.parametrize("kind", SERIAL)
def test_between_attention_and_mlp(kind: str) -> None:
    cache = captured(kind).cache
    for parts in (cache.decompose_residual(1, mid=True), cache.head_results(1, mid=True)):
        close(parts.total(), cache["resid_mid", 1])
    assert cache.decompose_residual(1, mid=True).labels[-3:] == ("0_attn_out", "0_mlp_out", "1_attn_out")
    assert cache.head_results(1, mid=True).labels[-3:] == ("L1H3", "b_O", "remainder")


@KINDS
def test_the_components_are_what_the_points_show(kind: str) -> None:
    cache = captured(kind).cache
    parts = cache.decompose_residual()
    embeddings = ["embed", "pos_embed"] if kind in ("gpt2", "gpt_neo", "opt") else ["embed"]
    outs = [f"{layer}_{out}" for layer in range(3) for out in ("attn_out", "mlp_out")]
    assert list(parts.labels) == embeddings + outs
    for label in outs:
        layer, point = label.split("_", 1)
        assert torch.equal(parts[label], cache[point, int(layer)])
    assert torch.equal(sum((parts[e] for e in embeddings), torch.zeros(2, 7, 32)), cache["resid_pre", 0])


@KINDS
def test_heads_and_biases_add_up_to_the_attentions_output(kind: str) -> None:
    """The remainder is checked by what it should be: all that attention did not write."""
    cache, weights = captured(kind).cache, captured(kind).model.weights
    parts, outs = cache.head_results(), cache.decompose_residual()
    assert parts.labels == (*(f"L{i}H{h}" for i in range(3) for h in range(4)), "b_O", "remainder")
    others = [values for label, values in outs if "attn_out" not in label]
    close(parts["remainder"], torch.stack(others).sum(0))
    first = cache.head_results(0, mid=True) if not weights.spec.parallel else cache.head_results(1)
    close(first.values[:-1].sum(0), cache["attn_out", 0])
    head = torch.einsum("bpk,kd->bpd", cache["z", 0][:, :, 2], weights.W_O[0, 2])
    close(first["L0H2"], behind(captured(kind), 0, "ln1_post", head))
    assert parts["b_O"].any() == any(weights.b_O[layer].any() for layer in range(3))


@pytest.mark.parametrize("kind", [kind for kind in ADDITIVE if kind != "mixtral"])
def test_all_neurons_and_the_bias_are_the_mlps_output(kind: str) -> None:
    run = captured(kind)
    cache, weights = run.cache, run.model.weights
    neurons = [(1, neuron) for neuron in range(run.model.config.d_mlp)]
    parts = cache.neuron_results(2, neurons)
    bias = behind(run, 1, "ln2_post", weights.b_out[1].expand(2, 7, 32))
    close(parts.values[:-1].sum(0) + bias, cache["mlp_out", 1])
    one = cache[f"blocks.{1}.mlp.hook_post"][..., 9, None] * weights.W_out[1][9]
    close(parts["L1N9"], behind(run, 1, "ln2_post", one))


@pytest.mark.parametrize("kind", ALL)
def test_accumulated_residual_is_the_stream_at_each_depth(kind: str) -> None:
    cache = captured(kind).cache
    states = cache.accumulated_residual()
    assert states.labels == ("0_pre", "1_pre", "2_pre", "final_post")
    assert torch.equal(states["2_pre"], cache["resid_pre", 2])
    assert torch.equal(states["final_post"], cache["resid_post", 2])
    assert cache.accumulated_residual(1).labels == ("0_pre", "1_pre")
    if kind in SERIAL:
        states = cache.accumulated_residual(1, mid=True)
        assert states.labels == ("0_pre", "0_mid", "1_pre")
        assert torch.equal(states["0_mid"], cache["resid_mid", 0])
    with pytest.raises(InputError, match="not to be summed"):
        states.total()


# ---- logits ---------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("by", ["layer", "head"])
def test_the_parts_logits_sum_to_the_models(kind: str, by: str) -> None:
    """Direct logit attribution. Gemma-2 soft-caps its logits afterwards: `unembed.hook_out` is before that."""
    model, _, cache = captured(kind)
    parts = cache.apply_final_norm(cache.decompose_residual() if by == "layer" else cache.head_results())
    logits = torch.stack([values @ model.W_U for _, values in parts]).sum(0) + model.b_U
    close(logits, cache["unembed.hook_out"])
    assert (parts.labels[-1] == "ln_final_bias") == (kind in HAS_FINAL_BIAS)


HAS_FINAL_BIAS = {
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "gpt_neox-serial", "opt", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"),
    *("phi", "stablelm", "stablelm-parallel"),
}


@KINDS
def test_the_last_state_is_read_as_the_model_reads_it(kind: str) -> None:
    _, _, cache = captured(kind)
    close(cache.apply_final_norm(cache.accumulated_residual())["final_post"], cache["unembed.hook_in"])


def test_of_some_positions_and_rows() -> None:
    model, logits, cache = captured("gemma")
    part = cache.rows(1).positions(-1)
    parts = part.apply_final_norm(part.head_results())
    close((parts.values @ model.W_U).sum(0)[0, 0], logits[1, -1])
    with pytest.raises(InputError, match=r"not of this cache's rows and positions. Got: \[2, 7\]. Expected: \[1, 1\]"):
        part.apply_final_norm(cache.head_results())


def test_half_precision_sums_exactly_too() -> None:
    model = make("gemma2", torch.bfloat16)
    _, cache = model.run_with_cache(TOKENS)
    parts = cache.head_results()
    assert parts.values.dtype == torch.float32
    close(parts.total(), cache["resid_post", 2].float())
    double = captured("llama").cache.to(torch.float64).head_results()
    assert double.values.dtype == torch.float64


# ---- models from scratch --------------------------------------------------------------------------------------------


def scratch(**settings: object) -> HookedModel:
    sizes = {"d_vocab": 50, "n_ctx": 16, "n_layers": 2, "d_model": 8} | settings
    return ReferenceTransformer.build(ReferenceConfig(**sizes), seed=1).hooked()  # type: ignore[arg-type]


HEADS = {"n_heads": 2, "d_head": 4}


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (HEADS, "embed pos_embed 0_attn_out 1_attn_out"),
        ({"d_mlp": 16}, "embed pos_embed 0_mlp_out 1_mlp_out"),
        (HEADS | {"positions": "shortformer"}, "embed 0_attn_out 1_attn_out"),
        (HEADS | {"normalization": "none", "positions": "rotary"}, "embed 0_attn_out 1_attn_out"),
        ({"n_layers": 0}, "embed pos_embed"),
        ({"n_layers": 0, "positions": "none"}, "embed"),
        (HEADS | {"d_mlp": 16, "activation": "solu", "n_layers": 1}, "embed pos_embed 0_attn_out 0_mlp_out"),
    ],
)
def test_models_that_lack_parts(settings: dict[str, object], labels: str) -> None:
    model = scratch(**settings)
    _, cache = model.run_with_cache(TOKENS % 50)
    parts = cache.decompose_residual()
    assert " ".join(parts.labels) == labels
    close(sum_logits(model, cache.apply_final_norm(parts)), cache["unembed.hook_out"])


def sum_logits(model: HookedModel, parts: Decomposition) -> Tensor:
    return parts.total() @ model.W_U + model.b_U


def test_what_such_models_have_not() -> None:
    _, cache = scratch(d_mlp=16).run_with_cache(TOKENS % 50)
    with pytest.raises(ModelError, match="no heads"):
        cache.head_results()
    with pytest.raises(ModelError, match="no point between attention and MLP"):
        cache.decompose_residual(1, mid=True)
    _, cache = scratch(n_layers=0).run_with_cache(TOKENS % 50)
    with pytest.raises(ModelError, match="no blocks"):
        cache.accumulated_residual()
    with pytest.raises(ModelError, match="no blocks"):
        cache.neuron_results(None, [])


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_cache_says_what_it_lacks() -> None:
    model = captured("gemma2").model
    cache = model.activations(TOKENS, ["blocks.*.hook_mlp_out", "blocks.0.hook_attn_out"])
    with pytest.raises(ModelError) as error:
        cache.decompose_residual()
    assert error.value.fix == "Run with names=['blocks.0.hook_resid_pre', 'blocks.*.hook_attn_out'] too"
    with pytest.raises(ModelError) as error:
        cache.head_results(2)
    lacking = "'blocks.2.hook_resid_pre', 'blocks.*.attn.hook_z', 'blocks.*.ln1_post.hook_scale'"
    assert error.value.fix == f"Run with names=[{lacking}] too"
    with pytest.raises(
        ModelError, match=r"\['blocks.2.hook_resid_pre', 'blocks.0.mlp.hook_post', 'blocks.0.ln2_post.hook_scale'\]"
    ):
        model.activations(TOKENS, "blocks.1.hook_resid_pre").neuron_results(2, [(0, 1)])
    with pytest.raises(ModelError, match=r"names=\['ln_final.hook_scale'\]"):
        cache.apply_final_norm(captured("gemma2").cache.head_results())


def test_what_a_cache_asks_for_is_enough() -> None:
    model = captured("gemma2").model
    names = ["blocks.2.hook_resid_pre", "blocks.*.attn.hook_z", "blocks.*.ln1_post.hook_scale"]
    cache = model.activations(TOKENS, names)
    close(cache.head_results(2).values, captured("gemma2").cache.head_results(2).values)
    cache = model.activations(TOKENS, ["blocks.1.hook_resid_post", *names[1:]])
    close(cache.head_results(2).values, captured("gemma2").cache.head_results(2).values)


def test_blocks_that_norm_the_stream_itself_have_no_parts() -> None:
    cache = captured("opt-350m").cache
    for parts in (cache.decompose_residual, cache.head_results):
        with pytest.raises(ModelError, match="no sum: each block norms it.*accumulated_residual"):
            parts()


def test_a_family_without_a_spec_has_states_and_no_parts() -> None:
    hf = captured("gptj").model.hf
    with pytest.warns(UnknownFamilyWarning):
        model = HookedModel(hf, None, name="closed", spec=generic_spec(hf))
    _, cache = model.run_with_cache(TOKENS)
    states = cache.accumulated_residual()
    assert torch.equal(states.values, captured("gptj").cache.accumulated_residual().values)
    with pytest.raises(ModelError, match="the inside of its blocks is not known"):
        cache.decompose_residual()
    with pytest.raises(ModelError, match="final norm of gptj is not known"):
        cache.apply_final_norm(states)
    for fold in (True, False):
        with pytest.raises(ModelError, match="not known.*no spec"):
            model.folded(fold_norms=fold, centre_writing=not fold)
    with pytest.raises(ModelError, match="no attention, or none that is known"):
        _ = model.W_Q[0]
    assert torch.equal(model.W_U, captured("gptj").model.W_U)


def test_places_and_neurons_that_are_not_there() -> None:
    cache = captured("llama").cache
    for layer, mid in ((4, False), (-1, False), (3, True)):
        with pytest.raises(InputError, match="no such place in the residual stream"):
            cache.decompose_residual(layer, mid=mid)
    with pytest.raises(ModelError, match="no point between attention and MLP. Got: attention and MLP in parallel"):
        captured("gptj").cache.decompose_residual(1, mid=True)
    for neuron in ((2, 0), (0, 64), (-1, 0)):
        with pytest.raises(InputError, match=r"no such neuron before this place.*block below 2 and neuron below 64"):
            cache.neuron_results(2, [neuron])
    with pytest.raises(ModelError, match="mixture of experts"):
        captured("mixtral").cache.neuron_results(None, [(0, 0)])
    with pytest.raises(InputError, match="Did you mean 'L1H2'"):
        cache.head_results()["L1H22"]
