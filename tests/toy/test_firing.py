"""Which features fire together: every rule keeps its marginals, and does what it is named after."""

import math
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from microtome.common.errors import ConfigError
from microtome.toy import Apart, Blocks, Copula, Features, Hierarchy, Independent, Together, spaced, unit_norm, zipf
from microtome.toy.features import FixedData, fixed_data
from microtome.toy.firing import Firing

N = 60_000
SIX = [0.3, 0.3, 0.2, 0.1, 0.05, 0.02]
AR1 = torch.tensor([[0.8 ** abs(i - j) for j in range(6)] for i in range(6)])
RULES: dict[str, Firing] = {
    "independent": Independent(),
    "together": Together(2),
    "groups of three": Together(3),
    "apart": Apart(2),
    "one of three": Apart(3),
    "hierarchy": Hierarchy((-1, 0, 1, 1, -1, 4)),
    "copula": Copula(AR1),
    "blocks": Blocks(((Apart(2), 2), (Together(2), 2), (Independent(), 2))),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fired(firing: Firing, density: float | Sequence[float] | Tensor, n_features: int, n: int = N) -> Tensor:
    """Which of `n` inputs of one instance have which feature: booleans [n, feature]."""
    each = torch.as_tensor(density).float()
    features = Features(n_features, each[None] if each.ndim else each, firing=firing)
    return features.sample(n, rng())[0] > 0


@pytest.mark.parametrize("name", RULES)
def test_marginals_are_the_densities(name: str) -> None:
    for densities in (SIX, [0.15] * 6):
        measured = fired(RULES[name], densities, 6).float().mean(dim=0)
        assert (measured - torch.tensor(densities)).abs().max() < 0.01


def test_correlated_features_fire_together_and_anticorrelated_ones_never_do() -> None:
    p = 0.15
    both = fired(Together(), p, 4)
    assert torch.equal(both[:, 0], both[:, 1])
    assert not torch.equal(both[:, 1], both[:, 2])
    apart = fired(Apart(), p, 4)
    assert not (apart[:, 0] & apart[:, 1]).any()
    assert abs(float((apart[:, 0] & apart[:, 2]).float().mean()) - p * p) < 0.005  # pairs are independent
    assert abs(float(apart.float().mean()) - p) < 0.005  # and not p(1 − p) = 0.1275


def test_of_correlated_features_the_rarer_one_needs_the_other() -> None:
    pair = fired(Together(), [0.4, 0.1], 2)
    assert not (pair[:, 1] & ~pair[:, 0]).any()


def test_of_a_group_one_fires_at_a_time_also_where_all_time_is_taken() -> None:
    full = fired(Apart(4), 0.25, 4)
    assert (full.sum(dim=1) == 1).float().mean() > 0.999


def test_a_child_needs_its_parent() -> None:
    fires = fired(Hierarchy((-1, 0, 0, 2)), [0.5, 0.2, 0.3, 0.3], 4)
    assert not (fires[:, 1:3].any(dim=1) & ~fires[:, 0]).any()
    assert torch.equal(fires[:, 3], fires[:, 2])  # as frequent as its parent
    together = (fires[:, 1] & fires[:, 2]).float().mean()
    assert abs(float(together) - 0.5 * 0.4 * 0.6) < 0.01  # siblings are independent given the parent


def test_a_copula_has_the_correlation_of_two_normal_variables() -> None:
    """P(both below the median) = 1/4 + arcsin(ρ)/2π, Sheppard 1899."""
    correlation = torch.tensor([[1.0, -0.6], [-0.6, 1.0]])
    both = fired(Copula(correlation), 0.5, 2).all(dim=1).float().mean()
    assert abs(float(both) - (0.25 + math.asin(-0.6) / (2 * math.pi))) < 0.01


def test_instances_have_densities_of_their_own() -> None:
    features = Features(3, [0.1, 0.5], 2)
    share = (features.sample(N, rng()) > 0).float().mean(dim=(1, 2))
    assert (share - torch.tensor([0.1, 0.5])).abs().max() < 0.01


def test_magnitudes_are_uniform() -> None:
    values = Features(2, 0.5).sample(N, rng())
    size = values[values != 0]
    assert size.min() >= 0
    assert abs(float(size.mean()) - 1 / 2) < 0.01
    assert abs(float(size.square().mean()) - 1 / 3) < 0.01
    signed = Features(2, 1.0, magnitude="signed").sample(N, rng())
    assert abs(float(signed.mean())) < 0.01
    assert abs(float(signed.square().mean()) - 1 / 3) < 0.01
    assert signed.min() < -0.99


def test_the_same_generator_gives_the_same_batch() -> None:
    features = Features(4, 0.3, 2)
    assert torch.equal(features.sample(5, rng(3)), features.sample(5, rng(3)))
    assert not torch.equal(features.sample(5, rng(3)), features.sample(5, rng(4)))


def test_zipf_and_spaced() -> None:
    assert zipf(4, exponent=1, highest=0.5).tolist() == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    assert spaced(1, 0.01, 3) == pytest.approx((1, 0.1, 0.01))
    assert spaced(0.2, 5, 1) == pytest.approx((0.2,))


def test_fixed_data_is_the_same_each_time_has_length_one_and_no_empty_point() -> None:
    data = fixed_data(Features(50, 0.03), 200, rng())
    points = data.sample(200, rng(1))
    assert torch.equal(points, data.sample(200, rng(2)))
    assert torch.allclose(points.norm(dim=-1), torch.ones(1, 200))
    raw = fixed_data(Features(50, 0.03), 200, rng(), normalise=False).points
    assert torch.allclose(unit_norm(raw), points)
    with pytest.raises(ConfigError, match=r"taken whole\. Got: 100\. Expected: 200"):
        data.sample(100, rng())
    assert unit_norm(torch.zeros(1, 1, 3)).tolist() == [[[0, 0, 0]]]
    assert FixedData(torch.zeros(2, 3, 4)).n_features == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Features(4, 1.5), "Densities are probabilities"),
        (lambda: Features(4, [0.1, 0.2, 0.3], 2), r"do not fit.*\[2\] \(one for each instance\)"),
        (lambda: Features(0, 0.5), "must be positive"),
        (lambda: Features(5, 0.5, firing=Together(2)), "Groups of 2 must fill"),
        (lambda: Features(4, 0.6, firing=Apart(2)), r"add up to 1 at most\. Got: 1\.2"),
        (lambda: Hierarchy((-1, 2, 0)), "parent of feature 1"),
        (lambda: Features(2, 0.5, firing=Hierarchy((-1,))), "a parent for each"),
        (lambda: Features(2, torch.tensor([[0.1, 0.2]]), firing=Hierarchy((-1, 0))), "more often than its parent"),
        (lambda: Copula(torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "no negative eigenvalues"),
        (lambda: Copula(torch.tensor([[1.0, 0.5], [0.1, 1.0]])), "square and symmetric"),
        (lambda: Copula(2 * torch.eye(2)), "diagonal"),
        (lambda: Features(3, 0.5, firing=Copula(torch.eye(2))), "must fit the features"),
        (lambda: Features(3, 0.5, firing=Blocks(((Independent(), 2),))), "must hold all features"),
        (lambda: Features(4, 0.7, firing=Blocks(((Independent(), 2), (Apart(), 2)))), "add up to 1"),
        (lambda: zipf(3, highest=2), "highest density"),
        (lambda: spaced(0, 1, 3), "positive ends"),
        (lambda: fixed_data(Features(2, 0.0), 5, rng()), "too rarely"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value) if isinstance(value, str) else "",
)
def test_what_cannot_be(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
