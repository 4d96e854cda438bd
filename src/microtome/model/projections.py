"""Projections: which linear map gives q, k, v, the gate or the neurons, and where in its output they are."""

from typing import Literal

from microtome.model.specs import Dense, Experts, FamilySpec, Gated, ModelConfig, Separate
from microtome.model.views import Columns, Grouped, View, Whole

AttentionPart = Literal["q", "k", "v"]
Part = AttentionPart | Literal["gate", "up"]


def projection(spec: FamilySpec, config: ModelConfig, part: Part) -> tuple[str, View]:
    """The linear map (its path in a block) that gives q, k, v, the gate or the up part, and where in its output."""
    if part == "gate" or part == "up":  # noqa: PLR1714 - the type checker follows this form
        return _mlp_projection(spec.mlp, config, part)
    heads = config.n_heads if part == "q" else config.n_kv_heads
    if isinstance(spec.qkv, Separate):
        return getattr(spec.qkv, part), Columns(0, heads, config.d_head)
    if spec.qkv.layout == "groups":
        return spec.qkv.qkv, Grouped(part, config.n_heads, config.n_kv_heads, config.d_head)
    before = {"q": 0, "k": config.n_heads, "v": config.n_heads + config.n_kv_heads}[part]
    return spec.qkv.qkv, Columns(before * config.d_head, heads, config.d_head)


def _mlp_projection(mlp: Dense | Gated | Experts, config: ModelConfig, part: Part) -> tuple[str, View]:
    if isinstance(mlp, Gated) and mlp.up is None:
        return mlp.gate, Columns(0 if part == "gate" else config.d_mlp, None, config.d_mlp)
    if isinstance(mlp, Gated) and part == "gate":
        return mlp.gate, Whole()
    assert not isinstance(mlp, Experts)
    assert mlp.up is not None
    return mlp.up, Whole()
