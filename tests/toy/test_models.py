"""Toy models and their trainer, held against plain loops, closed forms and what training must do."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from microtome.common.errors import ConfigError, InputError
from microtome.toy import Features, FixedData, ToyConfig, ToyModel, TrainToyConfig, train_toy
from microtome.toy.trials import trials

SHAPES: dict[str, dict[str, Any]] = {
    "linear": {"output": "linear"},
    "relu output": {},
    "relu hidden": {"hidden": "relu"},
    "absolute value": {"hidden": "relu", "tied": False, "target": "absolute"},
}
SMALL: dict[str, Any] = {"n_features": 5, "n_hidden": 3, "n_instances": 2}


def made(name: str, seed: int = 0) -> ToyModel:
    model = ToyModel(ToyConfig(**SMALL, **SHAPES[name], seed=seed))
    torch.nn.init.normal_(model.b, generator=torch.Generator().manual_seed(seed))
    return model


def batch(n: int = 7, seed: int = 1) -> Tensor:
    return 2 * torch.rand(2, n, 5, generator=torch.Generator().manual_seed(seed)) - 1


def plain(model: ToyModel, name: str, i: int, x: list[float]) -> list[float]:
    """One input through one instance, number by number."""
    w_in, b = model.W_in[i].tolist(), model.b[i].tolist()
    w_out = (
        model.W_out[i].tolist() if name == "absolute value" else [list(column) for column in zip(*w_in, strict=True)]
    )
    h = [sum(w * v for w, v in zip(row, x, strict=True)) for row in w_in]
    if name in ("relu hidden", "absolute value"):
        h = [max(v, 0.0) for v in h]
    y = [sum(w * v for w, v in zip(row, h, strict=True)) + bias for row, bias in zip(w_out, b, strict=True)]
    return y if name == "linear" else [max(v, 0.0) for v in y]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_equals_the_plain_loop(name: str) -> None:
    model, x = made(name), batch()
    expected = [[plain(model, name, i, row) for row in x[i].tolist()] for i in range(2)]
    assert torch.allclose(model(x), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("importance", [None, [1.0, 0.5, 0.25, 2.0, 0.0], "per instance"], ids=str)
def test_loss_weighs_squared_errors_by_importance(name: str, importance: Any) -> None:
    model, x = made(name), batch()
    weights = (
        torch.rand(2, 5, generator=torch.Generator().manual_seed(5)) if importance == "per instance" else importance
    )
    tensor = None if weights is None else torch.as_tensor(weights).reshape(-1, 5)
    loss = model.loss(x, tensor).detach()
    for i in range(2):
        total = 0.0
        for row in x[i].tolist():
            wanted = [abs(v) for v in row] if name == "absolute value" else row
            for j, value in enumerate(plain(model, name, i, row)):
                share = 1.0 if tensor is None else float(tensor[i % len(tensor), j])
                total += share * (value - wanted[j]) ** 2
        assert float(loss[i]) == pytest.approx(total / (7 * 5), rel=1e-4)


def test_gradients_equal_finite_differences() -> None:
    model = made("absolute value").double()
    x, rows = batch().double(), torch.rand(2, 5, dtype=torch.float64)

    def loss(w_in: Tensor, w_out: Tensor, b: Tensor) -> Tensor:
        named = {"W_in": w_in, "W_untied": w_out, "b": b}
        out = torch.func.functional_call(model, named, (x,))
        error: Tensor = ((out - x.abs()).square() * rows[:, None]).mean()
        return error

    assert model.W_untied is not None
    arguments = [p.detach().clone().requires_grad_() for p in (model.W_in, model.W_untied, model.b)]
    assert torch.autograd.gradcheck(loss, arguments, atol=1e-6)


def test_tied_models_have_one_matrix_and_untied_ones_two() -> None:
    assert {name for name, _ in made("relu output").named_parameters()} == {"W_in", "b"}
    assert {name for name, _ in made("absolute value").named_parameters()} == {"W_in", "W_untied", "b"}


def test_the_start_is_xaviers_and_the_seed_decides() -> None:
    config = ToyConfig(n_features=200, n_hidden=100, n_instances=4, seed=1)
    W = ToyModel(config).W_in
    assert float(W.std().detach()) == pytest.approx(math.sqrt(2 / 300), rel=0.02)
    assert torch.equal(W, ToyModel(config).W_in)
    assert not torch.equal(W, ToyModel(replace(config, seed=2)).W_in)


@pytest.mark.parametrize("name", SHAPES)
def test_turning_a_linear_hidden_space_changes_nothing(name: str) -> None:
    model, x = made(name), batch()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2))).Q
    change = float((model.rotated(turn)(x) - model(x)).abs().max().detach())
    if model.config.hidden == "linear":
        assert change < 1e-5
    else:
        assert change > 0.05


def test_taken_instances_are_copies() -> None:
    model, x = made("absolute value"), batch()
    second = model.take([1])
    assert torch.equal(second(x[1:]), model(x)[1:])
    with torch.no_grad():
        second.b.add_(1)
    assert not torch.equal(second.b[0], model.b[1])


def test_a_wrong_batch_or_config_is_told() -> None:
    with pytest.raises(InputError, match=r"Got: \[2, 7, 4\]\. Expected: \[2, 'batch', 5\]"):
        made("linear")(torch.zeros(2, 7, 4))
    with pytest.raises(ConfigError, match="must be positive"):
        ToyConfig(n_features=5, n_hidden=0)


# ---- training -----------------------------------------------------------------------------------------------------------

QUICK = TrainToyConfig(n_steps=30, batch_size=64, keep_every=10)


@pytest.mark.parametrize(
    "config",
    [QUICK, replace(QUICK, optimiser="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=5, lr=1e-2)],
    ids=["adam", "adamw"],
)
def test_one_instance_trains_as_it_would_alone(config: TrainToyConfig) -> None:
    """Held against torch's own optimiser on one instance at a time, with the rate of each step worked out by hand."""
    data = FixedData(batch(64).abs())
    model = made("relu output")
    alone = [model.take([i]) for i in range(2)]
    importance = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.6], [1.0, 1, 1, 1, 1]])
    history = train_toy(model, data, config, importance=importance)
    for i, one in enumerate(alone):
        kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
        optimiser = kind(one.parameters(), weight_decay=config.weight_decay)
        for step in range(30):
            rate = config.lr
            if config.optimiser == "adamw":
                rate *= (step + 1) / 6 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 25)) / 2
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            one.loss(data.points[i : i + 1], importance[i : i + 1]).sum().backward()
            optimiser.step()
        assert torch.allclose(one.W_in[0], model.W_in[i], atol=1e-5)
        assert torch.allclose(one.b[0], model.b[i], atol=1e-5)
    assert history.steps == (10, 20, 30)
    assert history.losses.shape == (3, 2)
    assert (history.losses[-1] < history.losses[0]).all()


