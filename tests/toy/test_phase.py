"""The phase diagram's border against numeric integration, and trained models on both sides of it."""

import pytest
import torch

from microtome.common.errors import ConfigError
from microtome.toy import ToyConfig, ToyModel, TrainToyConfig, boundary, phase_diagram
from microtome.toy.phase import PHASES, PhaseDiagram, antipodal_loss, dedicated_loss


def integrated(model: ToyModel, density: float, ratio: float, points: int = 400) -> float:
    """Σ_i I_i E(x_i − x'_i)² of n = 2 features by the midpoint rule: over none, one or both firing, and their magnitudes."""
    grid = (torch.arange(points).float() + 0.5) / points
    zero, importance = torch.zeros_like(grid), torch.tensor([1.0, ratio])
    one = [torch.stack([grid, zero], dim=1), torch.stack([zero, grid], dim=1)]
    cases = [(torch.zeros(1, 2), (1 - density) ** 2), *((x, density * (1 - density)) for x in one)]
    cases.append((torch.cartesian_prod(grid, grid), density**2))
    with torch.no_grad():
        return sum(float(((model(x[None])[0] - x).square() * importance).sum(1).mean()) * share for x, share in cases)


def fixed(W: list[float], b: list[float]) -> ToyModel:
    model = ToyModel(ToyConfig(n_features=2, n_hidden=1))
    with torch.no_grad():
        model.W_in.copy_(torch.tensor([[W]]))
        model.b.copy_(torch.tensor([b]))
    return model


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_losses_in_closed_form_equal_the_integral(density: float, ratio: float) -> None:
    assert antipodal_loss(density, ratio) == pytest.approx(integrated(fixed([1, -1], [0, 0]), density, ratio), abs=1e-5)
    dropped = fixed([1, 0], [0, density / 2])
    assert dedicated_loss(density, ratio) == pytest.approx(integrated(dropped, density, ratio), abs=1e-5)
    for other in (-0.02, 0.02):  # the mean is the best that a dropped feature's output can be
        assert integrated(fixed([1, 0], [0, density / 2 + other]), density, ratio) > dedicated_loss(density, ratio)


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 0.571), (0.5, 0.444), (0.1, 0.160), (2.0, 0.444), (10.0, 0.160)])
def test_the_border_is_where_the_integrals_cross(ratio: float, expected: float) -> None:
    assert boundary(ratio) == pytest.approx(expected, abs=1e-3)

    def gain(density: float) -> float:
        """What superposition saves over the better of the two ways to drop a feature."""
        b = density / 2
        apart = min(
            integrated(fixed([1, 0], [0, b]), density, ratio), integrated(fixed([0, 1], [b, 0]), density, ratio)
        )
        return apart - integrated(fixed([1, -1], [0, 0]), density, ratio)

    low, high = 0.01, 0.99
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    assert boundary(ratio) == pytest.approx(low, abs=1e-3)


def test_a_ratio_is_positive() -> None:
    with pytest.raises(ConfigError, match="positive"):
        boundary(0)


def test_phases_are_read_from_the_last_feature() -> None:
    W = torch.tensor([[[[1.0, 0.0]], [[0.9, -0.9]], [[0.0, 1.0]], [[0.9, 0.9]]]])
    diagram = PhaseDiagram((0.1,), (0.1, 0.5, 1.0, 2.0), W, torch.zeros(1, 4, 1))
    assert [PHASES[i] for i in diagram.phases[0]] == ["ignored", "superposition", "dedicated", "superposition"]
    assert diagram.antipodal[0].tolist() == [False, True, False, False]
    assert diagram.norms[0].tolist() == pytest.approx([0, 0.81, 1, 0.81])


@pytest.mark.slow
def test_trained_models_lie_on_the_right_sides() -> None:
    train = TrainToyConfig(n_steps=2500, batch_size=512, lr=3e-3)
    diagram = phase_diagram((0.7, 0.1), (0.5, 1.0), seeds=6, train=train)
    assert diagram.antipodal.tolist() == [[False, False], [True, True]] or diagram.antipodal[0, 0].item() is False
    assert diagram.antipodal[1].tolist() == [True, True]
    assert diagram.losses.shape == (2, 2, 6)
    assert PHASES[int(diagram.phases[0, 0])] == "ignored"


def test_three_features_in_two_dimensions_are_in_order() -> None:
    diagram = phase_diagram(
        (1.0, 0.5, 0.2), (0.5, 2.0), n_hidden=2, seeds=2, train=TrainToyConfig(n_steps=3, batch_size=8)
    )
    assert diagram.W.shape == (3, 2, 2, 3)
    assert diagram.phases.shape == (3, 2)
    with pytest.raises(ConfigError, match="needs densities"):
        phase_diagram((), (1.0,))
