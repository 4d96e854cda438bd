"""`toy_models_of_superposition`: the whole smoke preset, and the readings behind its claims on weights that are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import microtome as mt
from microtome.common.errors import ConfigError
from microtome.replications.toy_computation import Neurons, shares
from microtome.replications.toy_config import ToyModelsConfig
from microtome.replications.toy_descent import _claims
from microtome.replications.toy_models_of_superposition import REPLICATION
from microtome.toy import DataSetSize, polygon
from microtome.views import Report

# What short trainings reach as well; the rest needs the full preset's steps.
REACHED = [
    *("sparse", "linear", "relu", "relu_dense", "rotation", "half_0.3", "bounds", "sum", "ideal"),
    *("vulnerable", "vulnerable_tracks", "border_0.5_0.55", "border_0.1_0.2", "correlated_marginals"),
    *("correlated_together", "anticorrelated_marginals", "anticorrelated_together", "few_points", "polysemantic"),
    *("resampled_bias", "resampled_live", "resampled_moments", "straight_through"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return mt.replicate("toy_models_of_superposition", preset="smoke", out=folder), folder


@pytest.mark.slow
def test_the_smoke_preset(report: tuple[Report, Path]) -> None:
    found, folder = report
    assert [name for name in REACHED if not found[name].passed] == []
    assert found.provenance["model"] == "made here"
    assert len(found.sections) == 11
    assert len(list((folder / "figures").glob("*.svg"))) == len(found.figures)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["claims"] == [
        c.data() for c in found.claims
    ]


@pytest.mark.slow
def test_the_report_shows_what_each_claim_is_about(report: tuple[Report, Path]) -> None:
    titles = {figure.title for figure in report[0].figures}
    assert {
        "Five features of falling importance in two dimensions",
        "Dimensions per feature: a plateau at ½",
        "The last of 2 features in 1 dimension",
        "The last of 3 features in 2 dimensions",
        "Adversarial vulnerability and features per dimension",
        "Data-set double descent: 40 features in 2 dimensions",
        "True and learned directions: ReLU, resampled",
    } <= titles


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(report: tuple[Report, Path]) -> None:
    from microtome.replications.toy_basics import pentagons

    again, other = (pentagons(ToyModelsConfig(**{**REPLICATION.smoke.__dict__, "seed": seed})) for seed in (0, 1))
    assert again.claims[0] == report[0]["pentagon"]
    assert again.claims[0].note != other.claims[0].note


# ---- readings -----------------------------------------------------------------------------------------------------------


def test_shares_of_neurons() -> None:
    W = torch.tensor([[2.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert shares(W).tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_neurons_of_the_absolute_value() -> None:
    """Features 0 (both signs) and 1 (one sign, and its other neuron has a negative output); a dead neuron; a mixed one."""
    w_in = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [0.0, -1.0], [0.01, 0.01], [0.7, 0.7]])
    w_out = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.01, 0.5], [0.0, 0.0, 1.0, -1.0, 0.01, 0.5]])
    found = Neurons(w_in, w_out)
    assert found.live == 5
    assert found.features == 2
    assert found.paired == 0.5
    assert found.clear == pytest.approx(4 / 5)
    assert found.least == pytest.approx(0.5)
    assert found.positive == pytest.approx(4 / 5)
    nothing = Neurons(torch.zeros(3, 2), torch.zeros(2, 3))
    assert (nothing.live, nothing.least, nothing.paired) == (0, 0.0, 0.0)


def row(n: int, test_loss: float, features: torch.Tensor, points: torch.Tensor) -> DataSetSize:
    return DataSetSize(n, 0.0, test_loss, features, points)


def test_double_descent_claims_follow_the_signs() -> None:
    tight, loose = polygon(3).float(), polygon(40).float()
    rows = [row(5, 1.0, loose, tight), row(50, 1.2, loose, loose), row(500, 0.9, tight, loose)]
    assert [c.passed for c in _claims(rows)] == [True, True, True]
    flipped = [row(5, 1.0, tight, loose), row(500, 1.1, loose, tight)]
    assert [c.passed for c in _claims(flipped)] == [False, False, False]
    assert _claims(rows[1:])[0].passed is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": 0},
        {"grid": 2},
        {"geometry_hidden": 100},
        {"coefficient": -1.0},
        {"descent_sizes": ()},
        {"n_steps": 0},
        {"dictionary_steps": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        mt.replicate("toy_models_of_superposition", preset="smoke", **wrong)
