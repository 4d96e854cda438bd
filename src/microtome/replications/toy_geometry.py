"""The second part of `toy_models_of_superposition`: the geometry of many equal features, and what it costs.

Dimensionality against density, the shapes in which features gather, ideal shapes, and the vulnerability to small changes of
the input, measured on the same models.
"""

from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.replications.frame import Found, claim
from microtome.replications.toy_basics import ELHAGE, OWN
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import (
    STICKY,
    Features,
    ToyConfig,
    ToyModel,
    dimensionality,
    dimensions_per_feature,
    groups,
    n_represented,
    shape,
    train_toy,
    vulnerability,
)
from microtome.toy.geometry import REPRESENTED
from microtome.views import Lines, Scatter, Series, Table, at_least, at_most
from microtome.views.report import Cell

_STUCK = (0.5, 0.3)
_SHAPES = ("digon", "triangle", "pentagon", "square antiprism", "tetrahedron")


def geometry(config: ToyModelsConfig) -> tuple[Found, Found]:
    """n = 80 equal features in m = 12 dimensions, from dense to sparse; then attacks on the same models."""
    densities = config.geometry_sweep
    n, m = config.geometry_features, config.geometry_hidden
    model = ToyModel(ToyConfig(n_features=n, n_hidden=m, n_instances=len(densities), seed=config.seed))
    features = Features(n, densities, len(densities))
    train_toy(model, features, config.train_for(config.geometry_steps))
    return _shapes(config, densities, model.W_in.detach()), _attacked(config, densities, model, features)


def _shapes(config: ToyModelsConfig, densities: tuple[float, ...], W: Float[Tensor, "density hidden feature"]) -> Found:
    D, stored = dimensionality(W), W.square().sum(dim=1) > REPRESENTED
    m = config.geometry_hidden
    claims = [
        *(
            claim(
                f"half_{p}",
                f"At p = {p} features gather in antipodal pairs: D = ½ ± .02 (share of the represented features)",
                at_least(0.9),
                _share_at(D[i], stored[i], 0.5),
                source=ELHAGE,
                note=f"{int(stored[i].sum())} features in {m} dimensions, D* = {float(dimensions_per_feature(W[i])):.3f}",
            )
            for p in _STUCK
            for i in [densities.index(p)]
        ),
        claim(
            "bounds",
            "0 ≤ D_i ≤ 1 for every feature of every model (largest violation)",
            at_most(1e-4),
            float(torch.cat([-D.flatten(), D.flatten() - 1]).max().clamp_min(0)),
            source=OWN,
        ),
        claim(
            "sum",
            f"The dimensionalities add up to no more than the dimensions: ΣD ≤ {m} (largest excess over all densities)",
            at_most(1e-4),
            float((D.sum(dim=1) - m).max().clamp_min(0)),
            source=OWN,
            note=f"ΣD is {float(D.sum(dim=1).min()):.3f} to {float(D.sum(dim=1).max()):.3f}",
        ),
        claim(
            "ideal",
            "Ideal digon, triangle, pentagon, square antiprism and tetrahedron have D = ½, ⅔, ⅖, ⅜ and ¾ (largest error)",
            at_most(1e-6),
            max(float((dimensionality(shape(name)) - STICKY[name]).abs().max()) for name in _SHAPES),
            source=ELHAGE,
        ),
    ]
    return Found("The geometry of many features", claims, [*_drawn(densities, W, D, stored), _table(densities, W, D)])


def _share_at(D: Float[Tensor, " feature"], stored: Tensor, value: float) -> float:
    """The share of the represented features whose dimensionality is `value` ± .02; 0 where none is represented."""
    kept = D[stored]
    return float(((kept - value).abs() <= 0.02).float().mean()) if len(kept) else 0.0


def _drawn(densities: tuple[float, ...], W: Tensor, D: Tensor, stored: Tensor) -> tuple[Lines, Scatter]:
    sparsity = [1 / p for p in densities]
    lines = Lines(
        [Series("D* = m / ‖W‖²", dimensions_per_feature(W), x=sparsity)],
        x_scale="log",
        x_label="1 / density",
        y_label="dimensions per feature",
        title="Dimensions per feature: a plateau at ½",
    )
    where = stored.nonzero().tolist()
    scatter = Scatter(
        [torch.tensor(sparsity[i]).log10().item() for i, _ in where],
        [float(D[i, j]) for i, j in where],
        labels=[f"p = {densities[i]:.3f}, feature {j}" for i, j in where],
        x_label="log₁₀(1 / density)",
        y_label="dimensionality D",
        title="The dimensionality of each represented feature",
        caption="Sticky values: "
        + ", ".join(f"{name} {value:.3g}" for name, value in STICKY.items())
        + ". Where features are so many that they all touch each other, there are no groups any more.",
    )
    return lines, scatter


def _table(densities: tuple[float, ...], W: Tensor, D: Tensor) -> Table:
    rows: list[list[Cell]] = []
    for i, p in enumerate(densities):
        shapes = Counter(group.name for group in groups(W[i])).most_common(4)
        found = ", ".join(f"{count} × {name}" for name, count in shapes) or "none"
        rows.append(
            [f"{p:.3f}", int(n_represented(W[i])), float(dimensions_per_feature(W[i])), float(D[i].sum()), found]
        )
    return Table(
        ["density", "features stored", "D*", "ΣD", "groups (features in dimensions)"],
        rows,
        caption="“2 in 1” is an antipodal pair, “3 in 2” a triangle, “5 in 2” a pentagon, “4 in 3” a tetrahedron.",
    )


# ---- attacks ------------------------------------------------------------------------------------------------------------


def _attacked(config: ToyModelsConfig, densities: tuple[float, ...], model: ToyModel, features: Features) -> Found:
    harm = vulnerability(model, features, n_inputs=200, seed=config.seed).harm
    relative = harm / harm[0]
    per_dimension = 1 / dimensions_per_feature(model.W_in.detach())
    claims = [
        claim(
            "vulnerable",
            "Superposition makes models vulnerable: harm of the best attack, the most of any density relative to dense",
            at_least(3),
            float(relative.max()),
            source=ELHAGE,
        ),
        claim(
            "vulnerable_tracks",
            "Vulnerability tracks the features per dimension ‖W‖²/m (correlation over densities)",
            at_least(0.9),
            float(torch.corrcoef(torch.stack([relative, per_dimension]))[0, 1]),
            source=ELHAGE,
        ),
    ]
    sparsity = [1 / p for p in densities]
    figure = Lines(
        [
            Series("harm, relative to dense", relative, x=sparsity),
            Series("features per dimension", per_dimension, x=sparsity),
        ],
        x_scale="log",
        y_scale="log",
        x_label="1 / density",
        y_label="relative to p = 1",
        title="Adversarial vulnerability and features per dimension",
        caption="Harm: the rise of the squared error in units of the attack's squared length; attacks of a tenth of the mean "
        "input's length along rows of WᵀW, the most harmful for each input.",
    )
    return Found("Adversarial vulnerability", claims, [figure])
