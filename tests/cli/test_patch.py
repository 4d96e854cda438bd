"""`microtome patch` against the library, on a tiny model in a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from microtome.circuits import activation_patching, logit_difference, path_patching_sweep
from microtome.cli.main import main
from microtome.model import HookedModel

CLEAN, CORRUPT = ["The cat sat on", "the dog sat on"], ["the dog sat on", "The cat sat on"]


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], HookedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, made = tiny("llama"), tmp_path_factory.mktemp("model")
    assert model.tokenizer is not None
    model.hf.save_pretrained(made)
    model.tokenizer.save_pretrained(made)
    return made


def command(folder: Path, *more: str) -> list[str]:
    words = ["patch", "--model", str(folder), "--device", "cpu", "--clean", *CLEAN, "--corrupt", *CORRUPT]
    return [*words, "--answer", "a", "--wrong", "b", *more]


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_activations(folder: Path, tiny: Callable[[str], HookedModel], capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, *command(folder, "--over", "mlp_out", "--top", "3"))
    model = tiny("llama")
    effects = activation_patching(model, CLEAN, CORRUPT, logit_difference(model, "a", "b"), "mlp_out")
    assert effects.clean is not None
    assert effects.corrupt is not None
    change = (effects.values - effects.corrupt).mean(-1)
    assert torch.allclose(torch.tensor(found["effects"]["mean"]), change, atol=1e-4)
    assert found["clean"] == pytest.approx(float(effects.clean.mean()), abs=1e-4)
    assert len(found["top"]) == 3
    assert abs(found["top"][0]["mean"]) == pytest.approx(float(change.abs().max()), abs=1e-4)
    assert found["top"][0]["low"] <= found["top"][0]["mean"] <= found["top"][0]["high"]


def test_paths(
    folder: Path, tiny: Callable[[str], HookedModel], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "heads.svg"
    found = result(capsys, *command(folder, "--receivers", "logits", "--figure", str(figure)))
    model = tiny("llama")
    effects = path_patching_sweep(model, CLEAN, CORRUPT, "logits", metric=logit_difference(model, "a", "b"))
    assert torch.allclose(torch.tensor(found["effects"]["mean"]), effects.change.mean, atol=1e-4)
    assert "<svg" in figure.read_text(encoding="utf-8")
    together = result(capsys, *command(folder, "--receivers", "logits", "--senders", "L0.H1", "L1.H0"))
    assert together["top"][0]["place"] == {}


def test_the_table_and_what_cannot_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--over", "head", "--normalize")) == 0
    assert "layer 0  head" in capsys.readouterr().out
    assert main(command(folder, "--senders", "L0.H0")) == 1
    assert "--receivers" in capsys.readouterr().err
    assert main(command(folder, "--direction", "up")) == 1
    assert "denoising or noising" in capsys.readouterr().err
    assert main(command(folder, "--receivers", "logits", "--over", "resid_post")) == 1
    assert "heads or MLPs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--receivers logits --direction noising", "--direction"),
        ("--receivers logits --normalize", "--normalize"),
        ("--receivers logits --by-position False", "--by-position"),
        ("--receivers logits --senders L0.H1 --over mlp", "--over"),
        ("--freeze-mlps", "--freeze-mlps"),
        ("--receivers logits --senders L0.H1 --figure a.svg", "one or two axes"),
        ("--over head --by-position True --figure a.svg", "one or two axes"),
        ("--figure a.bmp", ".svg"),
    ],
)
def test_options_without_a_meaning_are_refused_before_anything_runs(
    more: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(Path("no/such/model"), *more.split())) == 1
    assert says in capsys.readouterr().err


def test_one_prompt_has_no_interval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "patch",
        "--model",
        str(folder),
        "--clean",
        CLEAN[0],
        "--corrupt",
        CORRUPT[0],
        "--answer",
        "a",
        "--wrong",
        "b",
    ]
    assert main([*words, "--over", "head", "--direction", "noising"]) == 0
    out = capsys.readouterr().out
    assert "over 1 prompt\n" in out
    assert " to " not in out.partition("(noising)")[2]
    assert main([*words, "--top", "0"]) == 1
    assert "the top 0" in capsys.readouterr().err
