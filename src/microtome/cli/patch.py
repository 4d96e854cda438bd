"""`microtome patch`: which activations, or which paths, carry the difference between two prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from microtome.cli.effects import as_text, check_figure, draw, top_places
from microtome.cli.options import CommandOptions
from microtome.common.device import DTypeName
from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from microtome.circuits import Effects

Texts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...")]


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Patch activations of one prompt into a run of another, at each place in turn, and measure logit(answer) − logit(wrong).
    With --receivers, patch the paths from each head straight to these inputs instead (or from --senders, all at once)."""

    clean: Texts
    """The clean prompt, or several."""
    corrupt: Texts
    """A corrupt prompt of as many tokens for each clean one."""
    answer: Texts
    """The right next token, one for all prompts or one for each; mind the space in front of it."""
    wrong: Texts
    """The wrong next token, likewise."""
    over: str | None = None
    """resid_pre (not said: this), resid_mid, resid_post, attn_out, mlp_out, layer, head, q, k, v, pattern or neuron; with
    --receivers head (not said: this) or mlp."""
    by_position: bool | None = None
    """Patch each position alone: True or False. Not said: True for the residual stream and what is added to it."""
    direction: str | None = None
    """denoising: clean activations into the corrupt run (not said: this); noising: the other way round."""
    normalize: bool = False
    """Show 0 for no effect and 1 for the other run's metric."""
    receivers: tuple[str, ...] = ()
    """Path patching to these inputs: logits, L9.H3.q, L9.KV1.v, L5.mlp, L5.resid_pre."""
    senders: tuple[str, ...] = ()
    """The paths from these together: L5.H3, L5.mlp, embed. Not said: from each head (or MLP) alone."""
    freeze_mlps: bool = False
    """Hold the MLPs on the paths at their clean outputs."""
    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_rows: int = 128
    """Rows run at once: bounds memory."""
    top: int = 10
    """How many of the largest effects to show."""
    figure: Path | None = None
    """Draw the mean effects as .png, .svg, .html or .json."""


def run(options: Options) -> dict[str, Any]:
    """Patch, and list the places that matter most with 95 % bootstrap intervals over prompts."""
    _check(options)
    from microtome.circuits import logit_difference
    from microtome.model import load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    metric = logit_difference(model, list(options.answer), list(options.wrong))
    effects, effect = (_paths if options.receivers else _activations)(options, model, metric)
    assert effects.clean is not None
    assert effects.corrupt is not None
    result = {
        "model": options.model,
        "prompts": len(options.clean),
        "clean": float(effects.clean.mean()),
        "corrupt": float(effects.corrupt.mean()),
        "effect": effect.what,
        "top": top_places(effect, options.top),
        "effects": effect.to_json(),
    }
    return result if options.figure is None else {**result, "figure": str(draw(effect, options.figure))}


def _check(options: Options) -> None:
    """Before anything is run. Raises ConfigError for options that cannot be, or mean nothing beside each other."""
    if options.direction not in (None, "denoising", "noising"):
        raise ConfigError("No such direction of patching", got=options.direction, expected="denoising or noising")
    useless = ("by_position", "direction", "normalize") if options.receivers else ("senders", "freeze_mlps")
    useless = (*useless, "over") if options.senders and options.receivers else useless
    said = [f"--{name.replace('_', '-')}" for name in useless if getattr(options, name) != getattr(Options, name)]
    if said and options.receivers:
        raise ConfigError(
            "Paths are patched from all --senders together, or from each head or MLP alone, into the clean run",
            got=", ".join(said),
            fix="Leave that out; without --receivers activations are patched",
        )
    if said:
        raise ConfigError("Paths need receivers", got=", ".join(said), fix="Say --receivers logits, for example")
    check_figure(options.figure, _n_axes(options))


def _n_axes(options: Options) -> int:
    if options.receivers:
        return 0 if options.senders else 2 - (options.over == "mlp")
    by_layer = options.over not in ("head", "z", "q", "k", "v", "pattern", "neuron")
    return 2 - by_layer + (by_layer if options.by_position is None else options.by_position)


def _activations(options: Options, model: Any, metric: Any) -> tuple["Effects", "Effects"]:
    """The effects, and what to show of them: the change by the patch, or the normalized metric."""
    from microtome.circuits import activation_patching

    effects = activation_patching(
        model,
        list(options.clean),
        list(options.corrupt),
        metric,
        options.over or "resid_pre",
        by_position=options.by_position,
        direction="noising" if options.direction == "noising" else "denoising",
        normalize=options.normalize,
        max_rows=options.max_rows,
    )
    if options.normalize:
        return effects, effects
    base = effects.clean if options.direction == "noising" else effects.corrupt
    assert base is not None
    return effects, effects.relabelled(f"change of the {effects.what}", effects.values - base)


def _paths(options: Options, model: Any, metric: Any) -> tuple["Effects", "Effects"]:
    from microtome.circuits import path_patching, path_patching_sweep

    shared: dict[str, Any] = {"metric": metric, "freeze_mlps": options.freeze_mlps, "max_rows": options.max_rows}
    texts = list(options.clean), list(options.corrupt)
    if options.senders:
        effects = path_patching(model, *texts, list(options.senders), list(options.receivers), **shared)
    else:
        over = options.over or "head"
        effects = path_patching_sweep(model, *texts, list(options.receivers), over=over, **shared)
    return effects, effects.change


def show(result: dict[str, Any]) -> str:
    """The metric of both prompts, then the largest effects."""
    return as_text(result, result["effect"], result["effects"]["notes"])
