"""`microtome demo`: the workbench on the shipped dictionary; or all of it made anew, from text to workbench."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.cli import serve
from microtome.cli.evaluate import METRICS
from microtome.cli.options import CommandOptions, lines

if TYPE_CHECKING:
    from microtome.features import FeatureIndex
    from microtome.model import HookedModel

HOOK = "blocks.15.hook_resid_pre"
PROMPT = "The Eiffel Tower is in Paris"


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Open the workbench on features of the built-in model."""

    from_scratch: bool = False
    """Make everything anew: harvest, train, evaluate and index, in about ten minutes on two cores. Resumes."""
    out: Path = Path("runs/demo")
    """Where --from-scratch puts its work."""
    harvest_tokens: int = 800_000
    """Tokens that --from-scratch harvests."""
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

    made: dict[str, Any] = {}
    if options.from_scratch:
        made = from_scratch(options)
        folder = options.out / "index"
    else:
        folder = shipped("demo/index")
    if options.no_serve:
        return {**made, **check(folder)}
    if made:
        print(lines(made), file=sys.stderr)
    return {**made, **serve.run(serve.Options(index=folder, port=options.port, open=options.open))}


def show(result: dict[str, Any]) -> str:
    """What was made, and what fired on the prompt."""
    return lines(result)


def from_scratch(options: Options) -> dict[str, Any]:
    """The whole path on the demo corpus. The last twentieth of it is kept for the evaluation."""
    from microtome.activations import ActivationStore
    from microtome.common.artifacts import write_json
    from microtome.common.device import fast_dtype, parse_device
    from microtome.common.progress import Timer
    from microtome.dictionary import EvaluateConfig, TopKConfig, TrainConfig, evaluate, load_dictionary, train
    from microtome.features import build_index
    from microtome.model import load_model

    with Timer() as timer:
        model = load_model("smollm2-135m", dtype=fast_dtype(parse_device()))
        dataset = _tokens(model, options.out / "tokens")
        border = min(round(0.95 * dataset.n_sequences), max(options.harvest_tokens // dataset.context, 1))
        store = _harvest(model, dataset.slice(0, border), options.out / "activations")
        assert isinstance(store, ActivationStore)
        if not (options.out / "dictionary").exists():
            config = TrainConfig(n_tokens=options.train_tokens, lr=2e-3, warmup_steps=200, decay_fraction=0.5)
            train(
                TopKConfig(d_sae=4608, k=32, dead_after=200_000), store, out=options.out / "dictionary", config=config
            )
        sae = load_dictionary(options.out / "dictionary")
        held_out = dataset.slice(round(0.95 * dataset.n_sequences), dataset.n_sequences)
        figures = asdict(evaluate(model, sae, held_out, EvaluateConfig(n_tokens=32_768, function_tokens=8192)))
        write_json(options.out / "dictionary" / METRICS, figures)
        metrics = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
        build_index(model, sae, dataset.slice(0, border), options.out / "index", store=store, metrics=metrics)
    wanted = ("l0", "fvu", "fvu_without_outliers", "ce_recovered", "dead_fraction")
    return {"out": str(options.out), "seconds": round(timer.seconds), **{key: figures[key] for key in wanted}}


def _tokens(model: "HookedModel", folder: Path) -> Any:
    from microtome.text import TokenDataset, open_corpus, tokenize_corpus

    if folder.is_dir():
        return TokenDataset.open(folder)
    assert model.tokenizer is not None
    return tokenize_corpus(open_corpus("demo"), model.tokenizer, folder)


def _harvest(model: "HookedModel", dataset: Any, folder: Path) -> object:
    from microtome.activations import harvest

    return harvest(model, dataset, HOOK, folder)


def check(folder: Path) -> dict[str, Any]:
    """Open the index as the workbench does, and run one prompt through its model and dictionary."""
    from microtome.features import open_index

    index: FeatureIndex = open_index(folder)
    found = index.top_features(PROMPT, k=3)
    fired = [
        f"{token}: {', '.join(f'{feature} ({value:.1f})' for feature, value in best) or 'nothing'}"
        for token, best in zip(found.tokens, found.features, strict=True)
    ]
    return {"index": str(folder), "latents": index.summary.d_sae, "alive": index.summary.n_alive, "fired": fired}
