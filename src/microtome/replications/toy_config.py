"""What `toy_models_of_superposition` trains and how much of it: one config for all steps."""

from dataclasses import dataclass

from microtome.common.config import require
from microtome.toy import DoubleDescentConfig, TrainToyConfig, spaced


@dataclass(frozen=True, kw_only=True)
class ToyModelsConfig:
    """Sizes of the experiments; the set-ups themselves (n, m, importances) are the papers' and stand with each step.

    `n_steps`, `lr` and `batch_size` are those of the small models (Adam), `seeds` how many pentagons are tried, `best_of`
    how many starts each setting has where the lowest loss is chosen. `grid` is the number of densities of the phase diagrams
    (and of relative importances, one less or more to be odd). `geometry_*`, `computation_*`: the larger models.
    `descent_*`: data-set double descent. `dictionary_*`: sparse autoencoders on the hidden space of toy models.
    """

    n_steps: int = 5000
    lr: float = 1e-3
    batch_size: int = 1024
    seeds: int = 32
    best_of: int = 8
    grid: int = 13
    grid_steps: int = 3000
    grid_batch: int = 512
    geometry_features: int = 80
    geometry_hidden: int = 12
    geometry_densities: int = 10
    geometry_steps: int = 5000
    computation_steps: int = 6000
    computation_best_of: int = 4
    privileged_best_of: int = 16
    descent_features: int = 200
    descent_density: float = 0.03
    descent_sizes: tuple[int, ...] = (3, 5, 8, 15, 30, 60, 100, 200, 500, 1000)
    descent_seeds: int = 3
    descent_steps: int = 8000
    dictionaries: int = 16
    dictionary_steps: int = 20_000
    dictionary_batch: int = 512
    coefficient: float = 0.2
    """The weight of Σ|z| beside the mean squared error of a sparse autoencoder on a toy model."""
    jumprelu_coefficient: float = 0.65
    """The same for JumpReLU, of Σ tanh(0.3 z)."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("seeds", "best_of", "computation_best_of", "privileged_best_of", "dictionaries", "dictionary_batch")
        for name in counts:
            require(getattr(self, name) > 0, f"{name} must be positive", got=getattr(self, name))
        require(self.grid >= 3, "grid must be at least 3", got=self.grid)
        require(self.geometry_densities >= 2, "geometry_densities must be at least 2", got=self.geometry_densities)
        fits = 0 < self.geometry_hidden <= self.geometry_features
        require(fits, "geometry_hidden must not exceed geometry_features", got=self.geometry_hidden)
        require(self.dictionary_steps >= 8, "dictionary_steps must be at least 8", got=self.dictionary_steps)
        require(self.coefficient >= 0, "coefficient must not be negative", got=self.coefficient)
        _ = self.descent, self.train, self.phase  # they check their own settings

    @property
    def train(self) -> TrainToyConfig:
        """The small models' training."""
        return self.train_for(self.n_steps)

    def train_for(self, n_steps: int) -> TrainToyConfig:
        """The same for other numbers of steps."""
        return TrainToyConfig(n_steps=n_steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed)

    @property
    def phase(self) -> TrainToyConfig:
        """The phase diagrams' training."""
        return TrainToyConfig(
            n_steps=self.grid_steps, batch_size=self.grid_batch, lr=3e-3, schedule="cosine", seed=self.seed
        )

    @property
    def computation(self) -> TrainToyConfig:
        """The models of the absolute value and those with a hidden ReLU."""
        return TrainToyConfig(
            n_steps=self.computation_steps, batch_size=256, lr=1e-2, schedule="cosine", seed=self.seed
        )

    @property
    def descent(self) -> DoubleDescentConfig:
        return DoubleDescentConfig(
            n_features=self.descent_features,
            density=self.descent_density,
            sizes=self.descent_sizes,
            seeds=self.descent_seeds,
            n_steps=self.descent_steps,
            warmup_steps=self.descent_steps // 6,
            seed=self.seed,
        )

    @property
    def geometry_sweep(self) -> tuple[float, ...]:
        """Densities from 1 to .01, and the two of the claim, most frequent first."""
        return tuple(sorted({*spaced(1.0, 0.01, self.geometry_densities), 0.5, 0.3}, reverse=True))
