"""`Weights` of whole models: layout, tables, folded and centred forms, circuits; against what the models compute."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import InputError, ModelError
from microtome.model import HookedModel
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer
from microtome.model.specs import Experts, Gated
from microtome.model.weights import Layered, PerLayer, Table, Weights

from .families import make
from .runs import ALL, TOKENS, captured, read_by_heads

KINDS = pytest.mark.parametrize("kind", ALL)
POST_NORM = {
    "gemma2": ("ln1", "ln2", "ln_final"),
    "gemma3": ("ln1", "ln2", "ln_final"),
    "olmo2": ("ln_final",),
}
FOLDABLE = [kind for kind in ALL if kind != "opt-350m"]
LAYER_NORM = [
    *("gpt2", "gpt_neo", "gptj", "gpt_neox", "gpt_neox-serial", "opt", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"),
    *("phi", "stablelm", "stablelm-parallel"),
]


def folded(kind: str, dtype: torch.dtype = torch.float32) -> Weights:
    return captured(kind).model.folded(fold_norms=POST_NORM.get(kind, True), dtype=dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ---- layout ---------------------------------------------------------------------------------------------------------


def test_weights_of_layers_and_heads_are_views() -> None:
    model = captured("gpt2").model
    block = model.hf.get_submodule("transformer.h.2")
    c_attn, c_fc = (block.get_submodule(m).get_parameter("weight") for m in ("attn.c_attn", "mlp.c_fc"))
    assert model.W_Q[2].data_ptr() == c_attn.data_ptr()
    assert model.W_K[2, 1].data_ptr() == c_attn[:, 32 + 8 :].data_ptr()
    assert model.W_in[-1].data_ptr() == c_fc.data_ptr()
    assert torch.equal(model.W_V[2, 3], c_attn[:, 64 + 24 :])
    assert torch.equal(model.b_V[2, 3, 1:3], block.get_submodule("attn.c_attn").get_parameter("bias")[-7:-5])


def test_a_stack_has_transformer_lenss_layout() -> None:
    model = captured("llama").model
    shapes = {
        "W_Q": (3, 4, 32, 8),
        "W_K": (3, 2, 32, 8),
        "W_O": (3, 4, 8, 32),
        "W_in": (3, 32, 64),
        "W_gate": (3, 32, 64),
        "W_out": (3, 64, 32),
        "b_K": (3, 2, 8),
        "b_O": (3, 32),
    }
    for name, shape in shapes.items():
        weight: PerLayer = getattr(model, name)
        stacked = weight.stack()
        assert stacked.shape == weight.shape == shape
        assert len(weight) == 3
        assert all(torch.equal(stacked[i], layer) for i, layer in enumerate(weight))
    stacked = model.W_Q.stack()
    stacked.zero_()
    assert model.W_Q[0].any(), "the stack is a copy"


def test_ungrouped_keys_and_values_are_repeated_for_their_query_heads() -> None:
    model = captured("llama").model
    assert model.W_K.ungrouped().shape == (3, 4, 32, 8)
    for head in range(4):
        assert torch.equal(model.W_K.ungrouped()[1, head], model.W_K[1, head // 2])
        assert torch.equal(model.b_V.ungrouped()[1, head], model.b_V[1, head // 2])
    assert torch.equal(model.W_O.ungrouped().stack(), model.W_O.stack())


def test_the_model_has_the_same_weights_under_its_own_name() -> None:
    model = captured("gpt2").model
    for name, attribute in vars(Weights).items():
        if isinstance(attribute, Layered):
            if name not in ("W_gate", "b_gate"):
                assert torch.equal(getattr(model, name).stack(), getattr(model.weights, name).stack())
        elif name in ("W_E", "W_U", "W_pos", "b_U"):
            assert torch.equal(getattr(model, name), getattr(model.weights, name))
    assert isinstance(HookedModel.W_Q, Layered)
    assert isinstance(HookedModel.W_E, Table)
    assert repr(model.W_Q) == "PerLayer(W_Q, [3, 4, 32, 8])"


def test_layers_and_heads_that_are_not_there() -> None:
    model = captured("llama").model
    with pytest.raises(InputError, match="no such layer. Got: 3. Expected: 0 to 2"):
        _ = model.W_Q[3]
    with pytest.raises(InputError, match=r"no such part of W_K\[1\]. Got: \[2\]. Expected: indices into \[2, 32, 8\]"):
        _ = model.W_K[1, 2]
    with pytest.raises(InputError, match="indexed by one layer.*stack()"):
        _ = model.W_Q[:2]


# ---- outside the blocks ---------------------------------------------------------------------------------------------


@KINDS
def test_the_embedding_gives_what_its_point_shows(kind: str) -> None:
    model, _, cache = captured(kind)
    close(model.W_E[TOKENS] * model.weights.embed_scale, cache["hook_embed"], 1e-5)
    assert (model.weights.embed_scale == 1) != kind.startswith("gemma")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt", "opt-350m"])
def test_each_position_gets_its_row(kind: str) -> None:
    model, _, cache = captured(kind)
    assert torch.equal(model.W_pos[: TOKENS.shape[1]], cache["hook_pos_embed"][0])
    assert model.W_pos.shape == (64, 32)


def test_rotary_models_have_no_table_of_positions() -> None:
    with pytest.raises(ModelError, match="llama has no table of positions"):
        _ = captured("llama").model.W_pos


@KINDS
def test_the_unembedding_gives_the_logits(kind: str) -> None:
    model, _, cache = captured(kind)
    read = cache["resid_post", 2] if kind == "opt-350m" else cache["unembed.hook_in"]
    close(read @ model.W_U + model.b_U, cache["unembed.hook_out"])
    assert model.b_U.any() == (kind in ("gptj", "phi"))


# ---- folded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDABLE)
def test_folded_unembedding_reads_what_is_normalized(kind: str) -> None:
    _, _, cache = captured(kind)
    weights = folded(kind)
    close(cache["ln_final.hook_normalized"] @ weights.W_U + weights.b_U, cache["unembed.hook_out"])


@pytest.mark.parametrize("kind", [kind for kind in FOLDABLE if kind != "olmo2"])
def test_folded_attention_reads_what_is_normalized(kind: str) -> None:
    _, _, cache = captured(kind)
    for layer in range(3):
        weights, x = folded(kind).block(layer), cache[f"blocks.{layer}.ln1.hook_normalized"]
        close(torch.einsum("bpd,hdk->bphk", x, weights.W_Q) + weights.b_Q, cache["q", layer])
        close(torch.einsum("bpd,hdk->bphk", x, weights.W_K) + weights.b_K, cache["k", layer])
        close(torch.einsum("bpd,hdk->bphk", x, weights.W_V) + weights.b_V, cache["v", layer])


@pytest.mark.parametrize("kind", [kind for kind in FOLDABLE if kind != "olmo2"])
def test_folded_mlp_reads_what_is_normalized(kind: str) -> None:
    run = captured(kind)
    spec = run.model.spec
    norm = "ln1" if spec.parallel and spec.ln2 is None else "ln2"
    for layer in range(3):
        weights, x = folded(kind).block(layer), run.cache[f"blocks.{layer}.{norm}.hook_normalized"]
        if isinstance(spec.mlp, Experts):
            x = x.flatten(0, 1)
            own = run.model.weights.block(layer)
            read = x * run.model.hf.get_submodule(f"{spec.blocks}.{layer}.{spec.ln2}").get_parameter("weight")
            close(x @ weights.W_router, read @ own.W_router)
            close(x @ weights.experts(1).W_in, read @ own.experts(1).W_in)
            close(x @ weights.experts(1).W_gate, read @ own.experts(1).W_gate)
            continue
        pre = run.cache[f"blocks.{layer}.mlp.hook_pre"]
        if isinstance(spec.mlp, Gated):
            close(x @ weights.W_gate + weights.b_gate, pre)
            pre = run.cache[f"blocks.{layer}.mlp.hook_pre_linear"]
        close(x @ weights.W_in + weights.b_in, pre)


def test_folding_leaves_the_model_as_it_was() -> None:
    model = make("gpt2")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    weights = model.folded(centre_writing=True, centre_unembed=True)
    for name in ("W_Q", "b_Q", "W_O", "W_in", "b_in", "W_out", "b_out"):
        getattr(weights, name).stack().zero_()
        getattr(weights, name)[0].zero_()
    weights.W_U.zero_()
    weights.W_E.zero_()
    assert all(torch.equal(before[name], value) for name, value in model.hf.state_dict().items())
    assert torch.equal(model(TOKENS), captured("gpt2").logits)


def test_folding_in_double_and_of_half_precision_weights() -> None:
    weights = folded("gpt2", torch.float64)
    assert weights.W_Q[0].dtype == weights.b_U.dtype == weights.W_E.dtype == torch.float64
    close(weights.W_Q[1].float(), folded("gpt2").W_Q[1], 1e-6)
    half = make("llama", torch.bfloat16)
    assert half.folded().W_U.dtype == torch.float32
    expected = half.W_U.float() * half.hf.get_submodule("model.norm").get_parameter("weight").float()[:, None]
    assert torch.equal(half.folded().W_U, expected)
    with pytest.raises(InputError, match="full precision. Got: torch.bfloat16"):
        half.folded(dtype=torch.bfloat16)


def test_some_norms_and_none() -> None:
    model = captured("gpt2").model
    assert torch.equal(model.folded(fold_norms=("ln_final",)).W_Q.stack(), model.W_Q.stack())
    assert torch.equal(model.folded(fold_norms=("ln_final",)).W_U, model.folded().W_U)
    assert torch.equal(model.folded(fold_norms=False).W_U, model.W_U)


def test_what_cannot_be_folded_is_refused_with_the_reason() -> None:
    for kind, fix in POST_NORM.items():
        with pytest.raises(ModelError, match="after attention and MLP cannot be folded.*ln1_post, ln2_post") as error:
            captured(kind).model.folded()
        assert error.value.fix == f"fold_norms={fix!r} folds those that can be"
    with pytest.raises(ModelError, match="ln2_post"):
        captured("gemma2").model.folded(fold_norms=("ln1", "ln2_post"))
    with pytest.raises(ModelError, match="norms the residual stream itself"):
        captured("opt-350m").model.folded()
    with pytest.raises(ModelError, match="phi has no such norm. Got: ln2. Expected: some of ln1, ln_final"):
        captured("phi").model.folded(fold_norms=["ln2"])
    assert torch.equal(captured("opt-350m").model.folded(fold_norms=False).W_U, captured("opt-350m").model.W_U)


def test_positions_behind_the_norm_are_not_folded() -> None:
    config = ReferenceConfig(
        d_vocab=50, n_ctx=16, n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=16, positions="shortformer"
    )
    model = ReferenceTransformer.build(config).hooked()
    with pytest.raises(ModelError, match=r"plus the positions. fold_norms=\('ln2', 'ln_final'\)"):
        model.folded()
    with pytest.raises(ModelError, match="behind the norm"):
        model.folded(fold_norms=False, centre_writing=True)
    _, cache = model.run_with_cache(TOKENS[:, :4] % 50)
    weights = model.folded(fold_norms=("ln2", "ln_final"))
    close(cache["ln_final.hook_normalized"] @ weights.W_U + weights.b_U, cache["unembed.hook_out"])


# ---- centred --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYER_NORM)
def test_a_model_with_centred_writing_weights_computes_the_same(kind: str) -> None:
    run = captured(kind)
    model = deepcopy(run.model.hf)
    with torch.no_grad():  # the output embedding may be the input's: what is unembedded is compared, not the logits
        hooked = HookedModel(model, None, name=kind, spec=run.model.spec)
        centred = run.model.folded(fold_norms=False, centre_writing=True)
        hooked.W_E.copy_(centred.W_E)
        if hooked.spec.pos_embed:
            hooked.W_pos.copy_(centred.W_pos)
        for layer in range(3):
            for name in ("W_O", "W_out", "b_O", "b_out"):
                getattr(hooked, name)[layer].copy_(getattr(centred, name)[layer])
    _, cache = hooked.run_with_cache(TOKENS)
    close(cache["unembed.hook_in"], run.cache["unembed.hook_in"])
    if kind != "bloom":  # norms its embedding, which gives it a mean again
        assert cache["resid_post", 2].mean(-1).abs().max() < 1e-5
        assert run.cache["resid_post", 2].mean(-1).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in FOLDABLE if kind != "gemma2"])
def test_a_centred_unembedding_gives_the_same_probabilities(kind: str) -> None:
    model, _, cache = captured(kind)
    weights = model.folded(fold_norms=POST_NORM.get(kind, True), centre_unembed=True)
    logits = cache["ln_final.hook_normalized"] @ weights.W_U + weights.b_U
    close(logits.log_softmax(-1), cache["unembed.hook_out"].log_softmax(-1))
    assert logits.mean(-1).abs().max() < 1e-5
    assert cache["unembed.hook_out"].mean(-1).abs().max() > 1e-3


def test_what_cannot_be_centred_is_refused_with_the_reason() -> None:
    for kind in ("llama", "gemma", "mixtral", "phi3"):
        with pytest.raises(ModelError, match="RMSNorms, which see the mean"):
            captured(kind).model.folded(centre_writing=True)
    for kind in ("gemma2", "olmo2", "opt-350m"):
        with pytest.raises(ModelError, match="norms what is written"):
            captured(kind).model.folded(fold_norms=False, centre_writing=True)
    with pytest.raises(ModelError, match="soft-capped.*final_logit_softcapping=30.0"):
        captured("gemma2").model.folded(fold_norms=False, centre_unembed=True)
    bare = ReferenceConfig(d_vocab=50, n_ctx=16, n_layers=1, d_model=8, n_heads=2, d_head=4, normalization="none")
    with pytest.raises(ModelError, match="without a norm"):
        ReferenceTransformer.build(bare).hooked().folded(centre_writing=True)


# ---- circuits -------------------------------------------------------------------------------------------------------


def test_the_query_key_circuit_gives_the_scores() -> None:
    """GPT-Neo has no rotation, no bias of queries and keys, and no scale."""
    run = captured("gpt_neo")
    x = read_by_heads(run, 1)
    for head in range(4):
        scores = x @ run.model.QK(1, head).AB @ x.mT
        own = run.cache["attn_scores", 1][:, head]
        seen = own.isfinite()
        close(scores[seen], own[seen])


def test_the_query_key_circuit_of_grouped_heads() -> None:
    """A key at the query's own place is turned as far as the query: rotation cancels on the diagonal."""
    run = captured("llama")
    x = read_by_heads(run, 2)
    for head in range(4):
        scores = (x @ run.model.QK(2, head).AB * x).sum(-1) * 8**-0.5
        close(scores, run.cache["attn_scores", 2][:, head].diagonal(dim1=-2, dim2=-1))
    every = run.model.QK(2)
    assert every.shape == (4, 32, 32)
    assert torch.equal(every[3].AB, run.model.QK(2, 3).AB)


