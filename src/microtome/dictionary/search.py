"""The coefficient λ that gives a wanted L0.

How λ becomes L0 depends on the activations, the width and the length of the training, so it has to be tried. Several
dictionaries that differ in λ alone are trained shortly on one stream, with the whole schedule of the long training
(warm-up, decay, annealing) in fewer steps; log L0 is interpolated against log λ, and a second round looks closer.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch

from microtome.activations.source import ActivationSource
from microtome.common.config import require
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.config import DictionaryConfig, JumpReLUConfig, PenaltyConfig
from microtome.dictionary.trainer import TrainConfig, Trainer

P = TypeVar("P", bound=DictionaryConfig)
_MEASURED_BATCHES = 4
_FEWEST_STEPS = 500  # a penalty needs hundreds of steps to silence latents, however short the training is
_LEAST = 1e-3  # L0 below this counts as this


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search: `share` of the long training's tokens for each dictionary that is tried (but 500 steps at least),
    in the first round the config's own coefficient times `factors`. While the target lies outside of what these give,
    they are moved along, `rounds` times at most; then `closer` dictionaries are tried between the two nearest."""

    share: float = 0.25
    factors: tuple[float, ...] = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
    rounds: int = 3
    closer: int = 3

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share must be in (0, 1]", got=self.share)
        rising = all(a < b for a, b in itertools.pairwise(self.factors))
        require(
            len(self.factors) > 1 and self.factors[0] > 0 and rising,
            "factors must be positive and rise",
            got=self.factors,
        )
        require(self.rounds > 0, "rounds must be positive", got=self.rounds)
        require(self.closer >= 0, "closer must not be negative", got=self.closer)


@dataclass(frozen=True)
class Trial:
    """A coefficient, and the L0 that it gave in use."""

    coefficient: float
    l0: float


def search_coefficient(
    dictionary: P,
    source: ActivationSource,
    target_l0: float,
    *,
    config: TrainConfig | None = None,
    search: SearchConfig | None = None,
) -> P:
    """`dictionary` with the coefficient with which the training `config` should end at `target_l0` latents per row.

    Raises ConfigError for an architecture whose L0 is set otherwise or a target that cannot be, InputError where no
    coefficient that was tried comes to the target; it says which L0 were found.
    """
    config, search = config or TrainConfig(), search or SearchConfig()
    _check(dictionary, target_l0)
    assert isinstance(dictionary, PenaltyConfig)
    center = dictionary.coefficient or _usual(dictionary)
    trials: list[Trial] = []
    for _ in range(search.rounds):
        wanted = [center * factor for factor in search.factors]
        trials = _sorted([*trials, *try_coefficients(dictionary, source, wanted, config=config, share=search.share)])
        if bracket(trials, target_l0) is not None:
            break
        reach = search.factors[-1] / search.factors[0] * (search.factors[1] / search.factors[0])
        center *= reach if trials[-1].l0 > target_l0 else 1 / reach
    ends = bracket(trials, target_l0)
    if ends is None:
        raise _out_of_reach(trials, target_l0)
    if search.closer:
        steps = [(i + 1) / (search.closer + 1) for i in range(search.closer)]
        wanted = [_between(ends[0].coefficient, ends[1].coefficient, step) for step in steps]
        trials = _sorted([*trials, *try_coefficients(dictionary, source, wanted, config=config, share=search.share)])
    return replace(dictionary, coefficient=interpolate(trials, target_l0))


