"""The third part of `toy_models_of_superposition`: phase diagrams, and features that do not fire independently."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from microtome.common.device import generator
from microtome.replications.frame import Found, claim
from microtome.replications.toy_basics import ELHAGE
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import Apart, Features, PhaseDiagram, Together, ToyConfig, boundary, cosines, phase_diagram, spaced
from microtome.toy.firing import Firing
from microtome.toy.trials import Trials, trials
from microtome.views import Claim, Directions, Heatmap, at_least, at_most, equal, near
from microtome.views.report import Part

_SIDES = ((0.5, 0.4, True), (0.1, 0.1, True), (0.5, 0.55, False), (0.1, 0.2, False))
_HALVES = spaced(1 / 20, 1 / 400, 5)
"""ARENA's densities for pairs: 400^-linspace(.5, 1, 5)."""
_DRAWS = 100_000


# ---- phases -------------------------------------------------------------------------------------------------------------


def phases(config: ToyModelsConfig) -> Found:
    """One feature more than dimensions: dropped, in superposition, or dedicated."""
    densities, ratios = spaced(1.0, 0.01, config.grid), spaced(0.1, 10.0, config.grid)
    parts: list[Part] = []
    for m in (1, 2):
        diagram = phase_diagram(densities, ratios, n_hidden=m, seeds=config.best_of, train=config.phase, n_test=4000)
        parts.append(_drawn(diagram, m))
    claims = [_side(config, ratio, density, paired) for ratio, density, paired in _SIDES]
    return Found("Phase diagrams", [*claims, _all_phases(parts)], parts)


def _side(config: ToyModelsConfig, ratio: float, density: float, paired: bool) -> Claim:
    """One point beside the analytic border, trained as the small models are."""
    found = phase_diagram((density,), (ratio,), seeds=config.best_of, train=config.train)
    side = "Below" if paired else "Above"
    return claim(
        f"border_{ratio}_{density}",
        f"{side} the border 4r/(2 + 5r) = {boundary(ratio):.3f} for r = {ratio}: at p = {density} the best of "
        f"{config.best_of} has {'an antipodal pair' if paired else 'no antipodal pair'}",
        equal(paired),
        bool(found.antipodal[0, 0]),
        source="closed form, with free W and b",
        note=f"W = [{', '.join(f'{w:.2f}' for w in found.W[0, 0, 0].tolist())}]",
    )


def _all_phases(parts: Sequence[Part]) -> Claim:
    first = parts[0]
    assert isinstance(first, Heatmap)
    seen = {int(value) for row in first.cells.tolist() for value in row}
    return claim(
        "three_phases",
        "n = 2, m = 1: the extra feature is ignored, in superposition, or has the dimension to itself (phases that occur)",
        equal(3),
        len(seen),
        source=ELHAGE,
    )


def _drawn(diagram: PhaseDiagram, m: int) -> Heatmap:
    """Densities downwards, importances to the right; the analytic border where there is one."""
    n = len(diagram.ratios)
    border = []
    if m == 1:
        fall = math.log(diagram.densities[0] / diagram.densities[-1]) / (len(diagram.densities) - 1)
        rise = math.log(diagram.ratios[-1] / diagram.ratios[0]) / (n - 1)
        for step in range(4 * n - 3):
            column = step / 4
            ratio = diagram.ratios[0] * math.exp(column * rise)
            border.append((math.log(diagram.densities[0] / boundary(ratio)) / fall, column))
    return Heatmap(
        diagram.phases,
        rows=[f"{p:.3f}" for p in diagram.densities],
        columns=[f"{r:.2f}" for r in diagram.ratios],
        row_label="density",
        column_label="relative importance of the last feature",
        value_label="phase",
        limits=(0, 2),
        border=border,
        title=f"The last of {m + 1} features in {m} dimension{'s' if m > 1 else ''}",
        caption="0: ignored, 1: in superposition, 2: with a dimension of its own."
        + (
            " The dashed line is 4r/(2 + 5r), below which W = [1, −1] with b = 0 loses less than dropping a feature."
            if border
            else ""
        ),
    )


