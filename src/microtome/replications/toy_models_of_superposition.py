"""Toy models of superposition (Elhage et al. 2022), trained from nothing in minutes.

When a model has more features than dimensions and the features are sparse, it stores them in directions that are not at right
angles. Each step trains the paper's models of one section (`toy_*.py`) and states what it says as claims; ARENA's exercises add
anticorrelated sampling that keeps its marginals, and dictionaries that recover the known features.
"""

from collections.abc import Callable, Iterator

from microtome.common.progress import Progress
from microtome.model import HookedModel
from microtome.replications.frame import Found, Replication
from microtome.replications.toy_basics import linear_and_relu, pentagons, plane
from microtome.replications.toy_computation import absolute_value, neurons
from microtome.replications.toy_config import ToyModelsConfig
from microtome.replications.toy_descent import descent
from microtome.replications.toy_dictionaries import KINDS, dictionaries
from microtome.replications.toy_geometry import geometry
from microtome.replications.toy_phases import pairs, phases
from microtome.views import Report

_STEPS: tuple[Callable[[ToyModelsConfig], Found | tuple[Found, ...]], ...] = (
    plane,
    pentagons,
    linear_and_relu,
    geometry,
    phases,
    pairs,
    neurons,
    absolute_value,
)


def _found(config: ToyModelsConfig, progress: Progress) -> Iterator[Found]:
    for step in _STEPS:
        result = step(config)
        found = result if isinstance(result, tuple) else (result,)
        progress.advance(1, found[-1].title)
        yield from found
    yield descent(config, progress)
    yield dictionaries(config, progress)


def run(config: ToyModelsConfig, model: HookedModel | None, progress: Progress) -> Report:
    """All steps, one after the other. No language model takes part; one that is given is not used."""
    found = list(_found(config, progress))
    return Report(
        title="Toy models of superposition",
        summary=(
            "Small models with more features than dimensions, trained on synthetic features: when features are stored in "
            "superposition, in which shapes, what it costs, what can be computed on it, and whether dictionaries find the "
            "features again."
        ),
        claims=[claim for one in found for claim in one.claims],
        sections=[one.section for one in found],
        provenance={"model": "made here"} if model is None else {},
    )


REPLICATION = Replication(
    name="toy_models_of_superposition",
    title="Toy models of superposition",
    source=(
        "Elhage et al. 2022, “Toy Models of Superposition” (arXiv 2209.10652); Henighan et al. 2023, “Superposition, "
        "Memorization, and Double Descent”; protocols of ARENA 1.5.4"
    ),
    about="superposition in toy models: shapes, phases, neurons, computation, attacks, double descent, dictionaries",
    smoke=ToyModelsConfig(
        n_steps=1000,
        lr=1e-2,
        batch_size=256,
        seeds=4,
        best_of=4,
        grid=3,
        grid_steps=200,
        grid_batch=64,
        geometry_features=20,
        geometry_hidden=4,
        geometry_densities=3,
        geometry_steps=600,
        computation_steps=400,
        computation_best_of=1,
        privileged_best_of=2,
        descent_features=40,
        descent_density=0.1,
        descent_sizes=(5, 40, 400),
        descent_seeds=2,
        descent_steps=500,
        dictionaries=3,
        dictionary_steps=400,
        dictionary_batch=128,
    ),
    full=ToyModelsConfig(),
    run=run,
    steps=lambda config: len(_STEPS) + len(config.descent_sizes) + len(KINDS),
    default_model=None,
)