def try_coefficients(
    dictionary: PenaltyConfig,
    source: ActivationSource,
    coefficients: Sequence[float],
    *,
    config: TrainConfig,
    share: float = 1.0,
) -> list[Trial]:
    """Train a dictionary with each coefficient on one stream, for `share` of the tokens; the L0 of each in use, on the
    batches that come next."""
    n_tokens = max(int(config.n_tokens * share), min(config.n_tokens, _FEWEST_STEPS * config.batch_size))
    warmup = round(config.warmup_steps * n_tokens / config.n_tokens)
    short = replace(config, n_tokens=n_tokens, warmup_steps=warmup, log_to=())
    configs = [replace(dictionary, coefficient=each) for each in coefficients]
    with tempfile.TemporaryDirectory(prefix="microtome-search-") as scratch:
        trainer = Trainer(configs, source, Path(scratch) / "trials", short, single=False)
        batches = trainer.begin()
        for batch in itertools.islice(batches, short.n_steps):
            trainer.train_step(batch)
        rows = torch.cat([next(batches) for _ in range(_MEASURED_BATCHES)]).to(trainer.device, torch.float32)
    found = [0.0] * len(configs)
    for group in trainer.groups:
        x = torch.cat([rows[:, each] for each in group.x_columns], 1)
        for member, number in enumerate(group.numbers):
            sae = group.export(member, trainer.scales, {"model_name": source.model_name})
            found[number] = float(sae.encode(x).l0.double().mean())
    return [Trial(coefficient, l0) for coefficient, l0 in zip(coefficients, found, strict=True)]


def bracket(trials: Sequence[Trial], target_l0: float) -> tuple[Trial, Trial] | None:
    """The neighbours, in the order of their coefficients, between whose L0 the target lies: those with the largest
    coefficients, if there are several (L0 falls with λ, but for noise)."""
    pairs = [(a, b) for a, b in itertools.pairwise(trials) if a.l0 >= target_l0 >= b.l0]
    return pairs[-1] if pairs else None


def interpolate(trials: Sequence[Trial], target_l0: float) -> float:
    """The coefficient of the target, on the line through its neighbours in log λ and log L0."""
    ends = bracket(trials, target_l0)
    assert ends is not None, "the target lies between two trials"
    high, low = (math.log(max(each.l0, _LEAST)) for each in ends)
    share = 0.5 if high == low else (high - math.log(target_l0)) / (high - low)
    return _between(ends[0].coefficient, ends[1].coefficient, min(1.0, share))


def _between(a: float, b: float, share: float) -> float:
    return float(a * (b / a) ** share)


def _sorted(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.coefficient)


def _usual(dictionary: PenaltyConfig) -> float:
    """The coefficient that the architecture has when nothing is said."""
    [default] = [field.default for field in fields(dictionary) if field.name == "coefficient"]
    assert isinstance(default, float)
    return default


def _check(dictionary: DictionaryConfig, target_l0: float) -> None:
    if not isinstance(dictionary, PenaltyConfig):
        raise ConfigError(
            f"The L0 of {dictionary.architecture} is not set by a coefficient", fix="Set k to the L0 that is wanted"
        )
    if isinstance(dictionary, JumpReLUConfig) and dictionary.sparsity == "quadratic":
        raise ConfigError(
            "The sparsity 'quadratic' has a target of its own",
            fix="Set its target_l0, or use sparsity 'step' or 'tanh'",
        )
    require(
        0 < target_l0 <= dictionary.d_sae,
        "target_l0 must be between 0 and d_sae",
        got=target_l0,
        expected=dictionary.d_sae,
    )


def _out_of_reach(trials: Sequence[Trial], target_l0: float) -> InputError:
    found = ", ".join(f"L0 {trial.l0:.4g} with λ {trial.coefficient:.3g}" for trial in trials)
    most, least = max(trial.l0 for trial in trials), min(trial.l0 for trial in trials)
    if target_l0 > most:
        fix = "Choose a smaller L0, a wider dictionary, or a longer training"
    else:
        fix = "Choose a larger L0; where λ no longer moves it, other settings do (a longer training, JumpReLU's bandwidth)"
    return InputError(
        f"No coefficient gives an L0 of {target_l0:g}",
        got=found,
        expected=f"a target from {least:.4g} to {most:.4g}",
        fix=fix,
    )
