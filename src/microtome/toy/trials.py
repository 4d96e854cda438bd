"""Several starts of each setting, trained side by side; the one with the lowest loss is the setting's solution.

Toy models often stop at a worse solution than the best one, so a result about solutions needs several starts and a rule, fixed
before, by which one is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.common.config import require
from microtome.common.device import generator
from microtome.common.progress import Progress
from microtome.toy.features import Features
from microtome.toy.models import ToyConfig, ToyModel
from microtome.toy.training import ToyTraining, TrainToyConfig, importances, train_toy

_PIECE = 500  # inputs at a time, so that memory stays small


@dataclass(frozen=True, eq=False)
class Trials:
    """`model` holds all starts: instance s · n_seeds + i is start i of setting s. `losses` are measured on inputs that all
    starts of a setting share."""

    model: ToyModel
    losses: Float[Tensor, "setting seed"]
    training: ToyTraining

    @property
    def chosen(self) -> Int[Tensor, " setting"]:
        """Which start of each setting has the lowest loss."""
        return self.losses.argmin(dim=-1)

    @property
    def best(self) -> ToyModel:
        """One instance for each setting."""
        n_settings, n_seeds = self.losses.shape
        return self.model.take(torch.arange(n_settings) * n_seeds + self.chosen)

    @property
    def W(self) -> Float[Tensor, "setting seed hidden feature"]:  # noqa: N802
        """All directions."""
        result: Tensor = self.model.W_in.detach().unflatten(0, tuple(self.losses.shape))
        return result


def trials(
    shape: ToyConfig,
    features: Features,
    seeds: int,
    train: TrainToyConfig,
    *,
    importance: Sequence[float] | Tensor | None = None,
    n_test: int = 10_000,
    progress: Progress | None = None,
) -> Trials:
    """Train `seeds` models for each of the settings, which are the instances of `features`.

    `shape` says the model; its `n_instances` is not used. `importance` is `[feature]` or `[setting, feature]`. Raises
    ConfigError where they do not fit.
    """
    require(min(seeds, n_test) > 0, "seeds and n_test must be positive", got=(seeds, n_test))
    n = features.n_instances
    repeated = replace(features, density=features.densities.repeat_interleave(seeds, dim=0), n_instances=n * seeds)
    weights = None if importance is None else importances(importance)
    if weights is not None and len(weights) > 1:
        weights = weights.repeat_interleave(seeds, dim=0)
    model = ToyModel(replace(shape, n_instances=n * seeds))
    training = train_toy(model, repeated, train, importance=weights, progress=progress)
    rng, total, pieces = generator(train.seed, "trials"), torch.zeros(n * seeds), -(-n_test // _PIECE)
    with torch.no_grad():
        for _ in range(pieces):
            total += model.loss(features.sample(_PIECE, rng).repeat_interleave(seeds, dim=0), weights)
    return Trials(model, (total / pieces).unflatten(0, (n, seeds)), training)
