"""`microtome compare`: several dictionaries of one model side by side, and their trade-off of sparsity and loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from microtome.cli.data import TextOptions
from microtome.cli.evaluate import place
from microtome.common.errors import MissingDependencyError

if TYPE_CHECKING:
    from microtome.dictionary import Comparison
    from microtome.dictionary.comparison import Compared
    from microtome.views import Scatter

_NAMED = 8  # more names than this cover each other


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Measure several dictionaries on the same tokens: a table, and L0 against FVU and against CE recovered."""

    dictionaries: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Their folders; demo, hf://… and release/id may be among them, and folders of one dictionary for each of several points,
    each of which counts as one."""
    n_tokens: int = 131_072
    """Tokens for reconstruction figures."""
    function_tokens: int = 16_384
    """Tokens of these for CE and KL."""
    whole_only: bool = False
    """Of dictionaries that write several points: no CE and KL with each of these alone replaced."""
    similarity: bool = False
    """Compare the decoders too: MMCS of each pair, both directions and one to one."""
    out: Path | None = None
    """A folder for comparison.json and the figures as .png, .svg, .html and .json."""


def run(options: Options) -> dict[str, Any]:
    """Compare, write what was asked for, and return the table."""
    from microtome.common.artifacts import write_json
    from microtome.common.config import to_dict
    from microtome.dictionary import EvaluateConfig, compare, load_dictionary_or_set
    from microtome.dictionary.measures import finite

    config = EvaluateConfig(
        n_tokens=options.n_tokens, function_tokens=options.function_tokens, whole_only=options.whole_only
    )
    opened = [load_dictionary_or_set(name) for name in options.dictionaries]
    model = options.load_model()
    dictionaries = [dictionary.to(model.device) for dictionary in opened]
    dataset = options.load_tokens(model, place(options.dictionaries[0]))
    found = compare(model, dictionaries, dataset, config, names=options.dictionaries, similarities=options.similarity)
    result: dict[str, Any] = {
        "table": found.table(),
        "similarities": [
            {"first": first, "second": second, **to_dict(one)} for (first, second), one in found.similarities.items()
        ],
        "evaluations": {row.name: finite(to_dict(row.evaluation)) for row in found.rows},
        "notes": [f"{row.name}: {note}" for row in found.rows for note in row.evaluation.notes],
    }
    if options.out is None:
        return result
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "comparison.json", {**result, "dataset": dataset.config["corpus"], "part": options.part})
    return {**result, "out": str(options.out), "figures": _draw(found, options.out)}


def trade_off(found: "Comparison", figure: str) -> "Scatter":
    """L0 against `figure`, "fvu" or "ce_recovered", a point for each dictionary (named, if they are few), and a line
    through those of one architecture; the Pareto front in the caption."""
    from microtome.views import Scatter

    rows = [row for row in found.rows if getattr(row.evaluation, figure) is not None]
    outputs, widths = len({row.outputs for row in rows}) > 1, len({row.d_sae for row in rows}) > 1
    front = [row.name for row in rows if (row.on_front if figure == "fvu" else row.on_ce_front)]
    return Scatter(
        [row.evaluation.l0 for row in rows],
        [getattr(row.evaluation, figure) for row in rows],
        labels=[row.name for row in rows],
        named=range(len(rows)) if len(rows) <= _NAMED else (),
        joined=True,
        groups=[_group(row, outputs=outputs, widths=widths) for row in rows],
        x_label="L0 (latents per token)",
        y_label={"fvu": "FVU", "ce_recovered": "CE recovered, against zeros"}[figure],
        title=f"Sparsity and {'FVU' if figure == 'fvu' else 'CE recovered'}",
        caption=f"On the Pareto front: {', '.join(front)}.",
    )


def _group(row: "Compared", *, outputs: bool, widths: bool) -> str:
    """What is drawn as one line: an architecture, of one width and at one place where there are several."""
    at = row.outputs[0] if len(row.outputs) == 1 else f"{row.outputs[0]} … {row.outputs[-1]}"
    return ", ".join([row.architecture, *([f"{row.d_sae:,} latents"] if widths else []), *([at] if outputs else [])])


def _draw(found: "Comparison", folder: Path) -> list[str]:
    """Both figures in every form; without matplotlib only those that need none."""
    written = []
    measured = all(row.evaluation.ce_recovered is not None for row in found.rows)
    for figure in ("fvu", "ce_recovered") if measured else ("fvu",):
        drawn = trade_off(found, figure)
        for suffix in (".html", ".json", ".svg", ".png"):
            try:
                written.append(str(drawn.save(folder / f"l0_{figure}{suffix}")))
            except MissingDependencyError as error:
                written.append(f"no {suffix}: {error}")
    return written


def show(result: dict[str, Any]) -> str:
    """The table, but for columns that no dictionary has; then what was written."""
    columns = [name for name in result["table"][0] if any(row[name] is not None for row in result["table"])]
    cells = [[_cell(row[column]) for column in columns] for row in result["table"]]
    heads = [column.replace("_", " ") for column in columns]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(columns))]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in [heads, *cells]]
    for pair in result["similarities"]:
        matched = "" if pair["matched"] is None else f", one to one {pair['matched']:.3f}"
        rows.append(
            f"{pair['first']} and {pair['second']}: MMCS {pair['forward']:.3f} there, {pair['backward']:.3f} back{matched}"
        )
    return "\n".join([*rows, *result["notes"], *result.get("figures", [])])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
