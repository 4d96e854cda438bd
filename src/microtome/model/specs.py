"""What a model family is, for Microtome: the paths of its parts inside the untouched Hugging Face module.

Nothing else knows a family's module names. `families.py` holds one `FamilySpec` for each; `stations.py` turns a spec
and a model's sizes into its hook points.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes of a model under the field's names. `n_ctx` is the longest sequence that it takes; `n_experts` and
    `top_k` are 0 where there are no experts."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_experts: int = 0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class Separate:
    """Query, key and value come from three linear maps; the paths are relative to the block."""

    q: str
    k: str
    v: str


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One linear map gives q, k and v: all queries, then keys, then values (`"blocks"`), or for each key/value head in
    turn its queries, its key and its value (`"groups"`)."""

    qkv: str
    layout: Literal["blocks", "groups"]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """An MLP: `up` writes the neurons, `down` reads them. `norm`: a norm between activation function and `down` (SoLU).
    `flat`: its tensors are `[batch · pos, …]`."""

    up: str
    down: str
    norm: str | None = None
    flat: bool = False

    @property
    def module(self) -> str:
        """Where its input goes in."""
        return _around(self.up)


@dataclass(frozen=True, kw_only=True)
class Gated:
    """A gated MLP: act(gate) · up. Where one map gives both, `gate` is its path and `up` is None."""

    gate: str
    up: str | None
    down: str
    flat: bool = False

    @property
    def module(self) -> str:
        """Where its input goes in."""
        return _around(self.gate)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of gated experts. The router gives (logits, weights, indices) of `[batch · pos, top_k]`; `experts` holds
    all experts' weights as `gate_up_proj` `[expert, 2 · d_mlp, d_model]` and `down_proj` `[expert, d_model, d_mlp]`."""

    module: str
    router: str
    experts: str


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A family. The first group are paths in the whole module, the second paths in a block; None is a part that the
    family has not.

    `embed_out`: what widens the embedding, where it is narrower than the stream; `unembed_in`: what narrows the stream
    again. `mid`: the module whose input is the stream between attention and MLP, where that is not `ln2`.
    `has_attn`, `has_mlp`: whether blocks have these parts (their paths mean nothing otherwise). `shortformer`: queries
    and keys read the normed stream plus the positional embedding, which is not in the stream itself. `parallel`:
    attention and MLP both read the block's input. `additive`: the block adds to the residual stream (not so where norms
    come after the addition). `mlp_out_overwritten`: the library changes the MLP's output in place afterwards.
    `norm_offset`: what is added to a norm's weight (Gemma: 1). `adapt` makes the spec of one model from its Hugging Face
    config, where that decides.
    """

    name: str
    model_types: tuple[str, ...]

    blocks: str
    embed: str
    embed_out: str | None = None
    pos_embed: str | None = None
    ln_final: str | None
    unembed: str = "lm_head"
    unembed_in: str | None = None

    attn: str
    qkv: Separate | Fused
    o: str
    mlp: Dense | Gated | Experts
    ln1: str | None
    ln2: str | None
    ln1_post: str | None = None
    ln2_post: str | None = None
    mid: str | None = None

    has_attn: bool = True
    has_mlp: bool = True
    shortformer: bool = False
    rotary: bool = True
    parallel: bool = False
    additive: bool = True
    mlp_out_overwritten: bool = False
    norm_offset: float = 0.0
    adapt: "Callable[[FamilySpec, PretrainedConfig], FamilySpec] | None" = None

    def for_model(self, hf: "PretrainedConfig") -> "FamilySpec":
        """The spec of one model of the family."""
        return self.adapt(self, hf) if self.adapt else self

    def variant(self, name: str, *model_types: str, **changes: object) -> "FamilySpec":
        """A family that differs from this one in what is named."""
        return replace(self, name=name, model_types=model_types or (name,), **changes)  # type: ignore[arg-type]

    def model_config(self, hf: "PretrainedConfig") -> ModelConfig:
        """The sizes in a Hugging Face config (whose own `attribute_map` already evens out most names)."""
        heads = hf.num_attention_heads if self.has_attn else 0
        d_mlp = _first(hf, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner") or 4 * hf.hidden_size
        return ModelConfig(
            family=self.name,
            n_layers=hf.num_hidden_layers,
            d_model=hf.hidden_size,
            n_heads=heads,
            n_kv_heads=_n_kv_heads(hf) if heads else 0,
            d_head=(getattr(hf, "head_dim", None) or hf.hidden_size // heads) if heads else 0,
            d_mlp=d_mlp if self.has_mlp else 0,
            d_vocab=hf.vocab_size,
            n_ctx=_first(hf, "max_position_embeddings", "seq_length") or 2048,
            n_experts=_first(hf, "num_local_experts") or 0,
            top_k=(_first(hf, "num_experts_per_tok") or 0) if _first(hf, "num_local_experts") else 0,
        )


def _around(first: str) -> str:
    """The module that the MLP's input goes into: that around its first map, or this itself where it stands alone (OPT)."""
    return first.rpartition(".")[0] or first


def _n_kv_heads(hf: "PretrainedConfig") -> int:
    """Falcon has one key/value head (`multi_query`) unless it is of the newer kind; other families say a number."""
    if hasattr(hf, "multi_query"):
        if hf.new_decoder_architecture:
            return int(hf.num_kv_heads)
        return 1 if hf.multi_query else int(hf.num_attention_heads)
    return _first(hf, "num_key_value_heads") or int(hf.num_attention_heads)


def _first(hf: "PretrainedConfig", *names: str) -> int | None:
    for name in names:
        value = getattr(hf, name, None)
        if value is not None:
            return int(value)
    return None
