"""`microtome bench train` at tiny sizes through the command, and what its figures mean. No speed is asserted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import train as train_benchmark
from benchmarks.common import installed
from benchmarks.train_fvu import Point, curve, fvu_at, next_coefficient
from benchmarks.train_sides import Config, Microtome, Task
from safetensors.torch import load_file

from microtome.common.errors import ConfigError
from microtome.dictionary import Dictionary

from .test_bench import bench, quotient

TRAIN = [
    *("layer=1", "context=24", "rows=512", "held_out=64", "d_sae=128", "k=4", "batch_size=64", "steps=6"),
    *("steps_per_turn=2", "warmup_steps=2", "device=cpu"),
]


def test_train(tiny_inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN, "architectures=topk,batchtopk", "sides=saelens_fp32", "many=2", f"rows_file={tmp_path / 'rows'}"]
    result = bench(capsys, "train", *tiny_inputs, *words)
    figures = result["figures"]
    speed = figures["steps_per_second"]
    ours = ["topk/microtome", "batchtopk/microtome", "many/microtome_given_batches", "many/microtome_many"]
    theirs = ["topk/saelens_fp32", "batchtopk/saelens_fp32"] if installed("sae_lens") else []
    assert set(speed) == {*ours, *theirs}
    for name in speed:
        first, second = figures["seconds"][name]
        assert speed[name] == pytest.approx(2 / ((first + second) / 2))
        assert figures["activations_per_second"][name] == pytest.approx(64 * speed[name])
        assert 0 < figures["start_bytes"][name][0] <= figures["peak_bytes"][name][0]
        assert 0 < figures["fvu"][name][0] < 1
        assert figures["sinks"][name] == [0]
        assert figures["fvu_without_sinks"][name] == pytest.approx(figures["fvu"][name])
        assert figures["l0"][name][0] == pytest.approx(4, abs=0.1)
    assert load_file(tmp_path / "rows")["held_out"].shape == (64, 32)
    ratios = result["ratios"]
    for architecture in ("topk", "batchtopk"):
        expected = quotient(speed, f"{architecture}/microtome", f"{architecture}/saelens_fp32")
        assert ratios[f"{architecture}_vs_saelens"] == expected
        if installed("sae_lens"):
            fvu = [figures["fvu"][f"{architecture}/{side}"][0] for side in ("microtome", "saelens_fp32")]
            assert ratios[f"{architecture}_fvu_vs_saelens"] == pytest.approx(fvu[0] / fvu[1])
    assert ratios["relu_vs_saelens"] is ratios["jumprelu_vs_saelens"] is None
    assert ratios["cost_of_one_of_many_vs_alone"] == speed[ours[2]] / (2 * speed[ours[3]])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu", "jumprelu"])
def test_what_a_side_says_of_held_out_rows_is_what_its_dictionary_does(architecture: str) -> None:
    config = Config(rows=256, d_sae=64, k=4, batch_size=64, steps=4, steps_per_turn=2, device="cpu")
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    side = Microtome(Task(config, architecture, 3), rows)
    with side.held:
        side.step()
    reconstruction, fired = side.reconstruct(rows[:64])
    sae = side.trainer.groups[0].export(0, side.trainer.scales, {"model_name": "bench"})
    assert isinstance(sae, Dictionary)
    codes = sae.encode(rows[:64]).to_dense()
    if architecture == "batchtopk":
        pre = (rows[:64] - sae.b_dec) @ sae.W_enc + sae.b_enc
        codes = pre * (pre >= pre.flatten().sort().values[-4 * 64])
    assert fired == int((codes > 0).sum())
    torch.testing.assert_close(reconstruction, codes @ sae.W_dec + sae.b_dec)
    assert side.n_dead() == 0


def test_ratios_of_train_are_to_the_fastest_setting(tmp_path: Path) -> None:
    """Two seeds; of SAELens the second setting is the fastest, and its L0 with the second seed is out of reach."""
    config = Config(architectures="topk", seeds=2, seed=5)
    speed = {"topk/microtome": 6.0, "topk/saelens_fp32": 1.0, "topk/saelens_autocast": 2.0, "topk/sparsify_fp32": 3.0}
    ratios = train_benchmark._speed_ratios(config, speed)
    assert ratios == {
        "topk_vs_saelens": 3.0,
        "batchtopk_vs_saelens": None,
        "relu_vs_saelens": None,
        "jumprelu_vs_saelens": None,
        "topk_vs_sparsify": 2.0,
    }
    fvu = {"topk/microtome": (0.1, 0.3), "topk/saelens_fp32": (9.0, 9.0), "topk/saelens_autocast": (0.2, 0.2)}
    ends = {
        name: [{"fvu": value, "fvu_without_sinks": value / 2, "l0": 4.0} for value in fvu.get(name, (0.4, 0.4))]
        for name in speed
    }
    ends["topk/saelens_autocast"][1]["l0"] = 3.9
    found = train_benchmark._compare_fvu(config, train_benchmark._fastest(config, speed), ends, tmp_path)
    assert found.by_seed["fvu"] == {
        ("topk", "saelens"): [0.5, None],
        ("topk", "sparsify"): [pytest.approx(0.25), pytest.approx(0.75)],
    }
    assert found.ratios() == {
        "topk_fvu_vs_saelens": None,
        "topk_fvu_without_sinks_vs_saelens": None,
        "topk_fvu_vs_sparsify": pytest.approx(0.5),
        "topk_fvu_without_sinks_vs_sparsify": pytest.approx(0.5),
    }
    assert found.figures()["fvu_ratio"]["topk/saelens"]["seeds"] == [0.5]
    assert found.notes == ["topk, seed 6: saelens ended at L0 3.9, ours at 4.0: FVU cannot be compared"]


@pytest.mark.parametrize("l0", [0.0, float("nan")])
def test_a_peer_that_has_died_or_diverged_is_not_reached(l0: float) -> None:
    def train(_coefficient: float) -> Point:
        raise AssertionError("nothing is trained")

    first = Point(1.0, 40.0, 0.3, 0.4)
    assert curve(first, l0, train, most=4) == [first]
    assert fvu_at([first], l0, "fvu") is None


def test_fvu_lies_on_a_line_in_logarithms_between_two_l0() -> None:
    points = [Point(1.0, 100.0, 0.1, 0.2), Point(2.0, 25.0, 0.4, 0.3), Point(9.0, 2.0, 0.9, 0.9)]
    assert fvu_at(points, 50.0, "fvu") == pytest.approx(0.2)
    assert fvu_at(points, 50.0, "fvu_without_sinks") == pytest.approx(0.06**0.5)
    assert fvu_at(points, 25.0, "fvu") == pytest.approx(0.4)
    assert fvu_at(points, 100.5, "fvu") == 0.1  # as good as the same L0
    assert fvu_at(points, 120.0, "fvu") is None
    assert fvu_at(points, 1.0, "fvu") is None


@pytest.mark.parametrize("wanted", [7.0, 150.0, 900.0])
@pytest.mark.parametrize("steepness", [0.4, 1.0, 3.0])
def test_a_curve_brackets_the_l0_that_is_wanted(wanted: float, steepness: float) -> None:
    def train(coefficient: float) -> Point:
        l0 = 200 * coefficient**-steepness
        return Point(coefficient, l0, 1 / l0, 2 / l0)

    points = curve(train(1.0), wanted, train, 4)
    assert len(points) <= 5
    assert fvu_at(points, wanted, "fvu") == pytest.approx(1 / wanted, rel=1e-6)
    assert min(max(p.l0 / wanted, wanted / p.l0) for p in points) < 1.1


def test_a_curve_stops_where_an_l0_cannot_be_reached() -> None:
    tried: list[float] = []

    def train(coefficient: float) -> Point:
        tried.append(coefficient)
        return Point(coefficient, min(80.0, 40 / coefficient), 0.5, 0.5)

    points = curve(train(1.0), 500.0, train, 4)
    assert [p.l0 for p in points] == [40.0, 80.0, 80.0]
    assert tried == sorted(tried, reverse=True)
    assert fvu_at(points, 500.0, "fvu") is None
    assert next_coefficient(points[:1], 40.0 / 1.08) == pytest.approx(1.08**2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"architectures": "topk,lasso"},
        {"seeds": 0},
        {"many": -1},
        {"rows": 5},
        {"relu_coefficient": 0.0},
        {"more_coefficients": -1},
    ],
)
def test_train_refuses_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Config(**wrong)
