"""`microtome train`: dictionaries, from a store of activations or straight from the model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from microtome.cli.bench import sizes
from microtome.cli.data import TextOptions
from microtome.cli.options import lines
from microtome.common.errors import ConfigError

if TYPE_CHECKING:
    from microtome.activations import ActivationStore
    from microtome.activations.source import ActivationSource
    from microtome.dictionary import CrossLayerTranscoder, Dictionary, DictionaryConfig, TrainConfig
    from microtome.model import HookedModel

_TOPK = ("topk", "batchtopk", "matryoshka")


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Train a dictionary, or several on one stream of activations: sparse autoencoders, transcoders, crosscoders.
    Stopped, it goes on from its last checkpoint when run again."""

    out: Path
    """The folder of the dictionary; of several, that of all: 0, 1 … in it."""
    store: Path | None = None
    """A store made by `microtome harvest`. Without it the model is run as training goes (say --corpus or --tokens)."""
    hook: tuple[str, ...] = ()
    """The hook point; not needed for a store that has only one. Several make a crosscoder. Globs stand for what they match in
    the store or the model, in the order of the forward pass: 'blocks.*.hook_resid_pre'."""
    output_hook: tuple[str, ...] = ()
    """Predict this point from --hook: a transcoder. Globs as well."""
    per_layer: bool = False
    """One transcoder for each pair of --hook and --output-hook (without these one autoencoder for each --hook), all on one
    stream."""
    cross_layer: bool = False
    """A cross-layer transcoder: each --hook writes to its own --output-hook and all later ones."""
    architecture: Literal["topk", "batchtopk", "matryoshka", "standard", "p_anneal", "gated", "jumprelu"] = "topk"
    """topk, batchtopk, matryoshka keep k latents; standard (ReLU), p_anneal, gated, jumprelu have a penalty."""
    d_sae: int = 4608
    """How many latents."""
    k: int = 32
    """How many of them fire on each token (topk, batchtopk, matryoshka)."""
    coefficient: float | None = None
    """The weight λ of the penalty (the others)."""
    target_l0: float | None = None
    """Find the λ with which this many latents fire on each token, by short trainings beforehand. With --cross-layer, like
    --d-sae and --k: in each layer."""
    revival: Literal["aux", "resample", "ghost", "none"] = "aux"
    """What is done for dead latents."""
    aux_k: int | None = None
    """Dead latents that the auxiliary loss uses per token (default: half of d_in)."""
    dead_after: int | None = None
    """Tokens without a firing after which a latent counts as dead (default: a tenth of the training's, at most a million)."""
    set: tuple[str, ...] = ()
    """Any other setting of the architecture, as NAME=VALUE: norms=free threshold_rate=3. An unknown name lists them."""
    sweep: tuple[str, ...] = ()
    """Train all combinations of these, as NAME=VALUES: k=16,32,64 seed=0,1,2."""
    configs: Path | None = None
    """A JSON file with the settings of all dictionaries (then the options above are not used)."""
    train_tokens: int = 2_000_000
    """Activations to train on; the data is gone through again as often as need be."""
    batch_size: int = 2048
    """Activations in a step."""
    buffer_size: int = 0
    """Activations in the shuffle buffer (0: as many as there are, up to 262,144)."""
    lr: float | None = None
    """Peak learning rate (default: 1e-3 / sqrt(d_sae / 16384), at most 3e-3)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    decay_fraction: float = 0.3
    """The share of steps at the end over which it falls to zero."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to these."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def train_config(self) -> "TrainConfig":
        """How to train."""
        from microtome.dictionary import TrainConfig

        return TrainConfig(
            n_tokens=self.train_tokens,
            batch_size=self.batch_size,
            buffer_size=self.buffer_size,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            seed=self.seed,
            device=self.device,
            checkpoint_every=self.checkpoint_every,
            log_to=self.log_to,
        )

    def dictionaries(self) -> "list[DictionaryConfig]":
        """What to train. Raises ConfigError for settings that do not go together."""
        from microtome.dictionary.sweeps import combinations, per_layer, read_configs

        if self.configs is not None:
            return read_configs(self.configs)
        if self.cross_layer and (self.per_layer or not self.output_hook):
            got = "--per-layer as well" if self.per_layer else "no --output-hook"
            raise ConfigError(
                "A cross-layer transcoder is one dictionary that predicts other points than it reads",
                got=got,
                expected="--cross-layer with --hook and --output-hook, or --per-layer alone",
            )
        settings: dict[str, Any] = {
            "architecture": self.architecture,
            "d_sae": self.d_sae,
            "revival": self.revival,
            "aux_k": self.aux_k,
            "dead_after": self.dead_after,
            "cross_layer": self.cross_layer,
        }
        axes = _axes(self.sweep)
        if not self.per_layer:
            settings |= {"inputs": list(self.hook) if self.output_hook or len(self.hook) > 1 else []}
            settings |= {"outputs": list(self.output_hook)}
        if self.architecture in _TOPK:
            settings["k"] = self.k
        elif self.coefficient is not None:
            settings["coefficient"] = self.coefficient
        configs = combinations({**settings, **sizes(self.set)}, axes)
        if self.per_layer:
            return [each for config in configs for each in per_layer(config, self.hook, self.output_hook)]
        return configs


