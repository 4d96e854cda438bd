"""`microtome heads`: which attention heads do what, scored on repeated random tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.cli.effects import check_figure
from microtome.cli.options import CommandOptions
from microtome.common.device import DTypeName

if TYPE_CHECKING:
    from microtome.circuits import HeadScores
    from microtome.views import Heatmap


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Score every attention head on random tokens that are said again: induction, previous token, duplicate token, current
    token, first token, prefix matching and copying. Means are over the queries behind the first copy alone."""

    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    kinds: tuple[str, ...] = ()
    """Only these scores."""
    length: int = 50
    """Random tokens in a copy (prefix matching and copying: 25, four times)."""
    repeats: int = 2
    """How often they are said."""
    batch: int = 10
    """How many sequences."""
    no_bos: bool = False
    """Put no BOS in front."""
    seed: int = 0
    """Of the random tokens."""
    rows: int = 4
    """Sequences run at once: bounds memory."""
    top: int = 5
    """How many heads of each kind to show."""
    figure: Path | None = None
    """Draw layer by head as .png, .svg, .html or .json: of several kinds a file each, heads-induction.png for heads.png."""


def run(options: Options) -> dict[str, Any]:
    """Score the heads and list the best of each kind, with 95 % bootstrap intervals over sequences."""
    check_figure(options.figure)
    from microtome.circuits import head_scores
    from microtome.model import load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    scores = head_scores(
        model,
        kinds=options.kinds or None,
        length=options.length,
        repeats=options.repeats,
        batch=options.batch,
        with_bos=not options.no_bos,
        seed=options.seed,
        rows=options.rows,
    )
    result: dict[str, Any] = {
        "model": options.model,
        "sequences": options.batch,
        "kinds": {kind: _kind(scores, kind, options.top) for kind in scores},
    }
    return result if options.figure is None else {**result, "figures": _draw(scores, options.figure)}


def _kind(scores: "HeadScores", kind: str, top: int) -> dict[str, Any]:
    low, high = scores.effects[kind].interval()
    places = [(int(layer), int(head)) for (layer, head), _ in scores.effects[kind].top(top, by_size=False)]
    grid = scores[kind]
    return {
        "top": [
            {
                "head": f"L{layer}.H{head}",
                "score": float(grid[layer, head]),
                "low": float(low[layer, head]),
                "high": float(high[layer, head]),
            }
            for layer, head in places
        ],
        "scores": grid.tolist(),
        "note": scores.effects[kind].notes[0],
    }


def _draw(scores: "HeadScores", path: Path) -> list[str]:
    """A heatmap of each kind; of several, the kind stands in the name of its file."""
    kinds = list(scores)
    places = {kind: path if len(kinds) == 1 else path.with_name(f"{path.stem}-{kind}{path.suffix}") for kind in kinds}
    return [str(_heatmap(scores, kind).save(place)) for kind, place in places.items()]


def _heatmap(scores: "HeadScores", kind: str) -> "Heatmap":
    from microtome.views import Heatmap

    grid = scores[kind]
    return Heatmap(
        grid,
        rows=[str(i) for i in range(grid.shape[0])],
        columns=[str(i) for i in range(grid.shape[1])],
        row_label="layer",
        column_label="head",
        value_label=scores.effects[kind].what,
        limits=(-1, 1) if kind == "copying" else (0, 1),
        diverging=kind == "copying",
        caption=scores.effects[kind].notes[0],
    )


def show(result: dict[str, Any]) -> str:
    """The best heads of each kind, with intervals."""
    rows = []
    for kind, of_kind in result["kinds"].items():
        rows.append(f"{kind.replace('_', ' ')}  ({of_kind['note']})")
        for row in of_kind["top"]:
            interval = f"   {row['low']:.3f} to {row['high']:.3f}" if result["sequences"] > 1 else ""
            rows.append(f"  {row['head']:<9}{row['score']:>7.3f}{interval}")
    return "\n".join([*rows, *result.get("figures", ())])
