"""`microtome generate`: continue a prompt, or sample a whole corpus by a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.cli.options import CommandOptions, lines
from microtome.common.artifacts import read_json
from microtome.common.config import from_dict, require
from microtome.common.device import DTypeName
from microtome.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Continue a prompt with a model, or sample a corpus of documents by a recipe."""

    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    prompt: str | None = None
    """The text to continue."""
    max_new_tokens: int = 40
    """How many tokens to add to the prompt."""
    temperature: float = 1.0
    """Divides the logits before the draw."""
    top_k: int = 200
    """Draw from this many of the likeliest tokens; 1 is greedy."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this much probability."""
    seed: int = 0
    """The same seed gives the same text."""
    recipe: Path | None = None
    """Instead of a prompt: a JSON recipe of a corpus (its sampling settings are used)."""
    out: Path | None = None
    """The folder for the corpus."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Sample the corpus of the recipe, or continue the prompt."""
    check(options)
    if options.recipe is not None and options.out is not None:
        return _corpus(options, options.recipe, options.out)
    assert options.prompt is not None
    return _continuation(options, options.prompt)


def check(options: Options) -> None:
    """Raise ConfigError for options that do not go together or are out of range, before torch is loaded (seconds)."""
    if (options.prompt is None) == (options.recipe is None):
        raise ConfigError("Say either --prompt TEXT or --recipe FILE")
    if options.recipe is not None:
        if options.out is None:
            raise ConfigError("A corpus needs a folder", fix="Say --out FOLDER")
        if not options.recipe.is_file():
            raise ConfigError(f"There is no recipe {options.recipe}", expected="a JSON file")
    require(options.max_new_tokens > 0, "--max-new-tokens must be positive", got=options.max_new_tokens)
    require(options.temperature > 0, "--temperature must be positive", got=options.temperature)
    require(options.top_k > 0, "--top-k must be positive", got=options.top_k)
    require(0 < options.top_p <= 1, "--top-p must be in (0, 1]", got=options.top_p)


def _corpus(options: Options, file: Path, out: Path) -> dict[str, Any]:
    from microtome.model import load_model
    from microtome.model.sampling import CorpusRecipe, sample_corpus

    recipe = from_dict(CorpusRecipe, read_json(file))
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    folder = sample_corpus(model, recipe, out, overwrite=options.overwrite)
    made = read_json(folder / "provenance.json")
    return {"out": str(folder), "documents": made["n_documents"], "tokens": made["n_tokens"]}


def _continuation(options: Options, prompt: str) -> dict[str, Any]:
    from microtome.model import load_model
    from microtome.model.sampling import sample_continuations

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    [ids] = sample_continuations(
        model,
        model.to_tokens(prompt).tolist(),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    assert model.tokenizer is not None
    return {"text": str(model.tokenizer.decode(ids, skip_special_tokens=True))}


def show(result: dict[str, Any]) -> str:
    """The text itself, or where the corpus is."""
    return str(result["text"]) if "text" in result else lines(result)
