"""The model families: one spec each, a variant where a family differs from another in a line or two."""

from dataclasses import replace
from typing import TYPE_CHECKING

from microtome.model.specs import Dense, Experts, FamilySpec, Fused, Gated, Separate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_QKV = Separate(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj")

LLAMA = FamilySpec(
    name="llama",
    model_types=("llama",),
    blocks="model.layers",
    embed="model.embed_tokens",
    ln_final="model.norm",
    attn="self_attn",
    qkv=_QKV,
    o="self_attn.o_proj",
    mlp=Gated(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
)
MISTRAL = LLAMA.variant("mistral")
QWEN2 = LLAMA.variant("qwen2")
QWEN3 = LLAMA.variant("qwen3")
GEMMA = LLAMA.variant("gemma", norm_offset=1.0)
MIXTRAL = LLAMA.variant("mixtral", mlp=Experts(module="mlp", router="mlp.gate", experts="mlp.experts"))
PHI3 = LLAMA.variant(
    "phi3",
    qkv=Fused(qkv="self_attn.qkv_proj", layout="blocks"),
    mlp=Gated(gate="mlp.gate_up_proj", up=None, down="mlp.down_proj"),
)
# Norms on both sides of attention and MLP.
GEMMA2 = GEMMA.variant(
    "gemma2",
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
)
GEMMA3 = GEMMA2.variant("gemma3", "gemma3_text")
# Norms only after attention and MLP; the MLP reads the stream itself.
OLMO2 = LLAMA.variant(
    "olmo2",
    ln1=None,
    ln1_post="post_attention_layernorm",
    ln2=None,
    ln2_post="post_feedforward_layernorm",
    mid="mlp",
)


def _stablelm(spec: FamilySpec, hf: "PretrainedConfig") -> FamilySpec:
    return replace(spec, parallel=True, ln2=None) if hf.use_parallel_residual else spec


STABLELM = LLAMA.variant("stablelm", adapt=_stablelm)
PHI = LLAMA.variant(
    "phi",
    ln_final="model.final_layernorm",
    o="self_attn.dense",
    mlp=Dense(up="mlp.fc1", down="mlp.fc2"),
    ln2=None,
    parallel=True,
)

GPT2 = FamilySpec(
    name="gpt2",
    model_types=("gpt2",),
    blocks="transformer.h",
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    ln_final="transformer.ln_f",
    attn="attn",
    qkv=Fused(qkv="attn.c_attn", layout="blocks"),
    o="attn.c_proj",
    mlp=Dense(up="mlp.c_fc", down="mlp.c_proj"),
    ln1="ln_1",
    ln2="ln_2",
    rotary=False,
)
GPT_NEO = GPT2.variant(
    "gpt_neo",
    attn="attn.attention",
    qkv=Separate(q="attn.attention.q_proj", k="attn.attention.k_proj", v="attn.attention.v_proj"),
    o="attn.attention.out_proj",
)
GPTJ = GPT2.variant(
    "gptj",
    pos_embed=None,
    qkv=Separate(q="attn.q_proj", k="attn.k_proj", v="attn.v_proj"),
    o="attn.out_proj",
    mlp=Dense(up="mlp.fc_in", down="mlp.fc_out"),
    ln2=None,
    rotary=True,
    parallel=True,
)
GPT_NEOX = FamilySpec(
    name="gpt_neox",
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    ln_final="gpt_neox.final_layer_norm",
    attn="attention",
    qkv=Fused(qkv="attention.query_key_value", layout="groups"),
    o="attention.dense",
    mlp=Dense(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    adapt=lambda spec, hf: replace(spec, parallel=hf.use_parallel_residual),
)
BLOOM = GPT_NEOX.variant(
    "bloom",
    blocks="transformer.h",
    embed="transformer.word_embeddings",
    ln_final="transformer.ln_f",
    attn="self_attention",
    qkv=Fused(qkv="self_attention.query_key_value", layout="groups"),
    o="self_attention.dense",
    rotary=False,
    adapt=lambda spec, hf: replace(spec, additive=not hf.apply_residual_connection_post_layernorm),
)


def _falcon(spec: FamilySpec, hf: "PretrainedConfig") -> FamilySpec:
    """Parallel blocks with two norms (the newer kind), parallel with one (7B), or serial; rotary or ALiBi."""
    spec = replace(spec, rotary=not hf.alibi)
    if hf.new_decoder_architecture and hf.num_ln_in_parallel_attn != 1:
        return replace(spec, parallel=True, ln1="ln_attn", ln2="ln_mlp")
    if hf.new_decoder_architecture or hf.parallel_attn:
        return replace(spec, parallel=True, ln2=None)
    return replace(spec, mlp_out_overwritten=False)


FALCON = BLOOM.variant("falcon", mlp_out_overwritten=True, adapt=_falcon)


def _opt(spec: FamilySpec, hf: "PretrainedConfig") -> FamilySpec:
    """OPT-350m norms after each addition, and its embedding is narrower than the stream."""
    if hf.word_embed_proj_dim != hf.hidden_size:
        spec = replace(spec, embed_out="model.decoder.project_in", unembed_in="model.decoder.project_out")
    if hf.do_layer_norm_before:
        return spec if not hf._remove_final_layer_norm else replace(spec, ln_final=None)  # noqa: SLF001
    return replace(spec, ln_final=None, ln1=None, ln2=None, additive=False)


OPT = FamilySpec(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embed="model.decoder.embed_tokens",
    pos_embed="model.decoder.embed_positions",
    ln_final="model.decoder.final_layer_norm",
    attn="self_attn",
    qkv=_QKV,
    o="self_attn.out_proj",
    mlp=Dense(up="fc1", down="fc2", flat=True),
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    rotary=False,
    adapt=_opt,
)


def _reference(spec: FamilySpec, hf: "PretrainedConfig") -> FamilySpec:
    """The model of `reference.py`, which has what its config says."""
    sizes = hf.sizes
    if sizes.activation == "swiglu":
        spec = replace(spec, mlp=Gated(gate="mlp.gate", up="mlp.up", down="mlp.down"))
    elif sizes.activation == "solu":
        spec = replace(spec, mlp=Dense(up="mlp.up", down="mlp.down", norm="mlp.ln"))
    if sizes.normalization == "none":
        spec = replace(spec, ln_final=None, ln1=None, ln2=None, mid="mlp")
    return replace(
        spec,
        has_attn=not sizes.mlp_only,
        has_mlp=not sizes.attn_only,
        rotary=sizes.positions == "rotary",
        shortformer=sizes.positions == "shortformer",
        pos_embed="transformer.pos_embed" if sizes.positions in ("learned", "shortformer") else None,
    )


REFERENCE = FamilySpec(
    name="reference",
    model_types=("microtome_reference",),
    blocks="transformer.blocks",
    embed="transformer.embed",
    ln_final="transformer.ln_final",
    unembed="transformer.unembed",
    attn="attn",
    qkv=Separate(q="attn.q", k="attn.k", v="attn.v"),
    o="attn.o",
    mlp=Dense(up="mlp.up", down="mlp.down"),
    ln1="ln1",
    ln2="ln2",
    adapt=_reference,
)

FAMILIES = (
    GPT2,
    GPT_NEO,
    GPTJ,
    GPT_NEOX,
    OPT,
    BLOOM,
    FALCON,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI,
    PHI3,
    STABLELM,
    OLMO2,
    REFERENCE,
)


def family_of(hf: "PretrainedConfig") -> FamilySpec | None:
    """The spec of a Hugging Face config's family, fitted to the config; None for a family that has none."""
    for spec in FAMILIES:
        if hf.model_type in spec.model_types:
            return spec.for_model(hf)
    return None
