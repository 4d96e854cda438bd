"""`microtome index`: a feature index of a dictionary over a corpus, for the workbench and for queries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.data import TextOptions
from microtome.cli.options import lines


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Go once over a corpus and keep, for every latent, its statistics and examples."""

    dictionary: Annotated[Path, tyro.conf.Positional]
    """The folder of the dictionary, or of one for each of several points (as --per-layer makes them)."""
    out: Path
    """The folder of the index."""
    store: Path | None = None
    """A store of the same tokens and model: its activations are read, and the model is not run."""
    top: int = 20
    """Examples with the highest peaks, per latent."""
    bands: int = 5
    """Strata of weaker peaks, each a factor of two."""
    per_band: int = 5
    """Examples drawn from each stratum."""
    window: int = 32
    """Tokens in an example."""
    seed: int = 0
    """Of the draws."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Build the index; the dictionary's metrics, if it was evaluated, go into it."""
    from microtome.activations import ActivationStore
    from microtome.cli.evaluate import METRICS
    from microtome.common.artifacts import read_json
    from microtome.common.progress import Timer
    from microtome.dictionary import load_dictionary_or_set
    from microtome.features import IndexConfig, build_index

    config = IndexConfig(
        top=options.top, bands=options.bands, per_band=options.per_band, window=options.window, seed=options.seed
    )
    sae = load_dictionary_or_set(options.dictionary)
    model = options.load_model()
    dataset = options.load_tokens(model, options.out)
    figures = read_json(options.dictionary / METRICS) if (options.dictionary / METRICS).exists() else {}
    metrics = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
    store = ActivationStore.open(options.store) if options.store else None
    with (
        Timer() as timer,
        build_index(
            model, sae, dataset, options.out, config=config, store=store, metrics=metrics, overwrite=options.overwrite
        ) as index,
    ):
        summary = index.summary
    return {
        "out": str(options.out),
        "latents": summary.d_sae,
        "alive": summary.n_alive,
        "tokens": summary.n_tokens,
        "seconds": round(timer.seconds, 2),
    }


def show(result: dict[str, Any]) -> str:
    """Where the index is, and how to look at it."""
    return lines(result) + f"\n\nLook at it with  microtome serve {result['out']}"
