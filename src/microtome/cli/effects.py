"""How the commands show effects: the largest places with their intervals, as rows, as text and as a figure."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from microtome.circuits import Effects


def check_figure(path: Path | None, axes: int = 2) -> None:
    """Before anything is run: raises ConfigError for a `--figure` that cannot be written, or of effects on so many axes."""
    from microtome.views.figure import check_path

    if path is None:
        return
    check_path(path)
    if axes not in (1, 2):
        raise ConfigError(
            "Only effects on one or two axes can be drawn", got=f"{axes} axes", fix="Leave out --figure, or use --json"
        )


def top_places(effects: "Effects", k: int) -> list[dict[str, Any]]:
    """The k places with the largest means by their size: labels by axis, mean and 95 % interval."""
    from microtome.circuits import bootstrap

    places = effects.top(k)
    order = effects.mean.flatten().abs().argsort(descending=True, stable=True)[:k]
    low, high = bootstrap(effects.values.reshape(-1, effects.values.shape[-1])[order])
    names = [axis.name for axis in effects.axes]
    return [
        {"place": dict(zip(names, labels, strict=True)), "mean": mean, "low": float(low[i]), "high": float(high[i])}
        for i, (labels, mean) in enumerate(places)
    ]


def draw(effects: "Effects", path: Path) -> Path:
    """The means as a heatmap. Raises ConfigError for effects on more than two axes, or on none."""
    from microtome.views import Heatmap

    check_figure(path, len(effects.axes))
    two = len(effects.axes) == 2
    Heatmap(
        effects.mean if two else effects.mean[:, None],
        rows=list(effects.axes[0].labels),
        columns=list(effects.axes[1].labels) if two else [""],
        row_label=effects.axes[0].name,
        column_label=effects.axes[1].name if two else "",
        value_label=effects.what,
        diverging=True,
        caption=" ".join(effects.notes),
    ).save(path)
    return path


def as_text(result: dict[str, Any], what: str, notes: list[str]) -> str:
    """A command's result: the metric of both prompts, what is shown, the largest places, and where the figure is."""
    n = result["prompts"]
    rows = [
        f"clean {result['clean']:.3f}, corrupt {result['corrupt']:.3f} over {n} prompt{'s' * (n > 1)}",
        what,
        *notes,
    ]
    for row in result["top"]:
        place = "  ".join(f"{name} {label}" for name, label in row["place"].items()) or "all together"
        interval = f"   {row['low']:+.3f} to {row['high']:+.3f}" if n > 1 else ""
        rows.append(f"  {place:<36}{row['mean']:>+9.3f}{interval}")
    return "\n".join([*rows, *([result["figure"]] if "figure" in result else [])])
