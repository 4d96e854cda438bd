"""The sides of `microtome bench train`, each run by `serve` in a process of its own.

A side is made with the settings and the rows to train on; `step()` is one training step on the next batch of its
`ActivationStream`, and `reconstruct(x)` is what the dictionary makes of activations x in the end.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.common import ModelAndText, resident_bytes, timed
from microtome.activations import ActivationStream, ArraySource, StreamConfig
from microtome.common.config import require
from microtome.common.device import parse_device
from microtome.dictionary import TopKConfig, TrainConfig
from microtome.dictionary.evaluate import Moments
from microtome.dictionary.trainer import STATISTICS_BATCHES, Trainer

END = ("fvu", "dead", "start_bytes", "peak_bytes", "peak_gpu_bytes")
_BUFFERED_BATCHES = 8
Rows = Float[Tensor, "row d"]


@dataclass(frozen=True, kw_only=True)
class Config(ModelAndText):
    """`rows` activations to train on, over and over if `steps` need more; `held_out` more to measure FVU on. A turn is
    `steps_per_turn` steps, and the first turn is not timed.

    `dead_after` is the number of tokens without a firing after which a latent gets the auxiliary loss, on all sides.
    """

    rows: int = 131_072
    held_out: int = 16_384
    d_sae: int = 4608
    k: int = 32
    batch_size: int = 2048
    steps: int = 160
    steps_per_turn: int = 10
    lr: float = 1e-3
    warmup_steps: int = 20
    decay_fraction: float = 0.3
    dead_after: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rows >= self.batch_size > 0, "rows must hold a batch", got=self.rows)
        require(self.held_out > 1, "held_out must be at least two rows", got=self.held_out)
        require(self.warmup_steps != 1, "warmup_steps must be 0 or at least 2", got=self.warmup_steps)
        require(
            self.steps_per_turn > 0 and self.steps >= 2 * self.steps_per_turn and self.steps % self.steps_per_turn == 0,
            "steps must be two turns or more",
            got=f"steps {self.steps}, steps_per_turn {self.steps_per_turn}",
        )

    @property
    def buffer_size(self) -> int:
        return _BUFFERED_BATCHES * self.batch_size

    @property
    def n_tokens(self) -> int:
        return self.steps * self.batch_size


def source_of(rows: Rows, config: Config) -> ArraySource:
    """The rows, as taken at the config's hook point."""
    return ArraySource(rows, hook_names=config.hook_name, model_name=config.model)


class Side(Protocol):
    """One way to train the dictionary."""

    def step(self) -> object:
        """One training step."""

    def reconstruct(self, x: Rows) -> Rows:
        """The reconstruction of raw activations."""

    def n_dead(self) -> int:
        """Latents that have not fired for `dead_after` tokens."""


class Microtome:
    """The trainer of `microtome.train`, with its usual settings."""

    def __init__(self, config: Config, rows: Rows) -> None:
        architecture = TopKConfig(d_sae=config.d_sae, k=config.k, dead_after=config.dead_after)
        settings = TrainConfig(
            n_tokens=config.n_tokens,
            batch_size=config.batch_size,
            buffer_size=config.buffer_size,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction,
            seed=config.seed,
            device=config.device,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="microtome-bench-")
        out = Path(self._folder.name) / "dictionary"
        self.trainer = Trainer([architecture], source_of(rows, config), out, settings)
        self.batches = self.trainer.begin()

    def step(self) -> object:
        return self.trainer.train_step(next(self.batches))

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> Rows:
        trainer = self.trainer
        reconstruction: Tensor = trainer.groups[0].export(0, trainer.scales, {"model_name": "bench"})(x)
        return reconstruction

    def n_dead(self) -> int:
        return int(self.trainer.groups[0].dead.sum())


class SAELens:
    """SAELens's TopKTrainingSAE in its SAETrainer, on the same batches with the same learning rates."""

    def __init__(self, config: Config, rows: Rows, *, sparse: bool = False, autocast: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(config.seed)
        device = str(parse_device(config.device))
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=rows.shape[1],
                d_sae=config.d_sae,
                k=config.k,
                device=device,
                normalize_activations="expected_average_only_in",
                use_sparse_activations=sparse,
                rescale_acts_by_decoder_norm=not sparse,  # its sparse codes cannot be rescaled in training
            )
        )
        settings = SAETrainerConfig(
            total_training_samples=config.n_tokens,
            train_batch_size_samples=config.batch_size,
            lr=config.lr,
            lr_end=config.lr / 10,  # must be given, and is not used by the constant scheduler
            lr_warm_up_steps=config.warmup_steps,
            lr_decay_steps=int(config.steps * config.decay_fraction),
            device=device,
            autocast=autocast,
            dead_feature_window=config.dead_after // config.batch_size,
        )
        self.trainer = SAETrainer(cfg=settings, sae=sae, data_provider=_batches(rows, config))
        sae.to(device)
        self.trainer.activation_scaler.estimate_scaling_factor(
            rows.shape[1], _batches(rows, config), n_batches_for_norm_estimate=STATISTICS_BATCHES
        )

    def step(self) -> object:
        """What the loop of `SAETrainer.fit` does, less its logs and progress bar."""
        self.trainer.maybe_reset_sparsity()
        output = self.trainer.step(next(self.trainer.data_provider))
        self.trainer.n_training_steps += 1
        return output

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> Rows:
        sae, scaler = self.trainer.sae, self.trainer.activation_scaler
        sae.eval()
        reconstruction: Tensor = scaler.unscale(sae.decode(sae.encode(scaler(x))))
        return reconstruction

    def n_dead(self) -> int:
        return int(self.trainer.dead_neurons.sum())


def _batches(rows: Rows, config: Config) -> Iterator[Rows]:
    """The batches that Microtome's trainer takes, as fp32."""
    settings = StreamConfig(batch_size=config.batch_size, buffer_size=config.buffer_size, seed=config.seed)
    return (batch.float() for batch in ActivationStream(source_of(rows, config), settings))


SIDES: dict[str, Callable[[Config, Rows], Side]] = {
    "microtome": Microtome,
    "saelens_fp32": SAELens,
    "saelens_fp32_sparse": lambda config, rows: SAELens(config, rows, sparse=True),
    "saelens_autocast": lambda config, rows: SAELens(config, rows, autocast=True),
}


def serve(pipe: Connection, name: str, config: Config, file: str) -> None:
    """Make the side, then answer: a number of steps with the seconds that they took, None with the figures of the end."""
    device = parse_device(config.device)
    rows = load_file(file)
    side = SIDES[name](config, rows["train"])
    start = resident_bytes("VmRSS")
    pipe.send("ready")
    try:
        while (steps := pipe.recv()) is not None:
            pipe.send(timed(lambda: [side.step() for _ in range(steps)] and None, device))
        pipe.send(_end(side, rows["held_out"], device, start))
    except (EOFError, KeyboardInterrupt):
        return  # whoever asked has gone


def _end(side: Side, held_out: Rows, device: torch.device, start: int) -> dict[str, Any]:
    peak = resident_bytes("VmHWM")
    peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    moments = Moments(held_out.shape[1])
    for x in held_out.float().split(_BLOCK):
        moments.add(x, side.reconstruct(x.to(device)).float().cpu())
    figures = (moments.fvu(), side.n_dead(), start, peak, peak_gpu)
    return dict(zip(END, figures, strict=True))
