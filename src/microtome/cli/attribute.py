"""`microtome attribute`: which parts, or which edges between parts, a task depends on, estimated from gradients."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.effects import as_text, check_figure, draw, top_places
from microtome.cli.options import CommandOptions
from microtome.common.device import DTypeName
from microtome.common.errors import ConfigError

Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...")]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Estimate from one backward pass what patching each part, or each edge between parts, would change in
    logit(answer) − logit(wrong)."""

    clean: Texts
    """The clean prompt, or several."""
    corrupt: Texts
    """A corrupt prompt of as many tokens for each clean one."""
    answer: Texts
    """The right next token, one for all prompts or one for each; mind the space in front of it."""
    wrong: Texts
    """The wrong next token, likewise."""
    level: str = "node"
    """node or edge."""
    method: str = "gradient"
    """gradient or eap; integrated-gradients or eap-ig; eap-ig-activations."""
    over: str = "head"
    """Which nodes: head, q, k, v, attn_out, mlp_out, neuron, resid_pre, resid_mid or resid_post."""
    rule: str = "none"
    """none, relp, frozen_norms, frozen_patterns, identity_activations or half_gates."""
    steps: int | None = None
    """Points on the line along which gradients are integrated (not said: 5); not for gradient and eap."""
    direction: str = "noising"
    """noising: corrupt activations into the clean run; denoising: the other way round."""
    by_position: bool = False
    """Score each position of a node alone."""
    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 8
    """Prompts run at once: bounds memory."""
    top: int = 10
    """How many of the largest scores to show."""
    figure: Path | None = None
    """Draw the mean scores of nodes as .png, .svg, .html or .json."""


def run(options: Options) -> dict[str, Any]:
    """Attribute, and list the largest scores with 95 % bootstrap intervals over prompts."""
    from microtome.circuits.attribution_config import AttributeConfig, Rules

    shared = ["level", "method", "over", "direction", "by_position", "batch_size"]
    shared += [] if options.steps is None else ["steps"]
    config = AttributeConfig(**{name: getattr(options, name) for name in shared}, rules=Rules.named(options.rule))
    if options.steps is not None and config.path is None:
        raise ConfigError(
            f"The method {config.method} takes the gradient at one place: there are no steps",
            got=f"--steps {options.steps}",
            fix="Leave it out, or say --method eap-ig",
        )
    if options.figure is not None and options.level == "edge":
        raise ConfigError(
            "Edges are drawn as a circuit", fix="microtome circuit --figure FILE.svg draws the best of them"
        )
    check_figure(options.figure, 1 + (options.over in ("head", "q", "k", "v", "neuron")) + options.by_position)
    from microtome.circuits import attribute, logit_difference
    from microtome.model import load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    metric = logit_difference(model, list(options.answer), list(options.wrong))
    effects = attribute(model, list(options.clean), list(options.corrupt), metric, config)
    assert effects.clean is not None
    assert effects.corrupt is not None
    result = {
        "model": options.model,
        "prompts": len(options.clean),
        "clean": float(effects.clean.mean()),
        "corrupt": float(effects.corrupt.mean()),
        "what": effects.what,
        "notes": list(effects.notes),
        "top": top_places(effects, options.top),
    }
    if options.level == "node":
        result["effects"] = effects.to_json()
    return result if options.figure is None else {**result, "figure": str(draw(effects, options.figure))}


def show(result: dict[str, Any]) -> str:
    """The metric of both prompts, then the largest scores."""
    return as_text(result, result["what"], result["notes"])
