"""`microtome bench train`: its settings, what a side is, and Microtome's own sides. `train_peers.py` has the others.

A side is made with a `Task` and the rows to train on; `step()` is one training step on the next batch of its stream, and
`reconstruct(x)` is what the dictionary makes of activations x in the end.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from benchmarks.common import MOST_SEEDS, ModelAndText
from microtome.activations import ActivationStream, ArraySource, StreamConfig
from microtome.common.config import require
from microtome.common.memory import freed_memory_kept
from microtome.dictionary import Dictionary, TrainConfig
from microtome.dictionary.activation import JumpReLU
from microtome.dictionary.config import BatchTopKConfig, DictionaryConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from microtome.dictionary.trainer import Trainer

ARCHITECTURES = ("topk", "batchtopk", "relu", "jumprelu")
_BUFFERED_BATCHES = 8
Rows = Float[Tensor, "row d"]


@dataclass(frozen=True, kw_only=True)
class Config(ModelAndText):
    """`rows` activations to train on, over and over if `steps` need more; `held_out` more to measure FVU on. A turn is
    `steps_per_turn` steps, and the first turn is not timed. With `rows_file` the activations are kept in that file, and read
    from it the next time.

    `architectures` (of topk, batchtopk, relu, jumprelu; commas between them) are trained one after the other, each by its
    sides in turn, with `seeds` seeds; `sides` leaves other sides than those out. `many` > 0 also trains so many TopK
    dictionaries on one stream, beside one dictionary that is given its batches.

    `relu_coefficient` and `jumprelu_coefficient` are λ in λ Σ f ‖W_dec,i‖ and λ Σ 1[z > θ] beside a summed squared error, for
    inputs of mean norm √d: the same number means the same on both sides, and rises over the first twentieth. Our side is
    trained again with up to `more_coefficients` other λ, to compare FVU at the peer's L0 (`train_fvu.py`).
    With `jumprelu_near_start` SAELens's JumpReLU begins, through its own options, with decoder rows of norm one and thresholds
    near where they end, √λ; else with its defaults, from which it does not become sparse within some hundred steps.
    `dead_after` is the number of tokens without a firing after which a latent gets the auxiliary loss, on all sides.
    """

    architectures: str = ",".join(ARCHITECTURES)
    sides: str = ""
    seeds: int = 1
    many: int = 0
    rows_file: str = ""
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
    relu_coefficient: float = 5.0
    jumprelu_coefficient: float = 1.0
    jumprelu_near_start: bool = True
    more_coefficients: int = 4
    dead_after: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.chosen) - set(ARCHITECTURES)
        require(bool(self.chosen) and not unknown, f"architectures are of {ARCHITECTURES}", got=self.architectures)
        require(0 < self.seeds <= MOST_SEEDS, f"seeds must be between 1 and {MOST_SEEDS}", got=self.seeds)
        require(self.many >= 0 and self.more_coefficients >= 0, "many and more_coefficients must not be negative")
        positive = self.relu_coefficient > 0 and self.jumprelu_coefficient > 0
        require(positive, "coefficients must be positive", got=f"{self.relu_coefficient}, {self.jumprelu_coefficient}")
        require(self.rows >= self.batch_size > 0, "rows must hold a batch", got=self.rows)
        require(self.held_out > 1, "held_out must be at least two rows", got=self.held_out)
        require(self.warmup_steps != 1, "warmup_steps must be 0 or at least 2", got=self.warmup_steps)
        require(
            self.steps_per_turn > 0 and self.steps >= 2 * self.steps_per_turn and self.steps % self.steps_per_turn == 0,
            "steps must be two turns or more",
            got=f"steps {self.steps}, steps_per_turn {self.steps_per_turn}",
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The architectures to train."""
        return tuple(filter(None, self.architectures.split(",")))

    @property
    def buffer_size(self) -> int:
        return _BUFFERED_BATCHES * self.batch_size

    @property
    def n_tokens(self) -> int:
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Task:
    """What all sides are given: the sizes, an architecture, and a seed."""

    config: Config
    architecture: str
    seed: int

    @property
    def coefficient(self) -> float:
        """λ; zero for an architecture without."""
        coefficients = {"relu": self.config.relu_coefficient, "jumprelu": self.config.jumprelu_coefficient}
        return coefficients.get(self.architecture, 0.0)

    def with_coefficient(self, coefficient: float) -> "Task":
        """The same with another λ."""
        changed: dict[str, Any] = {f"{self.architecture}_coefficient": coefficient}
        return replace(self, config=replace(self.config, **changed))

    def batches(self, rows: Rows) -> Iterator[Rows]:
        """The batches that Microtome's trainer takes, as fp32."""
        config = self.config
        stream = StreamConfig(batch_size=config.batch_size, buffer_size=config.buffer_size, seed=self.seed)
        return (batch.float() for batch in ActivationStream(self.source(rows), stream))

    def source(self, rows: Rows) -> ArraySource:
        """The rows, as taken at the config's hook point."""
        return ArraySource(rows, hook_names=self.config.hook_name, model_name=self.config.model)

    def dictionary(self) -> DictionaryConfig:
        """The dictionary to train."""
        config = self.config
        sizes: dict[str, Any] = {"d_sae": config.d_sae, "dead_after": config.dead_after}
        made: dict[str, Callable[[], DictionaryConfig]] = {
            "topk": lambda: TopKConfig(**sizes, k=config.k),
            "batchtopk": lambda: BatchTopKConfig(**sizes, k=config.k),
            "relu": lambda: ReLUConfig(**sizes, coefficient=self.coefficient),
            "jumprelu": lambda: JumpReLUConfig(**sizes, coefficient=self.coefficient),
        }
        return made[self.architecture]()


