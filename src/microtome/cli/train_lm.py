"""`microtome train-lm`: a small transformer, from nothing, on a corpus."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from microtome.cli.data import CorpusOptions
from microtome.cli.options import lines
from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from microtome.model.reference import ReferenceConfig


@dataclass(frozen=True, kw_only=True)
class Options(CorpusOptions):
    """Train a small language model: by default two layers of attention alone. Stopped, it goes on when run again."""

    out: Path
    """The folder of the model; every command that takes a model opens it, and each of its checkpoints."""
    tokenizer: str = "smollm2-135m"
    """The model whose tokenizer is used: built-in name, Hugging Face id or local folder."""
    tokenizer_size: int | None = None
    """Learn a tokenizer of so many tokens from the corpus instead. A few thousand suit a small model: 4096, say."""
    n_layers: int = 2
    """How many blocks."""
    d_model: int = 256
    """The width of the residual stream."""
    n_heads: int = 8
    """Attention heads in a block, each d_model / n_heads wide (0: none)."""
    d_mlp: int = 0
    """Neurons in a block (0: attention only)."""
    positions: Literal["rotary", "learned", "shortformer", "none"] = "shortformer"
    """How the model knows where a token stands."""
    normalization: Literal["layer", "rms", "none"] = "layer"
    """The norms in front of attention, MLP and unembedding."""
    activation: Literal["relu", "gelu", "gelu_new", "solu", "swiglu"] = "gelu"
    """What neurons do."""
    tied: bool = False
    """Unembed with the embedding's weights."""
    steps: int = 2000
    """How many updates; the data is gone through again as often as need be."""
    batch_size: int = 32
    """Sequences in a step."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises; then it falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""
    checkpoint_every: int = 500
    """Steps between checkpoints, beside those after 0, 1, 2, 4, 8 … steps."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrices are multiplied in; auto is bf16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Tokenize if need be, train, and say how it ended."""
    from microtome.common.progress import Timer
    from microtome.model.lm_training import LOG, TrainLMConfig, train_lm

    train = TrainLMConfig(
        n_steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        checkpoint_every=options.checkpoint_every,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
    )
    _architecture(options, d_vocab=1, n_ctx=1)  # wrong sizes are told before the corpus is read
    tokenizer = _tokenizer(options)
    dataset = options.load_dataset(tokenizer, options.out)
    config = _architecture(options, dataset.vocabulary_size, dataset.context)
    with Timer() as timer:
        model = train_lm(
            config, dataset, out=options.out, train=train, tokenizer=tokenizer, overwrite=options.overwrite
        )
    rows = [json.loads(line) for line in (options.out / LOG).read_text(encoding="utf-8").splitlines()]
    return {
        "out": str(options.out),
        "parameters": model.hf.num_parameters(),
        "vocabulary": config.d_vocab,
        "steps": options.steps,
        "tokens": options.steps * options.batch_size * dataset.context,
        "training_loss": next(row["loss"] for row in reversed(rows) if "loss" in row),
        "valid_loss": next(row["valid_loss"] for row in reversed(rows) if "valid_loss" in row),
        "checkpoints": len(train.checkpoint_steps),
        "seconds": round(timer.seconds, 2),
    }


def _architecture(options: Options, d_vocab: int, n_ctx: int) -> "ReferenceConfig":
    from microtome.model.reference import ReferenceConfig

    if options.n_heads and options.d_model % options.n_heads:
        raise ConfigError("n_heads must divide d_model", got=f"{options.n_heads} heads for d_model {options.d_model}")
    return ReferenceConfig(
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        n_layers=options.n_layers,
        d_model=options.d_model,
        n_heads=options.n_heads,
        d_head=options.d_model // options.n_heads if options.n_heads else 0,
        d_mlp=options.d_mlp,
        normalization=options.normalization,
        positions=options.positions,
        activation=options.activation,
        tied=options.tied,
    )


def _tokenizer(options: Options) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name. One learned here is kept in `<out>-tokenizer` for when the command goes on."""
    from transformers import AutoTokenizer

    from microtome.common.artifacts import draft
    from microtome.model.load import load_tokenizer
    from microtome.text import open_corpus, train_tokenizer

    if options.tokenizer_size is None:
        return load_tokenizer(options.tokenizer)
    folder = options.out.with_name(f"{options.out.name}-tokenizer")
    if not folder.is_dir():
        if options.corpus is None:
            raise ConfigError("There is no text to learn a tokenizer from", fix="Say --corpus NAME")
        learned = train_tokenizer(open_corpus(options.corpus), options.tokenizer_size)
        made = draft(folder, "tokenizer", {"corpus": options.corpus, "size": options.tokenizer_size})
        learned.save_pretrained(made.folder)
        made.publish()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) != options.tokenizer_size:
        raise ConfigError(
            f"The tokenizer in {folder} has another size", got=len(tokenizer), expected=options.tokenizer_size
        )
    return tokenizer


def show(result: dict[str, Any]) -> str:
    """Where the model is and how its training ended."""
    return lines(result)
