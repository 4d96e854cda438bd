"""`microtome bench scaling` at tiny sizes: what its figures are made of, and what it says of sizes that do not fit."""

import json
from typing import Any

import pytest
import torch
from benchmarks import scaling
from benchmarks.scaling import Config, Size

from microtome.cli.main import main
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.stack import Stack

TINY = ["d_in=[24]", "d_sae=[640]", "k=4", "batch_size=64", "steps=2", "rounds=3", "device=cpu", "select_dtype=fp32"]


def test_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", "--json", "--set", *TINY, 'architectures=["topk"]']) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    [name] = result["figures"]["seconds"]
    assert name == "topk/24x640"
    figures = {key: by_size[name] for key, by_size in result["figures"].items()}
    step, product = (sorted(figures["seconds"][side])[1] / 2 for side in ("step", "product"))
    assert (figures["step_seconds"], figures["product_seconds"]) == (step, product)
    assert figures["activations_per_second"] == pytest.approx(64 / step)
    assert figures["tflops"] == pytest.approx(2 * 64 * 24 * 640 / step / 1e12)
    assert figures["formula_bytes"] == figures["formula_fp32_bytes"]  # fp32 was said
    assert figures["peak_bytes"] >= 0
    assert result["ratios"][f"{name}/share_of_matrix_peak"] == product / step
    assert result["ratios"][f"{name}/memory_vs_formula"] == figures["peak_bytes"] / figures["formula_bytes"]
    assert result["notes"][0].splitlines()[2].startswith(f"| {name} |")
    assert result["sizes"]["preset"] == "cpu"


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_formula_is_that_of_the_weights_that_are_trained(architecture: str) -> None:
    size = Size(architecture, 6, 40)
    config = size.dictionary(k=4)
    stack = Stack([config], make_rule([config]), 6, 6)
    of_all = {"encoder", "W_dec", "b_enc", "b_dec"}
    weights = sum(p.numel() for name, p in stack.named_parameters() if name.rpartition(".")[2].lstrip("_") in of_all)
    assert size.formula(10, 2) == 16 * weights + 3 * 10 * 40 * 2


def test_what_does_not_fit_is_said_and_not_tried() -> None:
    config = Config(d_in=(64,), d_sae=(8,), device="cpu").filled(torch.device("cpu"))
    found = scaling.measured(config, Size("topk", 1 << 20, 1 << 20))
    assert isinstance(found, str)
    assert found.startswith(
        "it needs about 35197.8 GB, and "
    )  # 2⁴¹ weights of 16 bytes, 3 · 2048 · 2²⁰ numbers of 2, 2²⁹ spare


def test_memory_that_runs_out_on_the_way_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_free", lambda device: 1 << 62)
    config = Config(d_in=(1,), d_sae=(1,), batch_size=1 << 50, k=1, device="cpu").filled(torch.device("cpu"))
    found = scaling.measured(config, Size("topk", 1, 1))
    assert isinstance(found, str)
    assert found.startswith("memory ran out")


def test_presets_fill_in_what_is_not_said() -> None:
    gpu = Config(d_sae=(99,)).filled(torch.device("cuda"))
    assert (gpu.preset, gpu.d_in, gpu.d_sae, gpu.k, gpu.batch_size) == ("gpu", (768, 2048, 4096), (99,), 64, 8192)
    cpu = Config(preset="cpu", k=3).filled(torch.device("cuda"))
    assert (cpu.preset, cpu.d_in, cpu.k) == ("cpu", (576,), 3)


def test_rows_are_the_same_for_one_seed_and_have_a_falling_spectrum() -> None:
    [first, *others] = scaling._batches(512, 32, 0, torch.device("cpu"))
    assert torch.equal(first, next(iter(scaling._batches(512, 32, 0, torch.device("cpu")))))
    assert all(not torch.equal(first, each) for each in others)
    spread = first.var(0)
    torch.testing.assert_close(spread, 32 / torch.arange(1, 33), rtol=0.3, atol=0.0)


@pytest.mark.parametrize(
    "wrong", [{"architectures": ("lasso",)}, {"rounds": 0}, {"d_in": (0,)}, {"batch_size": -1}, {"preset": "tpu"}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in wrong.items()]
    assert main(["bench", "scaling", "--set", *words]) == 1
    assert next(iter(wrong)) in capsys.readouterr().err


@pytest.mark.gpu
def test_scaling_on_a_gpu() -> None:
    config = Config(d_in=(64,), d_sae=(4096,), k=8, batch_size=256, steps=2, rounds=1, device="cuda")
    found = scaling.measured(config.filled(torch.device("cuda")), Size("topk", 64, 4096))
    assert isinstance(found, dict)
    assert 16 * 2 * 64 * 4096 < found["peak_bytes"] < 4 * found["formula_bytes"]
