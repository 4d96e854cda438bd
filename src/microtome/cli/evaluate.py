"""`microtome evaluate`: measure a dictionary on text that it was not trained on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from microtome.cli.data import TextOptions
from microtome.cli.options import lines

METRICS = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Measure a dictionary: L0, FVU, CE and KL with it spliced in, dead latents, density."""

    dictionary: Annotated[Path, tyro.conf.Positional]
    """The folder of the dictionary."""
    n_tokens: int = 131_072
    """Tokens for reconstruction figures."""
    function_tokens: int = 16_384
    """Tokens of these for CE and KL (three full forward passes each)."""
    out: Path | None = None
    """Where to write the figures as JSON (default: metrics.json in the dictionary's folder)."""


def run(options: Options) -> dict[str, Any]:
    """Evaluate, write the figures, and return them."""
    from microtome.common.artifacts import write_json
    from microtome.dictionary import EvaluateConfig, evaluate, load_dictionary

    config = EvaluateConfig(n_tokens=options.n_tokens, function_tokens=options.function_tokens)
    sae = load_dictionary(options.dictionary)
    model = options.load_model()
    dataset = options.load_tokens(model, options.dictionary)
    figures = asdict(evaluate(model, sae, dataset, config))
    out = options.out or options.dictionary / METRICS
    write_json(
        out, {**figures, "dataset": dataset.config["corpus"], "part": options.part, "model_dtype": str(model.dtype)}
    )
    return {"out": str(out), **figures}


def show(result: dict[str, Any]) -> str:
    """The figures, less the histogram."""
    return lines({key: value for key, value in result.items() if not key.startswith("density_")})
