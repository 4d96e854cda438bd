"""`microtome demo`: the workbench on the shipped dictionary; or all of it made anew, by the other commands, one after another."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.cli import evaluate, harvest, index, serve, train
from microtome.cli.options import CommandOptions, lines

HOOK = "blocks.15.hook_resid_pre"
PROMPT = "The Eiffel Tower is in Paris"
_FIGURES = ("l0", "fvu", "fvu_without_outliers", "ce_recovered", "dead_fraction")


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Open the workbench on features of the built-in model."""

    from_scratch: bool = False
    """Make everything anew: harvest, train, evaluate and index, in less than ten minutes on two cores. Resumes."""
    out: Path = Path("runs/demo")
    """Where --from-scratch puts its work."""
    part: str = "0:0.8"
    """The part of the demo corpus that --from-scratch harvests and indexes; its last twentieth is kept to evaluate."""
    train_tokens: int = 6_000_000
    """Activations that --from-scratch trains on."""
    no_serve: bool = False
    """Do all the work, run one prompt as a check, print what came of it, and exit."""
    port: int = 8700
    """The workbench's port; 0 takes any that is free."""
    open: bool = False
    """Open the page in the browser."""


def run(options: Options) -> dict[str, Any]:
    """Make or find the index, then serve it or try one prompt on it."""
    from microtome.common.assets import shipped

    made = from_scratch(options) if options.from_scratch else {}
    folder = options.out / "index" if made else shipped("demo/index")
    if options.no_serve:
        return {**made, **check(folder)}
    if made:
        print(lines(made), file=sys.stderr)
    return {**made, **serve.run(serve.Options(index=folder, port=options.port, open=options.open))}


def show(result: dict[str, Any]) -> str:
    """What was made, and what fired on the prompt."""
    return lines(result)


def from_scratch(options: Options) -> dict[str, Any]:
    """The commands harvest, train, evaluate and index on the demo corpus, each finding what an earlier run left done."""
    from microtome.common.progress import Timer

    out = options.out
    text: dict[str, Any] = {"corpus": "demo", "tokens": out / "tokens"}
    with Timer() as timer:
        harvest.run(harvest.Options(**text, part=options.part, hooks=(HOOK,), out=out / "activations"))
        if not (out / "dictionary").exists():
            train.run(
                train.Options(
                    store=out / "activations",
                    out=out / "dictionary",
                    train_tokens=options.train_tokens,
                    lr=2e-3,
                    warmup_steps=200,
                    decay_fraction=0.5,
                )
            )
        figures = evaluate.run(
            evaluate.Options(
                **text, part="0.95:1", dictionary=str(out / "dictionary"), n_tokens=32_768, function_tokens=8192
            )
        )
        index.run(
            index.Options(
                **text,
                part=options.part,
                dictionary=out / "dictionary",
                store=out / "activations",
                out=out / "index",
            )
        )
    return {"out": str(out), "seconds": round(timer.seconds), **{key: figures[key] for key in _FIGURES}}


def check(folder: Path) -> dict[str, Any]:
    """Open the index as the workbench does, and run one prompt through its model and dictionary."""
    from microtome.features import open_index

    with open_index(folder) as opened:
        summary, found = opened.summary, opened.top_features(PROMPT, k=3)
    fired = [
        f"{token}: {', '.join(f'{feature} ({value:.1f})' for feature, value in best) or 'nothing'}"
        for token, best in zip(found.tokens, found.features, strict=True)
    ]
    return {"index": str(folder), "latents": summary.d_sae, "alive": summary.n_alive, "fired": fired}
