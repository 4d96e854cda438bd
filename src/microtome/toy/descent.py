"""Data-set double descent: a toy model trained on T fixed points stores the points if they are few, the features if they are
many, and does worst between. Henighan et al. 2023, “Superposition, memorization, and double descent”.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.config import require
from microtome.common.device import generator
from microtome.common.progress import Progress
from microtome.toy.features import Features, FixedData, fixed_data, unit_norm
from microtome.toy.geometry import dimensionality
from microtome.toy.models import ToyConfig, ToyModel
from microtome.toy.training import TrainToyConfig, train_toy


@dataclass(frozen=True, kw_only=True)
class DoubleDescentConfig:
    """`n_features` of density `density` in `n_hidden` dimensions; data sets of each of `sizes` points of length 1, `seeds` models
    on each, of which the one with the lowest training loss counts. The optimiser is the paper's: AdamW with weight
    decay, a warm-up, and a cosine to zero."""

    n_features: int = 1000
    n_hidden: int = 2
    density: float = 0.01
    sizes: tuple[int, ...] = (3, 5, 6, 8, 10, 15, 30, 50, 100, 200, 500, 1000, 2000)
    seeds: int = 5
    n_steps: int = 15_000
    warmup_steps: int = 2500
    lr: float = 1e-3
    weight_decay: float = 1e-2
    n_test: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.sizes) > 0 and min(self.sizes) > 0, "There must be data sets to train on", got=self.sizes)
        require(min(self.seeds, self.n_test) > 0, "seeds and n_test must be positive")
        _ = self.train(1)

    def train(self, n_points: int) -> TrainToyConfig:
        return TrainToyConfig(
            n_steps=self.n_steps,
            batch_size=n_points,
            lr=self.lr,
            optimiser="adamw",
            weight_decay=self.weight_decay,
            schedule="cosine",
            warmup_steps=self.warmup_steps,
            seed=self.seed,
        )


@dataclass(frozen=True, eq=False)
class DataSetSize:
    """The best model on a data set of `n_points`. Losses are Σ_i (x_i − x'_i)², means over points."""

    n_points: int
    train_loss: float
    test_loss: float
    W: Float[Tensor, "hidden feature"]
    hidden: Float[Tensor, "hidden point"]
    """Where the training points lie in the hidden space."""

    @property
    def feature_dimensionality(self) -> float:
        """Mean D of the features, each weighted by its squared length: features that are not stored do not count."""
        return weighted_dimensionality(self.W)

    @property
    def data_dimensionality(self) -> float:
        """The same measure of the training points."""
        return weighted_dimensionality(self.hidden)


def weighted_dimensionality(W: Float[Tensor, "hidden column"]) -> float:
    """Σ_i D_i ‖W_i‖² / Σ_i ‖W_i‖². It does not depend on the scale of all columns together, so features and points can be
    compared: k columns in a regular polygon have 2/k, whatever else is near zero."""
    scaled = W / W.norm(dim=0).max().clamp_min(1e-12)
    weight = scaled.square().sum(dim=0)
    return float((dimensionality(scaled) * weight).sum() / weight.sum().clamp_min(1e-12))


def double_descent(config: DoubleDescentConfig, progress: Progress | None = None) -> list[DataSetSize]:
    """A row for each size. `progress` advances by one after each."""
    rows = []
    for n_points in config.sizes:
        rows.append(_one_size(config, n_points))
        if progress is not None:
            progress.advance(1, f"{n_points} points")
    return rows


def _one_size(c: DoubleDescentConfig, n_points: int) -> DataSetSize:
    features = Features(c.n_features, c.density, c.seeds)
    # All seeds see the same points, so that the lowest training loss is the best solution and not the easiest data.
    points = fixed_data(Features(c.n_features, c.density), n_points, generator(c.seed, "points", n_points)).points
    shape = ToyConfig(n_features=c.n_features, n_hidden=c.n_hidden, n_instances=c.seeds, seed=c.seed)
    model = ToyModel(shape)
    data = FixedData(points.expand(c.seeds, -1, -1))
    train_toy(model, data, c.train(n_points))
    with torch.no_grad():
        train_loss = model.loss(data.points) * c.n_features
        test = unit_norm(features.sample(c.n_test, generator(c.seed, "test")))
        test_loss = model.loss(test) * c.n_features
        best = int(train_loss.argmin())
        hidden = model.encode(data.points)[best].T
    return DataSetSize(n_points, float(train_loss[best]), float(test_loss[best]), model.W_in[best].detach(), hidden)


def interior_maximum(values: Sequence[float]) -> bool:
    """Whether the highest value lies between the ends."""
    highest = max(range(len(values)), key=lambda i: values[i])
    return 0 < highest < len(values) - 1
