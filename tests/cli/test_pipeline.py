"""The commands from text to index, one after another on a tiny model in a folder, as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microtome.cli.main import main
from microtome.features import open_index
from microtome.model import HookedModel

HOOK = "blocks.1.hook_resid_pre"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def here(tiny_llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and some text in it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.hf.save_pretrained("model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained("model")
    Path("text.txt").write_text("The cat sat on the mat. In 1969 people walked on the Moon. Goal!\n" * 60)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed, and gives its JSON."""

    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


MODEL = ("--model", "model", "--dtype", "fp32", "--device", "cpu")
TEXT = ("--corpus", "text.txt", "--tokens", "tokens", "--context", "16")


def test_from_text_to_index(here: Path, run: Run) -> None:
    made = run("harvest", *MODEL, *TEXT, "--part", "0:0.8", "--hooks", HOOK, "--out", "acts")
    assert made["hook_points"] == [HOOK]
    assert made["tokens"] % 16 == 0
    again = run("harvest", *MODEL, *TEXT, "--part", "0:0.8", "--hooks", HOOK, "--out", "acts")
    assert again["tokens"] == made["tokens"]

    sizes = ("--d-sae", "48", "--k", "4", "--train-tokens", "6400", "--batch-size", "64", "--warmup-steps", "5")
    trained = run("train", "--store", "acts", *sizes, "--lr", "0.003", "--out", "sae")
    assert (trained["steps"], trained["hook_name"]) == (100, HOOK)
    streamed = run("train", *MODEL, *TEXT, "--hook", HOOK, *sizes, "--out", "sae2")
    assert streamed["steps"] == 100

    figures = run("evaluate", "sae", *MODEL, *TEXT, "--part", "0.8:1")
    assert 0 < figures["fvu"] < 1
    assert 0 < figures["l0"] <= 4
    assert json.loads(Path("sae/metrics.json").read_text())["fvu"] == figures["fvu"]

    built = run("index", "sae", *MODEL, *TEXT, "--part", "0:0.8", "--store", "acts", "--out", "index", "--window", "8")
    assert built["tokens"] < made["tokens"], "special tokens are not counted"
    with open_index("index") as index:
        assert index.summary.metrics["fvu"] == figures["fvu"]
        assert index.summary.n_alive == built["alive"] > 0
        best = index.features(sort="max", limit=1).rows[0]
        assert index.examples(best.feature)[0].value == pytest.approx(best.max)


MLPS = (
    *("--hook", "blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"),
    *("--output-hook", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"),
)


@pytest.mark.parametrize("kind", ["cross-layer", "per-layer"])
def test_several_layers_from_training_to_index(
    kind: str, here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--d-sae", "48", "--k", "4", "--train-tokens", "3200", "--batch-size", "64", "--warmup-steps", "5")
    run("train", *MODEL, *TEXT, f"--{kind}", *MLPS, *sizes, "--lr", "0.003", "--out", "made")
    figures = run("evaluate", "made", *MODEL, *TEXT, "--part", "0.8:1", "--n-tokens", "320", "--function-tokens", "160")
    assert [layer["name"] for layer in figures["layers"]] == list(MLPS[1:3])
    assert 0 <= figures["top1_replaced"] <= 1
    assert figures["ce_replaced"] - figures["ce_clean"] == pytest.approx(figures["delta_ce_replaced"], abs=1e-6)
    assert json.loads(Path("made/metrics.json").read_text())["kl_replaced"] == figures["kl_replaced"] > 0
    built = run("index", "made", *MODEL, *TEXT, "--out", "index", "--window", "8")
    assert built["latents"] == 96
    with open_index("index") as index:
        assert index.summary.layers == (0, 1)
        assert index.summary.metrics["top1_replaced"] == figures["top1_replaced"]
        fires = index.top_features("The cat sat on the mat.")
        assert {index.feature(f).row.layer for token in fires.features for f, _ in token} == {0, 1}
    assert main(("compare", "made", *MODEL, *TEXT, "--part", "0.8:1", "--function-tokens", "160")) == 0
    assert "top1 replaced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("harvest", *MODEL, "--hooks", HOOK, "--out", "a"), "There is no text to work on"),
        (("harvest", *MODEL, "--corpus", "none.txt", "--hooks", HOOK, "--out", "a"), "none.txt"),
        (("harvest", *MODEL, *TEXT, "--hooks", "blocks.1.hook_resid_per", "--out", "a"), HOOK),
        (("harvest", *MODEL, *TEXT, "--part", "0.5", "--hooks", HOOK, "--out", "a"), "two fractions"),
        (("harvest", *MODEL, "--corpus", "text.txt", "--context", "65", "--hooks", HOOK, "--out", "a"), "65"),
        (("harvest", "--model", "nowhere/at-all", *TEXT, "--hooks", HOOK, "--out", "a"), "hf download"),
        (("train", *MODEL, *TEXT, "--out", "a"), "Say --hook"),
        (("train", "--store", "none", "--out", "a"), "no activation_store"),
        (("train", *MODEL, *TEXT, "--hook", HOOK, "--k", "9999", "--out", "a"), "k must be"),
        (("evaluate", "none", *MODEL, *TEXT), "no dictionary"),
        (("index", "none", *MODEL, *TEXT, "--out", "a"), "no dictionary"),
        (("generate",), "either a prompt"),
    ],
)
def test_bad_words_get_one_clear_line_and_leave_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (here / "a").exists()


def test_a_token_dataset_of_other_text_is_refused(here: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("harvest", *MODEL, *TEXT, "--hooks", HOOK, "--out", "acts")
    (here / "other.txt").write_text("Something else.\n" * 50)
    again = ("harvest", *MODEL, "--corpus", "other.txt", "--tokens", "tokens", "--hooks", HOOK, "--out", "b")
    assert main(again) == 1
    assert "of another corpus" in capsys.readouterr().err
    shorter = ("harvest", *MODEL, "--corpus", "text.txt", "--tokens", "tokens", "--context", "12", "--hooks", HOOK)
    assert main([*shorter, "--out", "b"]) == 1
    assert "another context" in capsys.readouterr().err


def test_the_demo_opens_its_index_and_reads_a_prompt(run: Run) -> None:
    found = run("demo", "--no-serve")
    assert found["latents"] >= 4608
    assert found["alive"] > 0.95 * found["latents"]
    assert any("Paris" in row for row in found["fired"])
