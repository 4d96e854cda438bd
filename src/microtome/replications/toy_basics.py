"""The first part of `toy_models_of_superposition`: when features share dimensions, and in which way in the plane.

Linear against ReLU output; dense against sparse; pentagons; and that turning the hidden space changes nothing.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.device import generator
from microtome.replications.frame import Found, claim
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import (
    Features,
    ToyConfig,
    ToyModel,
    angle_gaps,
    dimensionality,
    interference,
    n_represented,
    spaced,
    train_toy,
)
from microtome.toy.geometry import REPRESENTED
from microtome.toy.trials import trials
from microtome.views import Claim, Directions, Heatmap, Lines, Series, at_least, at_most

ELHAGE = "Elhage et al. 2022"
OWN = "proposed here"
_DENSITIES = spaced(1.0, 1 / 20, 10)


# ---- the plane ----------------------------------------------------------------------------------------------------------


def plane(config: ToyModelsConfig) -> Found:
    """Five features in two dimensions, from dense to sparse."""
    importance = [0.9**i for i in range(5)]
    shape = ToyConfig(n_features=5, n_hidden=2, seed=config.seed)
    features = Features(5, _DENSITIES, len(_DENSITIES))
    done = trials(shape, features, config.best_of, config.train, importance=importance)
    dense = n_represented(done.W[0])
    needed = 0.75 * config.best_of
    best = done.best.W_in.detach()
    claims = [
        claim(
            "dense",
            "Dense features (p = 1, importance 0.9^i): the two most important ones are kept and the rest dropped "
            f"(seeds with exactly two ‖W‖² > ½, of {config.best_of})",
            at_least(needed),
            int((dense == 2).sum()),
            source=ELHAGE,
        ),
        claim(
            "sparse",
            f"Sparse features (p = {_DENSITIES[-1]:.2f}): all five share the plane (features represented by the best model)",
            at_least(5),
            int(n_represented(best[-1])),
            source=ELHAGE,
        ),
    ]
    figure = Directions(
        [W.T for W in best],
        names=[f"p = {p:.3f}" for p in _DENSITIES],
        groups=[[_fate(W)[i] for i in range(5)] for W in best],
        labels=[[f"feature {i}, importance {v:.2f}" for i, v in enumerate(importance)]] * len(best),
        title="Five features of falling importance in two dimensions",
        caption="Each arrow is a feature's direction W_i in the hidden space; the model with the lowest loss of each density.",
    )
    return Found("Superposition in the plane", claims, [figure])


def _fate(W: Float[Tensor, "2 feature"]) -> list[str]:
    """What became of each feature of a model."""
    norms, overlap = W.square().sum(dim=0), interference(W)
    kept = ["in superposition" if o > 0.2 else "by itself" for o in overlap]
    return [name if n > REPRESENTED else "dropped" for name, n in zip(kept, norms, strict=True)]


def pentagons(config: ToyModelsConfig) -> Found:
    """n = 5, m = 2, p = .025, equal importance."""
    model = ToyModel(ToyConfig(n_features=5, n_hidden=2, n_instances=config.seeds, seed=config.seed))
    train_toy(model, Features(5, 0.025, config.seeds), config.train)
    W = model.W_in.detach()
    gaps = [angle_gaps(one) for one in W]
    off = [float((g - 72).abs().max()) if len(g) == 5 else math.inf for g in gaps]
    D = dimensionality(W)
    regular = [o <= 8 and bool(((d - 0.4).abs() <= 0.01).all()) for o, d in zip(off, D, strict=True)]
    claims = [
        claim(
            "pentagon",
            "Five equal sparse features (p = .025) form a regular pentagon: gaps 72° ± 8°, D = .4 ± .01 (share of seeds)",
            at_least(28 / 32),
            sum(regular) / len(regular),
            source=ELHAGE,
            note=f"{sum(regular)} of {len(regular)}; mean ‖W_i‖ {float(W.norm(dim=1).mean()):.3f}, "
            f"mean bias {float(model.b.mean().detach()):.3f}",
        ),
    ]
    shown = min(len(W), 5)
    figure = Directions(
        [one.T for one in W[:shown]],
        names=[f"seed {i}" for i in range(shown)],
        title="Equal sparse features form pentagons",
    )
    found = [o for o in off if o < math.inf]
    note = f"{len(found)} of {len(W)} models store all five features; in them a gap differs from 72° by at most " + (
        f"{max(found):.1f}°." if found else "nothing that could be measured."
    )
    return Found("Pentagons", claims, [figure, note])


# ---- linear against ReLU ------------------------------------------------------------------------------------------------

_SPARSITIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


def linear_and_relu(config: ToyModelsConfig) -> Found:
    """n = 20, m = 5, importance 0.7^i: a linear model never stores more than m features; one with a ReLU does."""
    importance, n = [0.7**i for i in range(20)], len(_SPARSITIES)
    found = {}
    for output in ("linear", "relu"):
        shape = ToyConfig(n_features=20, n_hidden=5, n_instances=n, output=output, seed=config.seed)
        found[output] = ToyModel(shape)
        train_toy(found[output], Features(20, _SPARSITIES, n), config.train, importance=importance)
    linear, relu = (found[name].W_in.detach() for name in ("linear", "relu"))
    stored = {"linear": n_represented(linear), "ReLU output": n_represented(relu)}
    claims = [
        claim(
            "linear",
            "A linear model of 5 dimensions stores at most 5 features at any density (most ‖W‖² > ½)",
            at_most(5),
            int(stored["linear"].max()),
            source=ELHAGE,
        ),
        claim(
            "relu",
            "With a ReLU at the output, sparse features (p = .01) exceed the dimensions (features stored)",
            at_least(6),
            int(stored["ReLU output"][_SPARSITIES.index(0.01)]),
            source=ELHAGE,
        ),
        claim(
            "relu_dense",
            "With dense features the ReLU model stores no more than the linear one (features stored at p = 1)",
            at_most(5),
            int(stored["ReLU output"][0]),
            source=ELHAGE,
        ),
        _turned(config, found["relu"]),
    ]
    lines = Lines(
        [Series(name, counts, x=[1 / p for p in _SPARSITIES]) for name, counts in stored.items()],
        x_scale="log",
        x_label="1 / density",
        y_label="features stored",
        title="Features stored in five dimensions",
    )
    maps = [
        _gram(linear[-1], f"linear, p = {_SPARSITIES[-1]}"),
        _gram(relu[0], "ReLU output, p = 1"),
        _gram(relu[-2], f"ReLU output, p = {_SPARSITIES[-2]}"),
    ]
    return Found("Linear models and ReLU models", claims, [lines, *maps])


def _turned(config: ToyModelsConfig, model: ToyModel) -> Claim:
    """Nothing is special about the hidden axes: W → OW gives the same outputs for a random rotation O."""
    rng = generator(config.seed, "rotation")
    m = model.config.n_hidden
    turn = torch.linalg.qr(torch.randn(m, m, generator=rng)).Q
    x = Features(model.config.n_features, 0.1, model.config.n_instances).sample(1000, rng)
    with torch.no_grad():
        change = float((model.rotated(turn)(x) - model(x)).abs().max())
    return claim(
        "rotation",
        "The hidden basis is not privileged: a random rotation of it changes no output (largest difference)",
        at_most(1e-5),
        change,
        source=ELHAGE,
    )


def _gram(W: Float[Tensor, "hidden feature"], name: str) -> Heatmap:
    return Heatmap(
        W.T @ W,
        row_label="output",
        column_label="feature",
        value_label="WᵀW",
        diverging=True,
        limits=(-1.5, 1.5),
        title=f"WᵀW: {name}",
    )