# ---- correlated and anticorrelated features -----------------------------------------------------------------------------


def pairs(config: ToyModelsConfig) -> Found:
    """n = 4, m = 2, two pairs (ARENA); and three correlated pairs in the same plane, which are cramped."""
    claims, parts = list[Claim](), list[Part]()
    for rule, kind, wanted in ((Together(), "correlated", 1.0), (Apart(), "anticorrelated", 0.0)):
        claims += _marginals(config, rule, kind, wanted)
        done = _trained(config, rule, 4, _HALVES)
        inside = torch.stack([cosines(done.best.W_in.detach())[:, 2 * i, 2 * i + 1] for i in range(2)])
        claims.append(_angle(kind, inside))
        parts.append(_plane(done, _HALVES, f"Two {kind} pairs in two dimensions"))
    cramped = _trained(config, Together(), 6, (0.05, 0.01))
    beside = cosines(cramped.best.W_in.detach())
    least = min(float(beside[s, 2 * i, 2 * i + 1]) for s in range(2) for i in range(3))
    claims.append(
        claim(
            "cramped",
            "Three correlated pairs in two dimensions: correlated features lie side by side rather than opposite (least cosine "
            "within a pair)",
            at_least(0.0),
            least,
            source=ELHAGE,
        )
    )
    parts.append(_plane(cramped, (0.05, 0.01), "Three correlated pairs in two dimensions"))
    return Found("Correlated and anticorrelated features", claims, parts)


def _marginals(config: ToyModelsConfig, rule: Firing, kind: str, wanted: float) -> list[Claim]:
    """What is measured on fresh draws, at the highest density."""
    p = _HALVES[0]
    rng = generator(config.seed, "marginals", kind)
    fires = Features(4, p, firing=rule).sample(_DRAWS, rng)[0] > 0
    both = (fires[:, 0::2] & fires[:, 1::2]).float().mean(dim=0)
    off = (fires.float().mean(dim=0) - p).abs().max()
    return [
        claim(
            f"{kind}_marginals",
            f"Each of two {kind} features fires with p = {p:.3f} (largest difference over {_DRAWS:,} draws)",
            at_most(0.01),
            float(off),
            source="ARENA 1.5.4",
        ),
        claim(
            f"{kind}_together",
            f"Both of them fire with probability {'p' if wanted else '0'} (largest measured)",
            near(wanted * p, 0.01 if wanted else 0.0),
            float(both.max()),
            source="ARENA 1.5.4",
        ),
    ]


def _trained(config: ToyModelsConfig, rule: Firing, n: int, densities: Sequence[float]) -> Trials:
    shape = ToyConfig(n_features=n, n_hidden=2, seed=config.seed)
    features = Features(n, densities, len(densities), firing=rule)
    return trials(shape, features, config.best_of, config.train, n_test=40_000)


def _angle(kind: str, inside: Tensor) -> Claim:
    """Within a pair: at right angles, or opposite."""
    if kind == "correlated":
        return claim(
            "correlated_cosine",
            "Correlated features are orthogonal to each other (largest |cosine| within a pair, best models of all densities)",
            at_most(0.2),
            float(inside.abs().max()),
            source=ELHAGE,
        )
    return claim(
        "anticorrelated_cosine",
        "Anticorrelated features are antipodal (highest cosine within a pair, best models of all densities)",
        at_most(-0.9),
        float(inside.max()),
        source=ELHAGE,
    )


def _plane(done: Trials, densities: Sequence[float], title: str) -> Directions:
    W = done.best.W_in.detach()
    n = W.shape[2]
    return Directions(
        [one.T for one in W],
        names=[f"p = {p:.4f}" for p in densities],
        groups=[[f"pair {i // 2 + 1}" for i in range(n)]] * len(W),
        title=title,
    )
