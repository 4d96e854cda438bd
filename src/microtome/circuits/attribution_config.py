"""How attributions are made, as one checked value. Needs no torch, so commands refuse bad settings at once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from microtome.common.config import from_dict, require
from microtome.common.errors import unknown_name

POINTS = {
    "head": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out", "neuron": "mlp.hook_post", "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
}  # fmt: skip
METHODS = ("gradient", "integrated-gradients", "eap", "eap-ig", "eap-ig-activations")
LEVELS = ("node", "edge")
DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which rules a backward pass follows; none of them by default. What they are is in `rules.py`."""

    frozen_norms: bool = False
    frozen_patterns: bool = False
    identity_activations: bool = False
    half_gates: bool = False

    @classmethod
    def named(cls, name: str) -> "Rules":
        """`"none"`, `"relp"`, or one rule by its field's name. Raises ConfigError for another."""
        presets = {"none": cls(), "relp": RELP} | {field.name: cls(**{field.name: True}) for field in fields(cls)}
        name = name.replace("-", "_")
        if name not in presets:
            raise unknown_name("rule", name, presets)
        return presets[name]

    def __str__(self) -> str:
        if self == RELP:
            return "relp"
        return " + ".join(field.name for field in fields(self) if getattr(self, field.name)) or "none"


RELP = Rules(frozen_norms=True, identity_activations=True, half_gates=True)


@dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """Settings of `attribute`. Raises ConfigError for settings that cannot be."""

    level: str = "node"
    """`"node"` or `"edge"`."""
    method: str = "gradient"
    """Where gradients are taken: `"gradient"` (the same as `"eap"`), `"integrated-gradients"` (the same as `"eap-ig"`), or
    `"eap-ig-activations"`."""
    over: str = "head"
    """Which parts are the nodes: `"head"` (its z), `"q"`, `"k"`, `"v"`, `"attn_out"`, `"mlp_out"`, `"neuron"`, `"resid_pre"`,
    `"resid_mid"` or `"resid_post"`."""
    steps: int = 5
    """How many points there are on the line along which gradients are integrated."""
    rules: Rules = Rules()
    """What the backward pass takes as constant."""
    direction: str = "noising"
    """`"noising"`: corrupt activations into the clean run; `"denoising"`: clean ones into the corrupt run."""
    by_position: bool = False
    """Keep each position's score; otherwise they are summed."""
    batch_size: int = 8
    """How many prompts are run at a time, which bounds the memory."""

    def __post_init__(self) -> None:
        known = {"level": LEVELS, "method": METHODS, "over": tuple(POINTS), "direction": DIRECTIONS}
        for name, valid in known.items():
            if getattr(self, name) not in valid:
                kind = "part to attribute to (over)" if name == "over" else name
                raise unknown_name(kind, getattr(self, name), valid)
        require(self.steps > 0, "steps must be positive", got=self.steps)
        require(self.batch_size > 0, "batch_size must be positive", got=self.batch_size)
        require(
            self.level == "node" or not self.by_position,
            "Edges are scored over all positions together",
            expected="level='node' for scores by position",
        )
        require(
            self.level == "node" or self.over == AttributeConfig.over,
            "Edges run between heads, MLPs, embedding and logits: there is nothing to choose with `over`",
            got=f"over={self.over!r}",
            expected="level='node' for scores of other parts",
        )

    @classmethod
    def of(cls, config: "AttributeConfig | None", settings: Mapping[str, Any]) -> "AttributeConfig":
        """A config with some settings changed. Raises ConfigError for an unknown one, naming the nearest."""
        there = {field.name: getattr(config, field.name) for field in fields(cls)} if config else {}
        return from_dict(cls, {**there, **settings})

    @property
    def path(self) -> str | None:
        """Along what gradients are integrated: `"inputs"`, `"activations"`, or nothing."""
        if self.method == "eap-ig-activations":
            return "activations"
        return "inputs" if self.method in ("integrated-gradients", "eap-ig") else None
