"""The coefficient λ that gives a wanted L0.

How λ becomes L0 depends on the activations, the width and the length of the training, so it has to be tried:

1. Several dictionaries that differ in λ alone are trained on one stream, with the whole schedule of the long training
   (warm-up, decay, annealing) in few steps. log L0 is interpolated against log λ.
2. A few near the λ found are trained for as many steps, and for twice as many. What the doubling did to log L0 is taken
   on to the length of the long training, each further doubling doing less than the one before, and interpolated once more.
"""

import itertools
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from microtome.activations.source import ActivationSource
from microtome.common.config import require
from microtome.common.errors import ConfigError, InputError
from microtome.common.memory import freed_memory_kept
from microtome.dictionary.config import DictionaryConfig, JumpReLUConfig, PenaltyConfig
from microtome.dictionary.trainer import TrainConfig, Trainer

_MEASURED_BATCHES = 4
_FEWEST_STEPS = 200
_MOST_CARRIED = 4.0
_NARROW = 3.0  # L0 at the ends of a bracket differ by at most so much
_FADING = 0.65  # what each doubling of the length does to log L0, of what the doubling before did
_LEAST = 1e-3  # L0 below this counts as this


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. The first dictionaries have the config's own coefficient times `factors`, and half of `share` of the
    long training's tokens (200 steps at least). Then `closer` dictionaries, each `closer_factor` from the next, are
    trained for as many tokens and for twice as many. While the target lies outside of what the first give, they are tried
    again further on, and while the closer ones do not enclose it narrowly, again nearer to it: `rounds` times in all."""

    share: float = 0.25
    factors: tuple[float, ...] = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
    rounds: int = 2
    closer: int = 3
    closer_factor: float = 2.0

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share must be in (0, 1]", got=self.share)
        rising = self.factors[0] > 0 and all(a < b for a, b in itertools.pairwise(self.factors))
        require(len(self.factors) > 1 and rising, "factors must be positive and rise", got=self.factors)
        require(self.rounds > 0, "rounds must be positive", got=self.rounds)
        require(self.closer > 1, "closer must be 2 or more", got=self.closer)
        require(self.closer_factor > 1, "closer_factor must be above 1", got=self.closer_factor)


@dataclass(frozen=True)
class Trial:
    """A coefficient, and the L0 that it gave in use."""

    coefficient: float
    l0: float


def search_coefficient(
    dictionary: DictionaryConfig,
    source: ActivationSource,
    target_l0: float,
    *,
    config: TrainConfig | None = None,
    search: SearchConfig | None = None,
) -> PenaltyConfig:
    """`dictionary` with the coefficient with which the training `config` should end at `target_l0` latents per row (of a
    cross-layer transcoder, as its `d_sae`: in each layer, in the mean).

    Raises ConfigError for an architecture whose L0 is set otherwise or a target that cannot be, InputError where no
    coefficient that was tried comes to the target; it says which L0 were found.
    """
    config, search = config or TrainConfig(), search or SearchConfig()
    penalised = _checked(dictionary, target_l0)

    def tried(wanted: Sequence[float], n_tokens: int) -> list[Trial]:
        return try_coefficients(penalised, source, wanted, config=config, n_tokens=n_tokens)

    short = _tokens(config, search.share / 2)
    center = _rough(penalised, target_l0, search, lambda wanted: tried(wanted, short))
    trials = refine(center, target_l0, search, lambda wanted: _closer(wanted, short, config.n_tokens, tried))
    center = interpolate(trials, target_l0)
    if bracket(trials, target_l0) is None:
        _warn(trials, target_l0, center)
    return replace(penalised, coefficient=center)


def refine(
    center: float, target_l0: float, search: SearchConfig, tried: Callable[[Sequence[float]], list[Trial]]
) -> list[Trial]:
    """Trials around the coefficient, and around what they say, until they enclose the target narrowly. They come nearer
    to each other only once they enclose it."""
    trials: list[Trial] = []
    factor = search.closer_factor
    for _ in range(search.rounds):
        wanted = [center * factor ** (i - (search.closer - 1) / 2) for i in range(search.closer)]
        trials = _sorted([*trials, *tried(wanted)])
        ends = bracket(trials, target_l0)
        if _is_narrow(ends):
            break
        if ends is not None:
            factor **= 0.5
        center = interpolate(trials, target_l0)
    return trials


def _is_narrow(ends: tuple[Trial, Trial] | None) -> bool:
    """Whether a straight line between these is near enough to the truth."""
    return ends is not None and ends[0].l0 <= _NARROW * max(ends[1].l0, _LEAST)


def _warn(trials: Sequence[Trial], target_l0: float, coefficient: float) -> None:
    found = ", ".join(f"{trial.l0:.4g} with λ {trial.coefficient:.3g}" for trial in trials)
    warnings.warn(
        f"The search for an L0 of {target_l0:g} did not enclose it: trainings come to L0 {found}. λ {coefficient:.3g} is "
        "what the line through them says; the training may end beside the target. A larger share of the run helps",
        stacklevel=3,
    )


def _rough(
    dictionary: PenaltyConfig, target_l0: float, search: SearchConfig, tried: Callable[[Sequence[float]], list[Trial]]
) -> float:
    """The coefficient that short trainings give."""
    center = dictionary.coefficient or _usual(dictionary)
    reach = search.factors[-1] / search.factors[0] * (search.factors[1] / search.factors[0])
    trials: list[Trial] = []
    for _ in range(search.rounds):
        trials = _sorted([*trials, *tried([center * factor for factor in search.factors])])
        if bracket(trials, target_l0) is not None:
            return interpolate(trials, target_l0)
        center *= reach if trials[-1].l0 > target_l0 else 1 / reach
    raise _out_of_reach(trials, target_l0)


def _closer(
    wanted: Sequence[float], short: int, whole: int, tried: Callable[[Sequence[float], int], list[Trial]]
) -> list[Trial]:
    """What these coefficients give at the end of the whole training, from trainings of `short` tokens and twice that."""
    long = min(2 * short, whole)
    after = tried(wanted, long)
    if not short < long < whole:
        return after
    doublings = math.log(whole / long) / math.log(long / short)
    times = _FADING * (1 - _FADING**doublings) / (1 - _FADING)
    return [carried_on(a, b, times) for a, b in zip(tried(wanted, short), after, strict=True)]


def _sorted(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.coefficient)


def try_coefficients(
    dictionary: PenaltyConfig,
    source: ActivationSource,
    coefficients: Sequence[float],
    *,
    config: TrainConfig,
    n_tokens: int | None = None,
) -> list[Trial]:
    """Train a dictionary with each coefficient on one stream, with the schedule of `config` in `n_tokens`; the L0 of each
    in use, on the batches that come next."""
    n_tokens = n_tokens or config.n_tokens
    warmup = round(config.warmup_steps * n_tokens / config.n_tokens)
    short = replace(config, n_tokens=n_tokens, warmup_steps=warmup, log_to=())
    configs = [replace(dictionary, coefficient=each) for each in coefficients]
    with tempfile.TemporaryDirectory(prefix="microtome-search-") as scratch:
        trainer = Trainer(configs, source, Path(scratch) / "trials", short, single=False)
        batches = trainer.begin()
        with freed_memory_kept():
            for batch in itertools.islice(batches, short.n_steps):
                trainer.train_step(batch)
        rows = torch.cat([next(batches) for _ in range(_MEASURED_BATCHES)]).to(trainer.device, torch.float32)
    found = [0.0] * len(configs)
    for group in trainer.groups:
        x = group.layout.x(rows).transpose(0, 1).flatten(1)
        for member, number in enumerate(group.numbers):
            sae = group.export(member, trainer.scales, {"model_name": source.model_name})
            layers = sae.d_sae // dictionary.d_sae  # one, but of a cross-layer transcoder
            found[number] = float(sae.encode(x).l0.double().mean()) / layers
    return [Trial(coefficient, l0) for coefficient, l0 in zip(coefficients, found, strict=True)]


def bracket(trials: Sequence[Trial], target_l0: float) -> tuple[Trial, Trial] | None:
    """The neighbours, in the order of their coefficients, between whose L0 the target lies: those with the largest
    coefficients, if there are several (L0 falls with λ, but for noise)."""
    pairs = [(a, b) for a, b in itertools.pairwise(trials) if a.l0 >= target_l0 >= b.l0]
    return pairs[-1] if pairs else None


def interpolate(trials: Sequence[Trial], target_l0: float) -> float:
    """The coefficient of the target, on the line through its neighbours in log λ and log L0; where it lies outside of the
    trials, on the line through all of them, but not further away than the trials are from each other."""
    ends = bracket(trials, target_l0)
    if ends is None:
        return _beyond(trials, target_l0)
    high, low = (math.log(max(each.l0, _LEAST)) for each in ends)
    share = 0.5 if high == low else min(1.0, (high - math.log(target_l0)) / (high - low))
    return float(ends[0].coefficient * (ends[1].coefficient / ends[0].coefficient) ** share)


def _beyond(trials: Sequence[Trial], target_l0: float) -> float:
    x = [math.log(trial.coefficient) for trial in trials]
    y = [math.log(max(trial.l0, _LEAST)) for trial in trials]
    slope, intercept = statistics.linear_regression(x, y)
    outside = (math.log(target_l0) - intercept) / min(slope, -1e-6)
    return math.exp(min(max(outside, 2 * x[0] - x[-1]), 2 * x[-1] - x[0]))


def carried_on(before: Trial, after: Trial, times: float) -> Trial:
    """The trial of a training that is longer by `times` such steps as lie between these two (in log L0)."""
    ratio = max(after.l0, _LEAST) / max(before.l0, _LEAST)
    return Trial(after.coefficient, after.l0 * min(max(ratio**times, 1 / _MOST_CARRIED), _MOST_CARRIED))


def _tokens(config: TrainConfig, share: float) -> int:
    return max(int(config.n_tokens * share), min(config.n_tokens, _FEWEST_STEPS * config.batch_size))


def _usual(dictionary: PenaltyConfig) -> float:
    """The coefficient that the architecture has when nothing is said."""
    [default] = [field.default for field in fields(dictionary) if field.name == "coefficient"]
    assert isinstance(default, float)
    return default


def _checked(dictionary: DictionaryConfig, target_l0: float) -> PenaltyConfig:
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
    return dictionary


def _out_of_reach(trials: Sequence[Trial], target_l0: float) -> InputError:
    found = ", ".join(f"L0 {trial.l0:.4g} with λ {trial.coefficient:.3g}" for trial in trials)
    most, least = max(trial.l0 for trial in trials), min(trial.l0 for trial in trials)
    if target_l0 > most:
        fix = "Choose a smaller L0, a wider dictionary, or a longer training"
    else:
        fix = (
            "Choose a larger L0. Where λ no longer moves it, a longer training does (or a larger share of it in the search), "
            "or a larger learning rate; for JumpReLU also a larger threshold_rate or bandwidth"
        )
    return InputError(
        f"No coefficient gives an L0 of {target_l0:g}",
        got=found,
        expected=f"a target from {least:.4g} to {most:.4g}",
        fix=fix,
    )
