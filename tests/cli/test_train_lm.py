"""`microtome train-lm`: a model from text, with its tokenizer, that the other commands open."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microtome.cli.main import main
from microtome.model import HookedModel, load_model

Run = Callable[..., dict[str, Any]]
TEXT = ("--corpus", "text.txt", "--context", "16")
SMALL = (
    "--d-model",
    "16",
    "--n-heads",
    "2",
    "--steps",
    "40",
    "--batch-size",
    "8",
    "--warmup-steps",
    "2",
    "--lr",
    "0.01",
)
CPU = ("--device", "cpu", "--dtype", "fp32")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The cat sat on the mat. In 1969 people walked on the Moon. Goal!\n" * 150)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed, and gives its JSON."""

    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def test_with_a_tokenizer_of_its_own(run: Run) -> None:
    made = run("train-lm", *TEXT, *SMALL, *CPU, "--tokenizer-size", "280", "--out", "lm")
    assert made["vocabulary"] == 280
    assert made["tokens"] == 40 * 8 * 16
    assert made["valid_loss"] < 3.0  # it began at ln 280 = 5.6
    model = load_model("lm", device="cpu")
    assert model.config.d_mlp == 0
    assert made["parameters"] == sum(p.numel() for p in model.hf.parameters())
    assert len(model.to_str_tokens("The cat")) < 8
    assert model.generate("The cat sat on the", max_new_tokens=2).startswith(" mat")  # type: ignore[union-attr]
    assert load_model("lm/checkpoints/step-0000004", device="cpu").tokenizer is not None


def test_with_another_models_tokenizer_and_architecture(run: Run, tiny_llama: HookedModel) -> None:
    assert tiny_llama.tokenizer is not None
    tiny_llama.hf.save_pretrained("model")
    tiny_llama.tokenizer.save_pretrained("model")
    shape = ("--n-layers", "1", "--d-mlp", "32", "--activation", "swiglu", "--positions", "rotary", "--tied")
    made = run("train-lm", *TEXT, *SMALL, *CPU, *shape, "--normalization", "rms", "--tokenizer", "model", "--out", "lm")
    model = load_model("lm", device="cpu")
    assert made["vocabulary"] == model.config.d_vocab == 320
    assert model.config.d_mlp == 32
    assert "blocks.0.attn.hook_rot_q" in model.hook_points
    assert "blocks.0.mlp.hook_pre_linear" in model.hook_points


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--d-model", "15"), "n_heads must divide d_model"),
        (("--n-heads", "0"), "heads, neurons or both"),
        (("--lr", "0"), "lr must be positive"),
        (("--tokenizer-size", "100"), "each byte"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-lm", *TEXT, *SMALL, *CPU, "--tokenizer-size", "280", *words, "--out", "lm"]) == 1
    assert said in capsys.readouterr().err
    assert not Path("lm-tokens").exists()


def test_a_tokenizer_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-lm", *TEXT, *SMALL, *CPU, "--tokenizer", "nowhere/at/all", "--out", "lm"]) == 1
    assert "nowhere/at/all" in capsys.readouterr().err


def test_no_text_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-lm", *SMALL, "--tokenizer-size", "280", "--out", "lm"]) == 1
    assert "no text to learn a tokenizer from" in capsys.readouterr().err


def test_another_size_in_the_same_place_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("train-lm", *TEXT, *SMALL, *CPU, "--tokenizer-size", "280", "--out", "lm")
    again = ["train-lm", *TEXT, *SMALL, *CPU, "--tokenizer-size", "281", "--out", "lm"]
    assert main(again) == 1
    assert "has another size" in capsys.readouterr().err
