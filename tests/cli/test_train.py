"""`microtome train`: one dictionary and many, by flags, by a sweep, by a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microtome.cli.main import main
from microtome.dictionary import load_cross_layer_transcoder, load_dictionaries, load_dictionary
from microtome.model import HookedModel

Run = Callable[..., dict[str, Any]]
HOOK, OTHER, MLP_IN, MLP_OUT = (
    "blocks.1.hook_resid_pre",
    "blocks.2.hook_resid_pre",
    "blocks.1.ln2.hook_normalized",
    "blocks.1.hook_mlp_out",
)
SIZES = ("--d-sae", "48", "--train-tokens", "1280", "--batch-size", "64", "--warmup-steps", "5", "--device", "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_llama: HookedModel) -> Path:
    """A store of four hook points of a tiny model."""
    folder = tmp_path_factory.mktemp("train")
    tiny_llama.hf.save_pretrained(folder / "model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60)
    text = ("--corpus", str(folder / "text.txt"), "--tokens", str(folder / "tokens"), "--context", "16")
    model = ("--model", str(folder / "model"), "--dtype", "fp32", "--device", "cpu")
    hooks = ("--hooks", HOOK, OTHER, MLP_IN, MLP_OUT)
    assert main(("harvest", *model, *text, *hooks, "--out", str(folder / "acts"))) == 0
    return folder / "acts"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> Run:
    def call(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        code = main(("train", "--store", str(store), *SIZES, "--out", str(tmp_path / "made"), "--json", *words))
        captured = capsys.readouterr()
        assert code == 0, captured.err
        result: dict[str, Any] = json.loads(captured.out)
        return result

    return call


@pytest.mark.parametrize(
    "architecture", ["topk", "batchtopk", "matryoshka", "standard", "p_anneal", "gated", "jumprelu"]
)
def test_every_architecture_is_trained_saved_and_opened(run: Run, architecture: str, tmp_path: Path) -> None:
    made = run("--architecture", architecture, "--hook", HOOK, "--k", "4", "--set", "norms=free")
    assert (made["architecture"], made["steps"], made["hook_name"]) == (architecture, 20, HOOK)
    assert load_dictionary(tmp_path / "made").d_sae == 48


def test_a_cross_layer_transcoder(run: Run, tmp_path: Path) -> None:
    made = run("--cross-layer", "--hook", MLP_IN, OTHER, "--output-hook", MLP_OUT, OTHER, "--k", "4")
    assert (made["hook_name"], made["predicts"]) == (f"{MLP_IN}, {OTHER}", f"{MLP_OUT}, {OTHER}")
    assert len(made["training_fvu_by_layer"]) == 2
    assert load_cross_layer_transcoder(tmp_path / "made").k == 8


def test_a_sweep_is_all_combinations(run: Run, tmp_path: Path) -> None:
    made = run("--hook", HOOK, "--sweep", "k=2,4", "seed=0,1")
    assert [(each["k"], each["steps"]) for each in made["dictionaries"]] == [(2, 20), (2, 20), (4, 20), (4, 20)]
    prints = [load_dictionary(tmp_path / "made" / str(i)).fingerprint for i in range(4)]
    assert len(set(prints)) == 4


def test_lambda_is_found_for_a_wanted_l0(run: Run) -> None:
    words = ("--hook", HOOK, "--architecture", "standard", "--train-tokens", "12800", "--lr", "0.003", "--overwrite")
    usual, found = run(*words), run(*words, "--target-l0", "12")
    assert found["coefficient"] != usual["coefficient"] == 5.0
    assert abs(found["training_l0"] - 12) < abs(usual["training_l0"] - 12)


def test_a_file_of_settings(run: Run, tmp_path: Path) -> None:
    shared = {"d_sae": 40, "inputs": [HOOK]}
    settings = [
        {"architecture": "topk", **shared, "sweep": {"k": [2, 3]}},
        {"architecture": "standard", **shared, "coefficient": 0.1},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    made = run("--configs", str(tmp_path / "sweep.json"))
    assert [each["architecture"] for each in made["dictionaries"]] == ["topk", "topk", "standard"]


def test_transcoders_and_crosscoders(run: Run, tmp_path: Path) -> None:
    made = run("--hook", MLP_IN, "--output-hook", MLP_OUT, "--k", "4", "--set", "skip=true")
    assert (made["hook_name"], made["predicts"]) == (MLP_IN, MLP_OUT)
    layers = run("--hook", HOOK, OTHER, "--output-hook", OTHER, MLP_OUT, "--per-layer", "--k", "4", "--overwrite")
    assert [each["predicts"] for each in layers["dictionaries"]] == [OTHER, MLP_OUT]
    points = run("--hook", HOOK, OTHER, "--per-layer", "--k", "4", "--overwrite")
    assert [each["hook_name"] for each in points["dictionaries"]] == [HOOK, OTHER]
    assert [each.is_transcoder for each in load_dictionaries(tmp_path / "made")] == [False, False]
    across = run("--hook", HOOK, OTHER, "--k", "4", "--overwrite")
    assert across["hook_name"] == f"{HOOK}, {OTHER}"
    assert load_dictionary(tmp_path / "made").d_in == 2 * 32


def test_globs_stand_for_the_stores_points(run: Run) -> None:
    """In its order, and among names where they are given."""
    across = run("--hook", "blocks.*.hook_resid_pre", "--k", "4")
    assert across["hook_name"] == f"{HOOK}, {OTHER}"
    layers = run("--hook", "blocks.*.hook_resid_pre", "--per-layer", "--k", "4", "--overwrite")
    assert [each["hook_name"] for each in layers["dictionaries"]] == [HOOK, OTHER]
    words = (
        "--hook",
        "blocks.1.ln2.*",
        "--output-hook",
        "blocks.*.hook_mlp_out",
        "--per-layer",
        "--k",
        "4",
        "--overwrite",
    )
    [made] = [run(*words)]
    assert (made["hook_name"], made["predicts"]) == (MLP_IN, MLP_OUT)
    mixed = run("--hook", OTHER, "blocks.1.hook_*_pre", "--k", "4", "--overwrite")
    assert mixed["hook_name"] == f"{OTHER}, {HOOK}"
    assert run("--hook", "blocks.1.hook_in", "--k", "4", "--overwrite")["hook_name"] == HOOK


def test_globs_stand_for_the_models_points(
    store: Path, tiny_llama: HookedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store.parent
    words = ("--model", str(folder / "model"), "--dtype", "fp32", "--tokens", str(folder / "tokens"), "--k", "4")
    many = ("--hook", "blocks.*.ln2.hook_normalized", "--output-hook", "blocks.*.hook_mlp_out", "--per-layer", "--json")
    assert main(("train", *words, *SIZES, "--out", str(tmp_path / "made"), *many)) == 0
    made = json.loads(capsys.readouterr().out)["dictionaries"]
    n = tiny_llama.config.n_layers
    assert [each["hook_name"] for each in made] == [f"blocks.{i}.ln2.hook_normalized" for i in range(n)]
    assert [each["predicts"] for each in made] == [f"blocks.{i}.hook_mlp_out" for i in range(n)]
    assert main(("train", *words, *SIZES, "--out", str(tmp_path / "none"), "--hook", "blocks.*.hook_mlp_outt")) == 1
    assert "Did you mean 'blocks.*.hook_mlp_out'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hook", HOOK, "--set", "normms=free"), "norms"),
        (("--hook", HOOK, "--set", "norms"), "NAME=VALUE"),
        (("--hook", HOOK, "--sweep", "k"), "NAME=VALUES"),
        (("--hook", HOOK, "--sweep", "k=2,99"), "k must be"),
        (("--hook", "blocks.1.hook_resid_pree"), HOOK),
        (("--hook", "blocks.*.hook_resid_pree"), "Did you mean 'blocks.*.hook_resid_pre'"),
        (("--hook", MLP_IN, "--output-hook", "blocks.[7-9].hook_mlp_out"), "matches 'blocks.[7-9].hook_mlp_out'"),
        (("--hook", "blocks.*", "--output-hook", "blocks.*.hook_mlp_out", "--per-layer"), "4 inputs, 1 outputs"),
        (("--hook", HOOK, OTHER, "--output-hook", MLP_OUT, "--per-layer"), "output for each input"),
        (("--hook", HOOK, "--target-l0", "6"), "Set k"),
        (("--hook", MLP_IN, "--output-hook", MLP_OUT, "--per-layer", "--cross-layer"), "--per-layer as well"),
        (("--hook", MLP_IN, "--cross-layer"), "no --output-hook"),
        (("--hook", OTHER, MLP_IN, "--output-hook", OTHER, MLP_OUT, "--cross-layer"), "the model's order"),
        (("--per-layer",), "need hook points"),
        ((), "several hook points"),
        (("--configs", "nowhere.json"), "no file"),
        (("--hook", HOOK, "--architecture", "jumprelu", "--set", "sparsity=quadratic"), "target_l0"),
    ],
)
def test_bad_settings(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    out = ("--out", str(tmp_path / "made"), "--k", "4")
    assert main(("train", "--store", str(store), *SIZES, *out, *words)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
