"""Dimensionality and shapes: ideal figures to 1e-6, bounds for any matrix, and plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microtome.common.errors import ConfigError, InputError
from microtome.toy import (
    STICKY,
    angle_gaps,
    dimensionality,
    dimensions_per_feature,
    groups,
    interference,
    n_represented,
    polygon,
    shape,
    simplex,
    square_antiprism,
)


def plain_dimensionality(W: list[list[float]], i: int) -> float:
    """The paper's formula, number by number; `W` is a list of feature vectors."""
    norm = math.sqrt(sum(v * v for v in W[i]))
    if norm == 0:
        return 0.0
    unit = [v / norm for v in W[i]]
    return norm**2 / sum(sum(a * b for a, b in zip(unit, other, strict=True)) ** 2 for other in W)


def block(*parts: Tensor) -> Tensor:
    whole: Tensor = torch.block_diag(*parts)
    return whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [("digon", 1 / 2), ("triangle", 2 / 3), ("pentagon", 2 / 5), ("square antiprism", 3 / 8), ("tetrahedron", 3 / 4)],
)
def test_ideal_shapes(name: str, expected: float) -> None:
    W = shape(name)
    assert torch.allclose(W.norm(dim=0), torch.ones(W.shape[1], dtype=W.dtype))
    assert (dimensionality(W) - expected).abs().max() < 1e-6
    assert STICKY[name] == pytest.approx(expected)
    assert float(dimensions_per_feature(W)) == pytest.approx(expected)
    # Neither scale nor position in a larger space matters, nor what lies at right angles.
    turned = torch.linalg.qr(torch.randn(9, 9, dtype=W.dtype, generator=torch.Generator().manual_seed(0))).Q
    placed = turned[:, : W.shape[0] + 1] @ block(1.7 * W, torch.ones(1, 1, dtype=W.dtype))
    assert (dimensionality(placed)[:-1] - expected).abs().max() < 1e-6
    assert float(dimensionality(placed)[-1]) == pytest.approx(1)


def test_corners_are_where_they_should_be() -> None:
    assert (simplex(4).T @ simplex(4) + 1 / 3)[~torch.eye(4, dtype=torch.bool)].abs().max() < 1e-9
    assert angle_gaps(polygon(5).float()).tolist() == pytest.approx([72] * 5, abs=1e-3)
    corners = square_antiprism()
    assert (corners @ corners.T - 8 / 3 * torch.eye(3, dtype=torch.float64)).abs().max() < 1e-9  # a tight frame
    assert sorted(corners[2].sign().tolist()) == [-1] * 4 + [1] * 4
    with pytest.raises(ConfigError, match="Did you mean 'pentagon'"):
        shape("pentagram")


MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from([1e-3, 1.0, 30.0]))


@given(MATRICES)
@settings(max_examples=100, deadline=None)
def test_dimensionalities_of_any_matrix_are_shares_that_fit_the_space(case: tuple[int, int, int, float]) -> None:
    m, n, seed, scale = case
    rng = torch.Generator().manual_seed(seed)
    W = scale * torch.randn(m, n, generator=rng, dtype=torch.float64) * torch.rand(n, generator=rng) ** 4
    W[:, torch.rand(n, generator=rng) < 0.2] = 0
    D = dimensionality(W)
    assert D.min() >= 0
    assert D.max() <= 1 + 1e-9
    rank = int(torch.linalg.matrix_rank(W))
    assert float(D.sum()) <= rank + 1e-9
    assert rank <= m
    expected = [plain_dimensionality(W.T.tolist(), i) if float(W[:, i].norm()) > 1e-5 else None for i in range(n)]
    for value, wanted in zip(D.tolist(), expected, strict=True):
        if wanted is not None:
            assert value == pytest.approx(wanted, rel=1e-6)


def test_interference_is_what_others_put_into_a_direction() -> None:
    W = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 3.0]])
    assert interference(W).tolist() == pytest.approx([1.0, 4.0, 0.0])
    assert n_represented(W).item() == 3
    assert n_represented(0.4 * W).item() == 2
    batched = torch.stack([W, torch.zeros_like(W)])
    assert interference(batched)[1].tolist() == [0, 0, 0]
    assert dimensionality(batched)[1].tolist() == [0, 0, 0]


def test_gaps_go_all_the_way_round() -> None:
    def at(*degrees: float) -> Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()])

    assert sorted(angle_gaps(at(0, 90, -100)).tolist()) == pytest.approx([90, 100, 170], abs=1e-3)
    assert angle_gaps(at(10)).tolist() == []
    faint = at(0, 180, 90) * torch.tensor([1.0, 1.0, 0.3])
    assert angle_gaps(faint).tolist() == pytest.approx([180, 180], abs=1e-3)
    with pytest.raises(InputError, match="two hidden dimensions"):
        angle_gaps(torch.zeros(3, 4))


def test_groups_are_the_shapes_of_a_matrix() -> None:
    parts = [torch.ones(1, 1, dtype=torch.float64), simplex(2), polygon(5), simplex(4)]
    W = block(*parts)
    assert [g.name for g in groups(W)] == ["5 in 2", "4 in 3", "2 in 1", "1 in 1"]
    assert groups(W)[0].features == (3, 4, 5, 6, 7)
    # An order of features in which groups are mixed, and one that is too short to be represented.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert [g.name for g in groups(W[:, order])] == ["5 in 2", "4 in 3", "2 in 1", "1 in 1"]
    W[:, 0] *= 0.5
    assert [g.name for g in groups(W)] == ["5 in 2", "4 in 3", "2 in 1"]
    assert groups(torch.zeros(2, 3)) == []