class Side(Protocol):
    """One way to train the dictionary."""

    def step(self) -> object:
        """One training step."""

    def reconstruct(self, x: Rows) -> tuple[Rows, int]:
        """The reconstruction of raw activations, and how many latents fired in all."""

    def n_dead(self) -> int:
        """Latents that have not fired for `dead_after` tokens."""


class Microtome:
    """The trainer of `microtome.train`, with its usual settings, for `many` dictionaries. Without a `stream` it is given the
    same eight batches again and again, which cost nothing to make."""

    def __init__(self, task: Task, rows: Rows, *, many: int = 1, stream: bool = True) -> None:
        config = task.config
        settings = TrainConfig(
            n_tokens=config.n_tokens,
            batch_size=config.batch_size,
            buffer_size=config.buffer_size,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction,
            seed=task.seed,
            device=config.device,
        )
        self.held = ExitStack()
        out = Path(self.held.enter_context(tempfile.TemporaryDirectory(prefix="microtome-bench-"))) / "dictionary"
        self.held.enter_context(freed_memory_kept())  # as in Trainer.run
        dictionaries = [replace(task.dictionary(), seed=task.seed + i) for i in range(many)]
        self.task = task
        self.trainer = Trainer(dictionaries, task.source(rows), out, settings, single=many == 1)
        self.batches = self.trainer.begin()
        if not stream:
            self.batches = itertools.cycle(list(itertools.islice(self.batches, _BUFFERED_BATCHES)))

    def step(self) -> object:
        return self.trainer.train_step(next(self.batches))

    @torch.no_grad()
    def reconstruct(self, x: Rows) -> tuple[Rows, int]:
        trainer = self.trainer
        sae = trainer.groups[0].export(0, trainer.scales, {"model_name": "bench"})
        assert isinstance(sae, Dictionary)
        if isinstance(sae.activation, JumpReLU) and self.task.architecture == "batchtopk":
            # The k · n largest of these rows, as the peers do.
            pre = functional.linear(x - sae.b_dec, sae.encoder, sae.b_enc).flatten()
            sae.activation.threshold.fill_(float(pre.topk(self.task.config.k * len(x)).values.min()) * (1 - 1e-6))
        codes = sae.encode(x)
        return sae.decode(codes), int((codes.values > 0).sum())

    def n_dead(self) -> int:
        return int(self.trainer.groups[0].dead[0].sum())
