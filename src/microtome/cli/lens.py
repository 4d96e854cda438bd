"""`microtome lens`: what a model would say at each depth."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from microtome.cli.effects import check_figure
from microtome.cli.options import CommandOptions
from microtome.common.device import DTypeName

if TYPE_CHECKING:
    from microtome.circuits import Lens


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Read the residual stream of a prompt as next tokens, at the input of every block and at the end: the logit lens, or a
    tuned lens that `microtome tune-lens` made."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The text to run."""
    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    answer: str | None = None
    """A token to follow: its probability and rank (0 is the likeliest) at each depth; mind the space in front."""
    top: int = 3
    """How many of the likeliest tokens to show."""
    tuned: Path | None = None
    """The folder of a tuned lens to read through."""
    mid: bool = False
    """Show the places between attention and MLP too."""
    figure: Path | None = None
    """Draw depth by position as .png, .svg, .html or .json: the answer's probability, or that of the likeliest token."""


def run(options: Options) -> dict[str, Any]:
    """Run the prompt once and read every depth."""
    check_figure(options.figure)
    from microtome.circuits import TunedLens, logit_lens
    from microtome.model import load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    tuned = None if options.tuned is None else TunedLens.load(options.tuned)
    lens = logit_lens(model, options.prompt, mid=options.mid, tuned=tuned)
    result = {"prompt": options.prompt, "answer": options.answer, **lens.to_json(options.top, answer=options.answer)}
    return result if options.figure is None else {**result, "figure": str(_draw(lens, options))}


def _draw(lens: "Lens", options: Options) -> Path:
    from microtome.views import Heatmap

    assert options.figure is not None
    if options.answer is not None:
        values, what = lens.effects(options.answer).mean, f"probability of {options.answer!r}"
    else:
        values, what = lens.confidence()[:, 0].cpu(), "probability of the likeliest token"
    figure = Heatmap(
        values,
        rows=lens.labels,
        columns=lens.positions.labels,
        row_label="depth",
        column_label="position",
        value_label=what,
        limits=(0, 1),
        caption="; ".join(lens.notes),
    )
    figure.save(options.figure)
    return options.figure


def show(result: dict[str, Any]) -> str:
    """A line for each depth."""
    followed = result["answer"] is not None
    head = f"{'depth':<12}" + (f"{result['answer']!r:>14}{'rank':>8}" if followed else "") + "  likeliest next tokens"
    rows = [head]
    for depth in result["depths"]:
        likely = "  ".join(f"{token['text']!r} {token['probability']:.2f}" for token in depth["top"])
        figures = f"{depth['probability']:>14.4f}{depth['rank']:>8,}" if followed else ""
        rows.append(f"{depth['depth']:<12}{figures}  {likely}")
    return "\n".join([*rows, "", *result["notes"], *([result["figure"]] if "figure" in result else [])])
