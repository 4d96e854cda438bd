"""A one-layer transformer and a sparse dictionary of its MLP's activations, both trained here; in what order, and where kept.

1. A byte-pair tokenizer is learned from the corpus, and the corpus is packed; its last part is held out.
2. One layer of attention and a ReLU MLP is trained on the rest (`train_lm`).
3. The MLP's activations after the ReLU are streamed from the model (nothing on the disk) into the training of a ReLU dictionary
   with unit decoder rows, an L1 penalty and resampled dead latents: Bricken et al. 2023, "Sparse autoencoder training setup".

Model and dictionaries are kept in folders named after their settings, so the same settings find them again and a training that was
stopped goes on.
"""

from dataclasses import dataclass
from pathlib import Path

from microtome.activations import ModelSource
from microtome.common.artifacts import fingerprint
from microtome.common.config import require, to_dict
from microtome.common.errors import ConfigError, InputError
from microtome.common.progress import Progress
from microtome.dictionary import Dictionary, ReLUConfig, TrainConfig, load_dictionary, train
from microtome.dictionary.fit import check_fit
from microtome.model import HookedModel, load_model
from microtome.model.lm_training import TrainLMConfig, train_lm
from microtome.model.reference import ReferenceConfig
from microtome.text import TokenDataset, TokenizeConfig, open_corpus, tokenize_corpus, train_tokenizer
from microtome.text.bos import Tokenizer

_HELD_OUT = 0.05