def test_the_output_value_circuit_gives_what_heads_write() -> None:
    run = captured("llama")
    x = read_by_heads(run, 1)
    moved = torch.einsum("bhqk,bkd->bhqd", run.cache["pattern", 1], x)
    written = sum((moved[:, head] @ run.model.OV(1, head).AB for head in range(4)), torch.zeros_like(x))
    close(written, run.cache["attn_out", 1])
    assert torch.equal(run.model.OV(1)[2].AB, run.model.OV(1, 2).AB)


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "opt-350m"])
def test_full_circuits_go_from_tokens_to_tokens_and_logits(kind: str) -> None:
    model = captured(kind).model
    W_E = model.W_E.double() * model.weights.embed_scale
    QK = W_E @ model.QK(0, 3).AB.double() @ W_E.T
    OV = W_E @ model.OV(0, 3).AB.double() @ model.W_U.double()
    found_qk, found_ov = model.QK(0, 3, full=True), model.OV(0, 3, full=True)
    assert found_qk.shape == found_ov.shape == (320, 320)
    assert functional.mse_loss(found_qk.AB.double(), QK) < 1e-8 * QK.square().mean()
    assert functional.mse_loss(found_ov.AB.double(), OV) < 1e-8 * OV.square().mean()


def test_circuits_of_folded_weights() -> None:
    weights = folded("llama")
    x = captured("llama").cache["blocks.0.ln1.hook_normalized"]
    moved = captured("llama").cache["pattern", 0][:, 1] @ x @ weights.OV(0, 1).AB
    z = captured("llama").cache["z", 0][:, :, 1]
    close(moved, z @ captured("llama").model.W_O[0, 1])
