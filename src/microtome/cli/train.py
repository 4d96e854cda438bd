"""`microtome train`: a dictionary, from a store of activations or straight from the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from microtome.cli.data import TextOptions
from microtome.cli.options import lines
from microtome.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Train a TopK sparse autoencoder. Stopped, it goes on from its last checkpoint when run again."""

    out: Path
    """The folder of the dictionary."""
    store: Path | None = None
    """A store made by `microtome harvest`. Without it the model is run as training goes (say --corpus or --tokens)."""
    hook: str | None = None
    """The hook point; not needed for a store that has only one."""
    d_sae: int = 4608
    """How many latents."""
    k: int = 32
    """How many of them fire on each token."""
    aux_k: int | None = None
    """Dead latents that the auxiliary loss uses per token (default: half of d_in)."""
    dead_after: int = 200_000
    """Tokens without a firing after which a latent counts as dead."""
    train_tokens: int = 2_000_000
    """Activations to train on; the data is gone through again as often as need be."""
    batch_size: int = 2048
    """Activations in a step."""
    buffer_size: int = 0
    """Activations in the shuffle buffer (0: as many as there are, up to 262,144)."""
    lr: float | None = None
    """Peak learning rate (default: 2e-4 / sqrt(d_sae / 16384))."""
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


def run(options: Options) -> dict[str, Any]:
    """Train, and say where the dictionary is and how the training ended."""
    import json

    from microtome.activations import ActivationStore, ModelSource
    from microtome.common.progress import Timer
    from microtome.dictionary import TopKConfig, TrainConfig, train

    architecture = TopKConfig(d_sae=options.d_sae, k=options.k, aux_k=options.aux_k, dead_after=options.dead_after)
    config = TrainConfig(
        n_tokens=options.train_tokens,
        batch_size=options.batch_size,
        buffer_size=options.buffer_size,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        decay_fraction=options.decay_fraction,
        seed=options.seed,
        device=options.device,
        checkpoint_every=options.checkpoint_every,
        log_to=options.log_to,
    )
    source: ActivationStore | ModelSource
    if options.store is not None:
        source = ActivationStore.open(options.store)
        if options.hook is None and len(source.hook_names) > 1:
            raise ConfigError(
                f"{options.store} has several hook points", expected="--hook, one of them", got=source.hook_names
            )
    else:
        if options.hook is None:
            raise ConfigError("Which hook point?", fix="Say --hook, blocks.15.hook_resid_pre for example")
        model = options.load_model()
        source = ModelSource(model, options.load_tokens(model, options.out), options.hook)
    with Timer() as timer:
        [sae] = train(
            architecture, source, out=options.out, config=config, hook_name=options.hook, overwrite=options.overwrite
        )
    rows = (options.out / "training.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])
    return {
        "out": str(sae.path),
        "hook_name": sae.hook_name,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "steps": last["step"],
        "training_fvu": last["fvu"],
        "dead": last["dead"],
        "seconds": round(timer.seconds, 2),
    }


def show(result: dict[str, Any]) -> str:
    """Where the dictionary is and how its training ended."""
    return lines(result)
