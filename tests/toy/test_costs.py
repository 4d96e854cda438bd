"""Attacks, data-set double descent and synthetic data, held against brute force and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from microtome.common.errors import ConfigError, InputError
from microtome.toy import (
    DoubleDescentConfig,
    Features,
    SyntheticData,
    Together,
    ToyConfig,
    ToyModel,
    double_descent,
    polygon,
    recovery,
    vulnerability,
    zipf,
)
from microtome.toy.adversarial import attack_directions
from microtome.toy.descent import interior_maximum, weighted_dimensionality

# ---- attacks ------------------------------------------------------------------------------------------------------------


def model_of(W: Tensor, bias: float = 0.0, **shape: str) -> ToyModel:
    model = ToyModel(ToyConfig(n_features=W.shape[1], n_hidden=W.shape[0], **shape))  # type: ignore[arg-type]
    with torch.no_grad():
        model.W_in.copy_(W[None])
        model.b.fill_(bias)
    return model


def test_a_model_that_returns_its_input_is_harmed_by_as_much_as_is_added() -> None:
    found = vulnerability(model_of(torch.eye(3), output="linear"), Features(3, 0.5))
    assert found.clean.item() == pytest.approx(0, abs=1e-12)
    assert found.harm.item() == pytest.approx(1, rel=1e-4)


def test_directions_are_those_to_which_an_output_is_most_sensitive() -> None:
    """Against ten thousand random directions for each output of a pentagon."""
    model = model_of(polygon(5).float())
    directions = attack_directions(model)[0]
    assert torch.allclose(directions.norm(dim=1), torch.ones(5))
    x, step = torch.full((1, 1, 5), 0.5), 1e-2
    rng = torch.Generator().manual_seed(0)
    tried = torch.nn.functional.normalize(torch.randn(10_000, 5, generator=rng), dim=1)
    with torch.no_grad():
        linear = model_of(polygon(5).float(), output="linear")
        base = linear(x)[0, 0]
        best = (linear(x + step * directions[None])[0] - base).diagonal()
        others = (linear(x + step * tried[None])[0] - base).amax(dim=0)
    assert (best >= others).all()
    assert (others > 0.8 * best).all()


def test_the_worst_of_the_attacks_counts() -> None:
    W = torch.tensor([[1.0, -0.9, 0.2], [0.1, 0.3, 1.0]])
    model, features = model_of(W, bias=-0.05), Features(3, 0.6)
    found = vulnerability(model, features, share=0.2, n_inputs=40, seed=3)
    from microtome.common.device import generator

    x = features.sample(40, generator(3, "attacked inputs"))[0]
    size = 0.2 * float(x.norm(dim=1).mean())
    rows = (W.T @ W).tolist()

    def error(given: Tensor, meant: Tensor) -> float:
        with torch.no_grad():
            return float((model(given[None, None])[0, 0] - meant).square().sum())

    total = 0.0
    for one in x:
        steps = [torch.tensor(r) * size / math.hypot(*r) for r in rows]
        total += max(error(one, one), *(error(one + sign * s, one) for s in steps for sign in (1, -1)))
    assert found.attacked.item() == pytest.approx(total / 40, rel=1e-4)
    assert found.epsilon.item() == pytest.approx(size, rel=1e-5)


def test_superposition_is_more_vulnerable_than_an_orthogonal_model() -> None:
    pairs = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    features = Features(4, 0.3)
    apart = vulnerability(model_of(torch.eye(4)), features).harm.item()
    shared = vulnerability(model_of(pairs), features).harm.item()
    assert apart == pytest.approx(1, rel=0.01)
    assert shared > 1.5 * apart


def test_a_hidden_relu_has_no_such_attack() -> None:
    with pytest.raises(ConfigError, match="linear hidden layer"):
        vulnerability(ToyModel(ToyConfig(n_features=3, n_hidden=2, hidden="relu")), Features(3, 0.5))
    with pytest.raises(ConfigError, match="must be positive"):
        vulnerability(model_of(torch.eye(3)), Features(3, 0.5), share=0)


# ---- double descent -----------------------------------------------------------------------------------------------------


def test_few_points_are_stored_as_points() -> None:
    config = DoubleDescentConfig(
        n_features=60, density=0.1, sizes=(4,), seeds=2, n_steps=1500, warmup_steps=100, lr=5e-3, n_test=500
    )
    [found] = double_descent(config)
    assert found.train_loss < 0.05
    assert found.test_loss > 0.5
    assert found.data_dimensionality > 0.4 > found.feature_dimensionality
    assert found.hidden.shape == (2, 4)
    assert found.W.shape == (2, 60)


def test_polygons_have_two_shares_of_n_whatever_lies_near_zero() -> None:
    columns = torch.cat(
        [3 * polygon(5).float(), 1e-3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0))], 1
    )
    assert weighted_dimensionality(columns) == pytest.approx(2 / 5, rel=1e-3)
    assert weighted_dimensionality(torch.zeros(2, 3)) == 0


def test_a_bump_is_inside() -> None:
    assert interior_maximum([1, 2, 1.5])
    assert not interior_maximum([2, 1, 1.5])
    assert not interior_maximum([1, 1.5, 2])


def test_data_sets_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="data sets"):
        DoubleDescentConfig(sizes=())
    with pytest.raises(ConfigError, match="warmup_steps"):
        DoubleDescentConfig(n_steps=100)


# ---- synthetic data -----------------------------------------------------------------------------------------------------


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_activations_are_the_codes_along_the_directions() -> None:
    data = SyntheticData.make(12, 6, density=zipf(12), firing=Together(3), seed=1)
    activations, codes = data.sample(500, rng())
    assert activations.shape == (500, 6)
    assert torch.allclose(data.directions.norm(dim=1), torch.ones(12))
    by_hand = sum(codes[:, [i]] * data.directions[[i]] for i in range(12))
    assert torch.allclose(activations, torch.as_tensor(by_hand), atol=1e-5)
    fires = codes > 0
    assert not (fires[:, 1] & ~fires[:, 0]).any()  # the rarer of a group fires within the more frequent
    assert torch.equal(data.sample(500, rng())[0], activations)
    assert not torch.equal(SyntheticData.make(12, 6, density=0.1, seed=2).directions, data.directions)


def test_frequencies_and_noise() -> None:
    frequencies = zipf(20, highest=0.5)
    data = SyntheticData.make(20, 10, density=frequencies, noise=0.3)
    activations, codes = data.sample(50_000, rng())
    assert ((codes > 0).float().mean(dim=0) - frequencies).abs().max() < 0.01
    rest = activations - codes @ data.directions
    assert float(rest.std()) == pytest.approx(0.3, rel=0.02)


def test_recovery_is_the_nearest_direction_of_the_right_sign() -> None:
    truth = torch.eye(3)
    found = recovery(truth, torch.tensor([[5.0, 0, 0], [0, -1, 0], [0, 1, 1]]))
    assert found.best.tolist() == pytest.approx([1, 0.7071, 0.7071], abs=1e-4)
    assert found.found.tolist() == [True, False, False]
    assert not found.full
    stacked = recovery(truth.expand(2, 3, 3), torch.stack([truth, -truth]))
    assert stacked.full.tolist() == [True, False]
    assert stacked.mean_max_cosine.tolist() == pytest.approx([1, 0])
    with pytest.raises(InputError, match="differ in length"):
        recovery(truth, torch.eye(4))


def test_synthetic_data_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="a direction for each feature"):
        SyntheticData(torch.eye(3), Features(4, 0.1))
    with pytest.raises(ConfigError, match="noise"):
        SyntheticData(torch.eye(3), Features(3, 0.1), noise=-1)
    with pytest.raises(ConfigError, match="must be positive"):
        SyntheticData.make(0, 3, density=0.1)