def run(options: Options) -> dict[str, Any]:
    """Train, and say where the dictionaries are and how the training ended."""
    from microtome.common.progress import Timer
    from microtome.dictionary import train, train_cross_layer
    from microtome.dictionary.search import search_coefficient
    from microtome.dictionary.trainer import as_source
    from microtome.model.names import is_glob

    config = options.train_config()
    if not any(is_glob(name) for name in (*options.hook, *options.output_hook)):
        options.dictionaries()  # what cannot be trained is said before a model is opened
    opened = _opened(options)
    options = _resolved(options, opened)
    wanted = options.dictionaries()
    hook = options.hook[0] if len(options.hook) == 1 else None
    source = as_source(_source(options, opened, wanted), wanted, hook)
    if options.target_l0 is not None:
        wanted = [search_coefficient(each, source, options.target_l0, config=config) for each in wanted]
    single, what = len(wanted) == 1, wanted[0] if len(wanted) == 1 else wanted
    made: list[Dictionary | CrossLayerTranscoder]
    with Timer() as timer:
        if any(each.cross_layer for each in wanted):
            made = [*train_cross_layer(what, source, out=options.out, config=config, overwrite=options.overwrite)]
        else:
            made = [*train(what, source, out=options.out, config=config, hook_name=hook, overwrite=options.overwrite)]
    rows = [_ended(sae, each) for sae, each in zip(made, wanted, strict=True)]
    shared = {"out": str(options.out), "seconds": round(timer.seconds, 2)}
    return {**rows[0], **shared} if single else {**shared, "dictionaries": rows}


def show(result: dict[str, Any]) -> str:
    """Where the dictionaries are and how their training ended."""
    if "dictionaries" not in result:
        return lines(result)
    return "\n\n".join(lines(each) for each in [*result["dictionaries"], {"out": result["out"]}])


def _ended(sae: "Dictionary | CrossLayerTranscoder", config: "DictionaryConfig") -> dict[str, Any]:
    rows = (sae.path / "training.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])
    return {
        "out": str(sae.path),
        "architecture": config.architecture,
        "hook_name": ", ".join(sae.origin.inputs),
        "predicts": ", ".join(sae.origin.outputs) if sae.is_transcoder else None,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "coefficient": getattr(config, "coefficient", None),
        "steps": last["step"],
        "training_fvu": last["fvu"],
        "training_l0": last["l0"],
        "dead": last["dead"],
        **({"training_fvu_by_layer": last["fvu_by_layer"]} if "fvu_by_layer" in last else {}),
    }


def _opened(options: Options) -> "ActivationStore | HookedModel":
    """Where the activations come from."""
    from microtome.activations import ActivationStore

    if options.store is not None:
        return ActivationStore.open(options.store)
    if not options.hook and options.configs is None:
        raise ConfigError("Which hook point?", fix="Say --hook, blocks.15.hook_resid_pre for example")
    return options.load_model()


def _resolved(options: Options, opened: "ActivationStore | HookedModel") -> Options:
    """The options with hook points in place of globs and aliases. Raises for those that are not there."""
    hook, output_hook = (
        tuple(dict.fromkeys(str(point) for name in names for point in opened.resolve(name)))
        for names in (options.hook, options.output_hook)
    )
    return replace(options, hook=hook, output_hook=output_hook)


def _source(
    options: Options, opened: "ActivationStore | HookedModel", wanted: "list[DictionaryConfig]"
) -> "ActivationStore | ActivationSource":
    from microtome.activations import ActivationStore, ModelSource

    named = list(dict.fromkeys(name for c in wanted for name in (*c.inputs, *c.outputs)))
    if any(not c.inputs for c in wanted):
        named = list(dict.fromkeys([*options.hook, *named]))
    if isinstance(opened, ActivationStore):
        if not named and len(opened.hook_names) > 1:
            raise ConfigError(
                f"{options.store} has several hook points", expected="--hook, one of them", got=opened.hook_names
            )
        return opened
    return ModelSource(opened, options.load_tokens(opened, options.out), named)


def _axes(words: tuple[str, ...]) -> dict[str, list[Any]]:
    """`["k=16,32", "seed=0,1"]` as lists of values."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values):
            raise ConfigError("--sweep takes NAME=VALUES", got=word, expected="k=16,32,64, say")
        axes[name] = [sizes([f"{name}={value}"])[name] for value in values.split(",")]
    return axes
