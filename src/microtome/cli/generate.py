"""`microtome generate`: continue prompts, or sample a whole corpus by a recipe."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from microtome.cli.options import CommandOptions, lines
from microtome.common.artifacts import read_json
from microtome.common.config import from_dict
from microtome.common.device import DTypeName
from microtome.common.errors import ConfigError, InputError

if TYPE_CHECKING:
    from microtome.model.generation_config import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Continue prompts with a model, or sample a corpus of documents by a recipe. Greedy, unless a temperature, --top-k,
    --top-p or --min-p asks for a draw. A single prompt's text appears as it is made."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The texts to continue; several run as one batch."""
    prompts: Path | None = None
    """A file with one prompt a line, instead."""
    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: DTypeName = "fp32"
    """The dtype the model computes in."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    edits: Path | None = None
    """A file of edits (microtome.edits.save) that are active while the text is made."""
    max_new_tokens: int = 40
    """How many tokens to add at most."""
    temperature: float | None = None
    """Divides the logits before the draw; 0 is greedy."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this much probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it was generated."""
    presence_penalty: float = 0.0
    """Taken from a token's logit if it was generated at all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that were there before."""
    no_repeat_ngram: int = 0
    """No run of so many tokens comes twice; 0 is no limit."""
    n_beams: int = 1
    """Beam search over this many beginnings."""
    length_penalty: float = 1.0
    """Beams are compared by log-probability / length to this power."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STR ...")] = ()
    """The text ends before the first of these strings (which may hold commas)."""
    seed: int = 0
    """The same seed gives the same text."""
    recipe: Path | None = None
    """Instead of prompts: a JSON recipe of a corpus (its sampling settings are used)."""
    out: Path | None = None
    """The folder for the corpus."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Sample the corpus of the recipe, or continue the prompts."""
    if bool(options.prompt) + (options.prompts is not None) + (options.recipe is not None) != 1:
        raise ConfigError("Say either a prompt, --prompts FILE or --recipe FILE")
    for file in (options.prompts, options.recipe, options.edits):
        if file is not None and not file.is_file():
            raise ConfigError(f"There is no file {file}")
    return _corpus(options, options.recipe) if options.recipe is not None else _continuations(options)


def _corpus(options: Options, file: Path) -> dict[str, Any]:
    if options.out is None:
        raise ConfigError("A corpus needs a folder", fix="Say --out FOLDER")
    if options.edits is not None:
        raise ConfigError("Edits go with prompts, a corpus is sampled from the model as it is")
    from microtome.model import load_model
    from microtome.model.sampling import CorpusRecipe, sample_corpus

    recipe = from_dict(CorpusRecipe, read_json(file))
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    folder = sample_corpus(model, recipe, options.out, overwrite=options.overwrite)
    made = read_json(folder / "provenance.json")
    return {"out": str(folder), "documents": made["n_documents"], "tokens": made["n_tokens"]}


def _continuations(options: Options) -> dict[str, Any]:
    config = _config(options)
    texts = list(options.prompt) if options.prompts is None else _lines(options.prompts)
    from microtome.model import edits, load_model

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    streams = len(texts) == 1 and config.n_beams == 1 and not options.json
    if streams:
        _write(texts[0])
    with nullcontext() if options.edits is None else model.edited(edits.load(options.edits)):
        made = model.generate_details(texts, config, stream=_write if streams else None)
    rows = [
        {
            "prompt": prompt,
            "text": row.text,
            "tokens": row.tokens.tolist(),
            "logprobs": row.logprobs.tolist(),
            "finish": row.finish,
        }
        for prompt, row in zip(texts, made, strict=True)
    ]
    return {"texts": rows} | ({"streamed": True} if streams else {})


def _config(options: Options) -> "GenerateConfig":
    from microtome.model.generation_config import GenerateConfig

    shared = {field.name for field in fields(GenerateConfig)} & {field.name for field in fields(Options)}
    return GenerateConfig(**{name: getattr(options, name) for name in shared})


def _lines(file: Path) -> list[str]:
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{file} holds no prompt", expected="one a line")
    return texts


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def show(result: dict[str, Any]) -> str:
    """The texts behind their prompts (nothing more, if the text was shown as it was made), or where the corpus is."""
    if "texts" not in result:
        return lines(result)
    return "" if "streamed" in result else "\n\n".join(row["prompt"] + row["text"] for row in result["texts"])
