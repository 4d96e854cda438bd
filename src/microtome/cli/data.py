"""What the commands that read text share: options that name it, and the token dataset made of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from microtome.cli.options import CommandOptions
from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from microtome.model import HookedModel
    from microtome.text import TokenDataset


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CommandOptions):
    """Which model, and in which dtype it computes."""

    model: str = "smollm2-135m"
    """Built-in name, Hugging Face id, local folder or GGUF file."""
    dtype: str = "auto"
    """The dtype the model computes in: fp32, bf16, fp16; auto is bf16 where the hardware multiplies it, else fp32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def load_model(self) -> "HookedModel":
        """Open the model as these options say."""
        from microtome.common.device import fast_dtype, parse_device
        from microtome.model import load_model

        dtype = fast_dtype(parse_device(self.device)) if self.dtype == "auto" else self.dtype
        return load_model(self.model, dtype=dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(CommandOptions):
    """Which text, cut how. Either a corpus, which is tokenized first, or a token dataset that is there."""

    corpus: str | None = None
    """python-stdlib, demo, files, folders, globs, hf:NAME; several with commas between."""
    tokens: Path | None = None
    """The folder of the token dataset: read if it is there, else made from the corpus."""
    context: int = 128
    """Tokens in a sequence, its BOS counted."""
    max_tokens: int | None = None
    """Stop tokenizing here."""
    part: str = "0:1"
    """Use only this part of the sequences, as fractions: 0:0.9 to train, 0.9:1 to evaluate."""

    def load_dataset(
        self, tokenizer: "PreTrainedTokenizerBase | None", beside: Path, max_context: int | None = None
    ) -> "TokenDataset":
        """The token dataset that the options name; one made here goes to `tokens`, or to `<beside>-tokens`."""
        from microtome.text import TokenDataset, TokenizeConfig, open_corpus, tokenize_corpus

        folder = self.tokens or beside.with_name(f"{beside.name}-tokens")
        if folder.is_dir():
            dataset = TokenDataset.open(folder)
            _same_corpus(dataset, self.corpus, self.context)
        elif self.corpus is None:
            raise ConfigError(
                "There is no text to work on", fix="Say --corpus NAME, or --tokens FOLDER of a token dataset"
            )
        else:
            if tokenizer is None:
                raise ConfigError("The model came without a tokenizer", fix="Say --tokens FOLDER of a token dataset")
            dataset = tokenize_corpus(
                open_corpus(self.corpus),
                tokenizer,
                folder,
                config=TokenizeConfig(context=self.context, max_tokens=self.max_tokens),
                max_context=max_context,
            )
        return part_of(dataset, self.part)


@dataclass(frozen=True, kw_only=True)
class TextOptions(CorpusOptions, ModelOptions):
    """A model, and the text that it reads."""

    def load_tokens(self, model: "HookedModel", beside: Path) -> "TokenDataset":
        """The token dataset that the options name, for this model."""
        return self.load_dataset(model.tokenizer, beside, model.config.n_ctx)


def part_of(dataset: "TokenDataset", part: str) -> "TokenDataset":
    """The sequences between two fractions, `"0.9:1"`. Raises ConfigError for text of another form."""
    try:
        low, high = (float(end) for end in part.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise ConfigError("--part takes two fractions with a colon between", got=part, expected="0:0.9, say")
    return dataset.slice(round(low * dataset.n_sequences), max(round(high * dataset.n_sequences), 1))


def _same_corpus(dataset: "TokenDataset", corpus: str | None, context: int) -> None:
    there = dataset.config["corpus"]
    if corpus is not None and there != corpus:
        raise ConfigError(
            f"The token dataset {dataset.path} is of another corpus",
            got=there,
            expected=corpus,
            fix="Name another folder with --tokens, or leave --corpus out",
        )
    if corpus is not None and dataset.context != context:
        raise ConfigError(
            f"The token dataset {dataset.path} has another context",
            got=dataset.context,
            expected=context,
            fix="Name another folder with --tokens, or say the same --context",
        )