@dataclass(frozen=True, kw_only=True)
class MonosemanticityConfig:
    """The text, the model, its training, the dictionary's, and what is measured.

    `corpus` is what `open_corpus` takes. The model that is trained here has one layer; it sees `lm_tokens` tokens in batches of
    `lm_batch` sequences of `context`. The dictionary of `d_sae` latents sees `sae_tokens` activations in batches of `sae_batch`;
    `coefficient` is the weight λ of the L1 penalty for inputs of mean norm √d. Dead latents, silent for `dead_after` activations,
    get new weights every `resample_every` steps, up to the share `resample_until` of the run. With `dictionary_folder`, a
    dictionary that is there is looked at and none is trained: give its model too, and text that it has not seen.

    Losses are measured on `loss_tokens` held-out tokens, everything else on `table_tokens` of them. `compared` features and as
    many neurons go into the blind comparison, `shown` features into `features.md`. `recovered` and `specific` are what the claims
    on the loss and on features against neurons ask for. `runs` is the folder in which what was trained
    is kept (None: a temporary one); with `sheets`, the comparison and `features.md` are written to that folder.
    """

    corpus: str = "python-stdlib"
    max_tokens: int | None = None
    dictionary_folder: str | None = None
    d_vocab: int = 4096
    context: int = 128
    d_model: int = 128
    n_heads: int = 8
    d_mlp: int = 512
    lm_tokens: int = 3_300_000
    lm_batch: int = 16
    lm_lr: float = 5e-3
    d_sae: int = 2048
    coefficient: float = 3.0
    sae_tokens: int = 2_000_000
    sae_batch: int = 512
    sae_lr: float = 2e-3
    resample_every: int = 500
    resample_until: float = 0.6
    dead_after: int = 200_000
    loss_tokens: int = 32_768
    table_tokens: int = 131_072
    compared: int = 40
    recovered: float = 0.74
    specific: float = 0.6
    shown: int = 24
    device: str = "auto"
    runs: str | None = None
    sheets: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.d_model % self.n_heads == 0, "n_heads must divide d_model", got=self.n_heads)
        require(self.lm_tokens >= self.lm_batch * self.context, "lm_tokens must hold a batch", got=self.lm_tokens)
        positive = min(self.loss_tokens, self.table_tokens, self.compared, self.shown, self.d_mlp)
        require(positive > 0, "loss_tokens, table_tokens, compared, shown and d_mlp must be positive")
        _ = self.dictionary, self.dictionary_training, self.lm_training  # check their own settings

    @property
    def model(self) -> ReferenceConfig:
        return ReferenceConfig(
            d_vocab=self.d_vocab,
            n_ctx=self.context,
            n_layers=1,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            activation="relu",
        )

    @property
    def lm_training(self) -> TrainLMConfig:
        n_steps = self.lm_tokens // (self.lm_batch * self.context)
        return TrainLMConfig(
            n_steps=n_steps,
            batch_size=self.lm_batch,
            lr=self.lm_lr,
            warmup_steps=min(100, n_steps // 10),
            checkpoints=(n_steps,),
            valid_fraction=_HELD_OUT,
            valid_every=max(n_steps // 4, 1),
            seed=self.seed,
            device=self.device,
        )

    @property
    def dictionary(self) -> ReLUConfig:
        return ReLUConfig(
            d_sae=self.d_sae,
            coefficient=self.coefficient,
            norms="unit",
            b_dec_start="geometric_median",
            revival="resample",
            resample_every=self.resample_every,
            resample_until=self.resample_until,
            dead_after=self.dead_after,
            outlier_cap=None,
        )

    @property
    def dictionary_training(self) -> TrainConfig:
        return TrainConfig(
            n_tokens=self.sae_tokens,
            batch_size=self.sae_batch,
            lr=self.sae_lr,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model, the point of its MLP's activations, a dictionary of them, the text that they
    were trained on, and text that neither has seen."""

    model: HookedModel
    hook_name: str
    dictionary: Dictionary
    data: TokenDataset
    held_out: TokenDataset


def trained(
    config: MonosemanticityConfig, folder: Path, progress: Progress, model: HookedModel | None = None
) -> Subject:
    """The model and its dictionary, from `folder` where they were trained there with these settings. Raises ConfigError for a
    given dictionary that does not belong to the model's last MLP.

    A `model` that is given is not trained; its last layer's MLP is looked at, on the corpus in its own tokens.
    """
    home = folder / _home(config, model)
    home.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = _language_model(config, home)
    progress.advance(1, "language model")
    data, held_out = _dataset(config, home, model).split(1 - _HELD_OUT)
    hook_name = f"blocks.{model.config.n_layers - 1}.mlp.hook_post"
    if config.dictionary_folder is not None:
        given = _checked(load_dictionary(config.dictionary_folder), model, hook_name)
        progress.advance(1, "dictionary")
        return Subject(model, hook_name, given, data, held_out)
    settings = {"dictionary": to_dict(config.dictionary), "training": to_dict(config.dictionary_training)}
    out = home / f"dictionary-{fingerprint(settings)}"
    if not out.is_dir():
        train(config.dictionary, ModelSource(model, data, hook_name), out=out, config=config.dictionary_training)
    progress.advance(1, "dictionary")
    return Subject(model, hook_name, load_dictionary(out).to(model.device), data, held_out)


def _checked(dictionary: Dictionary, model: HookedModel, hook_name: str) -> Dictionary:
    check_fit(model, dictionary)
    if dictionary.hook_name != hook_name:
        raise ConfigError("The dictionary is of another hook point", got=dictionary.hook_name, expected=hook_name)
    return dictionary.to(model.device)


def _home(config: MonosemanticityConfig, model: HookedModel | None) -> str:
    """The name of the folder of a model, its tokens and its dictionaries."""
    text = {"corpus": config.corpus, "max_tokens": config.max_tokens, "context": config.context}
    if model is not None:
        return fingerprint({**text, "model": model.name, "revision": model.revision})
    return fingerprint({**text, "model": to_dict(config.model), "training": to_dict(config.lm_training)})


def _language_model(config: MonosemanticityConfig, home: Path) -> HookedModel:
    """The model of this folder; with its tokens, trained there if it is not."""
    out = home / "model"
    if out.is_dir():
        return load_model(out, device=config.device)
    corpus = open_corpus(config.corpus)
    tokenizer = train_tokenizer(corpus, config.d_vocab)
    dataset = _tokens(config, home, tokenizer)
    return train_lm(config.model, dataset, out=out, train=config.lm_training, tokenizer=tokenizer)


def _dataset(config: MonosemanticityConfig, home: Path, model: HookedModel) -> TokenDataset:
    if model.tokenizer is None:
        raise InputError(f"{model.name} came without a tokenizer", fix="Text cannot be put into it")
    return _tokens(config, home, model.tokenizer)


def _tokens(config: MonosemanticityConfig, home: Path, tokenizer: Tokenizer) -> TokenDataset:
    settings = TokenizeConfig(context=config.context, max_tokens=config.max_tokens)
    if (home / "tokens").is_dir():
        return TokenDataset.open(home / "tokens")
    return tokenize_corpus(open_corpus(config.corpus), tokenizer, home / "tokens", config=settings)