def test_the_linear_model_finds_the_principal_components() -> None:
    """Trained on dense features, it keeps the m most important ones: the loss is what the others' variance is worth."""
    importance = [1.0, 0.8, 0.5, 0.3, 0.1]
    model = ToyModel(ToyConfig(n_features=5, n_hidden=2, output="linear"))
    train_toy(model, Features(5, 1.0), TrainToyConfig(n_steps=3000, batch_size=512, lr=3e-3), importance=importance)
    with torch.no_grad():
        loss = float(
            model.loss(Features(5, 1.0).sample(50_000, torch.Generator().manual_seed(0)), torch.tensor([importance]))
        )
    assert loss == pytest.approx((0.5 + 0.3 + 0.1) / 12 / 5, rel=0.05)
    norms = model.W_in[0].square().sum(dim=0)
    assert torch.allclose(norms, torch.tensor([1.0, 1, 0, 0, 0]), atol=0.1)


def test_the_same_seed_gives_the_same_model() -> None:
    found = []
    for seed in (0, 0, 1):
        model = made("relu output")
        train_toy(model, Features(5, 0.5, 2), replace(QUICK, seed=seed))
        found.append(model.W_in.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_does_not_fit_is_told() -> None:
    model = made("relu output")
    with pytest.raises(ConfigError, match="features do not fit the model"):
        train_toy(model, Features(5, 0.5, 3), QUICK)
    with pytest.raises(ConfigError, match="importances do not fit"):
        train_toy(model, Features(5, 0.5, 2), QUICK, importance=[1.0, 2.0])
    with torch.no_grad():
        model.b[1, 0] = math.nan
    with pytest.raises(InputError, match=r"no number in instances \[1\]"):
        train_toy(model, Features(5, 0.5, 2), QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_steps": 0},
        {"lr": 0.0},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"warmup_steps": 10_000},
        {"weight_decay": 0.1},
        {"weight_decay": -0.1, "optimiser": "adamw"},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainToyConfig(**wrong)


def test_of_several_starts_the_lowest_loss_is_chosen() -> None:
    shape = ToyConfig(n_features=3, n_hidden=1)
    done = trials(shape, Features(3, [0.2, 0.05], 2), 4, replace(QUICK, n_steps=200, lr=1e-2), importance=[1, 0.5, 0.1])
    assert done.losses.shape == (2, 4)
    assert done.W.shape == (2, 4, 1, 3)
    assert done.chosen.tolist() == [min(range(4), key=lambda i: float(done.losses[s, i])) for s in range(2)]
    for setting in range(2):
        assert torch.equal(done.best.W_in[setting], done.W[setting, done.chosen[setting]])
    # The losses are each model's own, on inputs that a setting's starts share.
    x = Features(3, 0.2).sample(40_000, torch.Generator().manual_seed(3))
    with torch.no_grad():
        again = [float(done.model.take([i]).loss(x, torch.tensor([[1, 0.5, 0.1]]))) for i in range(4)]
    assert done.losses[0].tolist() == pytest.approx(again, rel=0.1)
