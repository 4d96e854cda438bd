"""One spec per model family: where, inside the untouched Hugging Face module, each hook point is.

A `Site` is the input or the output of a submodule. A family is a table of sites and the paths of its weights; nothing
else in Microtome knows a family's module names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from microtome.common.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Site:
    """Where a hook point's tensor passes: `side` of the submodule `module` (`{i}` stands for the layer).

    `in_place` marks an input that the residual stream shares: Hugging Face's block keeps the same tensor to add it back
    later, so an edit has to be written into that tensor to reach both readers.
    """

    module: str
    side: Literal["input", "output"]
    in_place: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a model under the field's names. `n_ctx` is the longest sequence that it takes."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A family: its name, the `model_type`s of Hugging Face that belong to it, its sites and the paths of its
    weights."""

    name: str
    model_types: tuple[str, ...]
    sites: Mapping[str, Site]
    embedding: str
    unembedding: str
    final_norm: str

    def model_config(self, hf: "PretrainedConfig") -> ModelConfig:
        """The sizes in a Hugging Face config (whose own `attribute_map` already evens out most names)."""
        heads = hf.num_attention_heads
        d_head = getattr(hf, "head_dim", None) or hf.hidden_size // heads
        d_mlp = getattr(hf, "intermediate_size", None) or getattr(hf, "n_inner", None) or 4 * hf.hidden_size
        return ModelConfig(
            family=self.name,
            n_layers=hf.num_hidden_layers,
            d_model=hf.hidden_size,
            n_heads=heads,
            n_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
            d_head=d_head,
            d_mlp=d_mlp,
            d_vocab=hf.vocab_size,
            n_ctx=hf.max_position_embeddings,
        )


LLAMA = FamilySpec(
    name="llama",
    model_types=("llama",),
    sites={
        "hook_embed": Site("model.embed_tokens", "output"),
        "hook_resid_pre": Site("model.layers.{i}", "input"),
        "attn.hook_z": Site("model.layers.{i}.self_attn.o_proj", "input"),
        "hook_attn_out": Site("model.layers.{i}.self_attn", "output"),
        "hook_resid_mid": Site("model.layers.{i}.post_attention_layernorm", "input", in_place=True),
        "mlp.hook_pre": Site("model.layers.{i}.mlp.gate_proj", "output"),
        "mlp.hook_pre_linear": Site("model.layers.{i}.mlp.up_proj", "output"),
        "mlp.hook_post": Site("model.layers.{i}.mlp.down_proj", "input"),
        "hook_mlp_out": Site("model.layers.{i}.mlp", "output"),
        "hook_resid_post": Site("model.layers.{i}", "output"),
        "unembed.hook_in": Site("lm_head", "input"),
        "unembed.hook_out": Site("lm_head", "output"),
    },
    embedding="model.embed_tokens",
    unembedding="lm_head",
    final_norm="model.norm",
)

GPT2 = FamilySpec(
    name="gpt2",
    model_types=("gpt2",),
    sites={
        "hook_embed": Site("transformer.wte", "output"),
        "hook_pos_embed": Site("transformer.wpe", "output"),
        "hook_resid_pre": Site("transformer.h.{i}", "input"),
        "attn.hook_z": Site("transformer.h.{i}.attn.c_proj", "input"),
        "hook_attn_out": Site("transformer.h.{i}.attn", "output"),
        "hook_resid_mid": Site("transformer.h.{i}.ln_2", "input", in_place=True),
        "mlp.hook_pre": Site("transformer.h.{i}.mlp.c_fc", "output"),
        "mlp.hook_post": Site("transformer.h.{i}.mlp.c_proj", "input"),
        "hook_mlp_out": Site("transformer.h.{i}.mlp", "output"),
        "hook_resid_post": Site("transformer.h.{i}", "output"),
        "unembed.hook_in": Site("lm_head", "input"),
        "unembed.hook_out": Site("lm_head", "output"),
    },
    embedding="transformer.wte",
    unembedding="lm_head",
    final_norm="transformer.ln_f",
)

FAMILIES = (LLAMA, GPT2)


def spec_for(config: "PretrainedConfig") -> FamilySpec:
    """The spec of a Hugging Face config's family. Raises ModelError for a family that has none."""
    for spec in FAMILIES:
        if config.model_type in spec.model_types:
            return spec
    raise ModelError(
        "This model's family has no spec yet",
        got=f"model_type {config.model_type!r}",
        expected=f"one of {', '.join(t for s in FAMILIES for t in s.model_types)}",
    )
