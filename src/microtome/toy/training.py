"""One trainer for every toy model. The optimiser is a field of its config, because results depend on it: the paper's notebook
uses AdamW with weight decay 0.01, ARENA's exercises plain Adam.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.config import require
from microtome.common.device import generator
from microtome.common.errors import ConfigError, InputError
from microtome.common.progress import Progress
from microtome.toy.features import Source
from microtome.toy.models import ToyModel


@dataclass(frozen=True, kw_only=True)
class TrainToyConfig:
    """Steps, batch and optimiser. `warmup_steps` rise linearly to `lr`; then it is constant, or falls to 0 as a cosine.
    `keep_every` is how often the loss is written down (each is the mean since the one before)."""

    n_steps: int = 10_000
    batch_size: int = 1024
    lr: float = 1e-3
    optimiser: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    keep_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require(min(self.n_steps, self.batch_size, self.keep_every) > 0, "Steps and batch_size must be positive")
        require(self.lr > 0, "lr must be positive", got=self.lr)
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas are two numbers in [0, 1)")
        require(0 <= self.warmup_steps < self.n_steps, "warmup_steps must be fewer than n_steps", got=self.warmup_steps)
        require(self.weight_decay >= 0, "weight_decay must not be negative", got=self.weight_decay)
        fits = self.optimiser == "adamw" or self.weight_decay == 0
        require(fits, "Only adamw has weight decay here", got=f"optimiser {self.optimiser}")

    def lr_at(self, step: int) -> float:
        """The learning rate of the update `step` (from 0)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.lr
        way = (step - self.warmup_steps) / (self.n_steps - self.warmup_steps)
        return self.lr * (1 + math.cos(math.pi * way)) / 2


@dataclass(frozen=True)
class ToyTraining:
    """How a training went: after `steps` updates the mean training loss since the last entry, for each instance."""

    steps: tuple[int, ...]
    losses: Float[Tensor, "entry instance"]


def importances(
    values: Sequence[float] | Float[Tensor, " feature"] | Float[Tensor, "instance feature"],
) -> Float[Tensor, "rows feature"]:
    """Importances `[1 or instance, feature]` from one list for all instances, or one for each."""
    given = torch.as_tensor(values, dtype=torch.float32)
    return given[None] if given.ndim == 1 else given


def train_toy(
    model: ToyModel,
    source: Source,
    config: TrainToyConfig,
    *,
    importance: Sequence[float] | Tensor | None = None,
    progress: Progress | None = None,
) -> ToyTraining:
    """Train `model` in place on fresh batches of `source`. `importance` is `[feature]` or `[instance, feature]`.

    The loss is the sum over instances of each one's own, so an instance's gradient does not depend on the others. Raises
    ConfigError where model, source and importance do not fit each other; InputError when a loss is no longer a number.
    """
    weights = None if importance is None else importances(importance)
    _check_fit(model, source, weights)
    rng = generator(config.seed, "toy data")
    optimiser = _optimiser(model, config)
    steps, losses = list[int](), list[Tensor]()
    total = torch.zeros(model.config.n_instances)
    since = 0
    for step in range(config.n_steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr_at(step)
        loss = model.loss(source.sample(config.batch_size, rng), weights)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        total += loss.detach()
        since += 1
        if (step + 1) % config.keep_every == 0 or step + 1 == config.n_steps:
            steps.append(step + 1)
            losses.append(total / since)
            total, since = torch.zeros_like(total), 0
            _check_finite(losses[-1], step + 1, config.lr)
        if progress is not None:
            progress.advance(1)
    return ToyTraining(tuple(steps), torch.stack(losses))


def _optimiser(model: ToyModel, config: TrainToyConfig) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    if config.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, betas=betas, fused=True)
    decay = config.weight_decay
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=betas, weight_decay=decay, fused=True)


def _check_fit(model: ToyModel, source: Source, importance: Tensor | None) -> None:
    c = model.config
    if (source.n_instances, source.n_features) != (c.n_instances, c.n_features):
        raise ConfigError(
            "The features do not fit the model",
            got=f"{source.n_instances} instances of {source.n_features}",
            expected=f"{c.n_instances} instances of {c.n_features}",
        )
    shapes = [(1, c.n_features), (c.n_instances, c.n_features)]
    if importance is not None and tuple(importance.shape) not in shapes:
        raise ConfigError("The importances do not fit the model", got=list(importance.shape), expected=shapes)


def _check_finite(losses: Tensor, step: int, lr: float) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"The training went wrong before step {step}", got=f"no number in instances {bad}", fix=f"Lower lr ({lr})"
        )
