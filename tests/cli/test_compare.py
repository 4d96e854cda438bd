"""`microtome compare` and the metrics of `microtome evaluate`, as a user types them, on a tiny model."""

import json
from pathlib import Path

import pytest

from microtome.cli.main import main
from microtome.dictionary import CrossLayerTranscoder, Dictionary, EvaluateConfig, Origin, evaluate, save_dictionary
from microtome.model import HookedModel, load_model
from microtome.text import TokenDataset

from ..makers import random_cross_layer, random_dictionary, topk_dictionary  # noqa: TID252 – shared by tests

COMMON = ("--model", "model", "--dtype", "fp32", "--device", "cpu")
TEXT = (
    "--corpus",
    "text.txt",
    "--tokens",
    "tokens",
    "--context",
    "16",
    "--n-tokens",
    "320",
    "--function-tokens",
    "160",
)


@pytest.fixture
def here(tiny_llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, some text and two dictionaries in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.hf.save_pretrained("model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained("model")
    Path("text.txt").write_text("The cat sat on the mat. In 1969 people walked on the Moon. Goal!\n" * 60)
    for name, k in (("few", 2), ("many", 8)):
        random_dictionary(Path(name), model="model", d_in=32, d_sae=48, k=k)
    return tmp_path


def test_two_dictionaries_side_by_side(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compare", "few", "many", *COMMON, *TEXT, "--similarity", "--out", "out")
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert [row["l0"] for row in result["table"]] == [2, 8]
    assert result["similarities"][0]["matched"] == pytest.approx(1, abs=1e-6)
    saved = json.loads(Path("out/comparison.json").read_text())
    assert saved["table"] == result["table"]
    for figure in ("fvu", "ce_recovered"):
        for suffix in ("png", "svg", "html", "json"):
            assert Path(f"out/l0_{figure}.{suffix}").stat().st_size > 200
        drawn = json.loads(Path(f"out/l0_{figure}.json").read_text())
        assert drawn["x"] == [2, 8]
        assert drawn["y"] == [row[figure] for row in result["table"]]
        assert drawn["labels"] == ["few", "many"]
    assert main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in shown[:3]] == ["name", "few", "many"]
    assert "MMCS 1.000 there" in shown[3]


def several_points(kind: str) -> Dictionary | CrossLayerTranscoder:
    """Two layers' MLPs, or two places of the stream."""
    if kind == "clt":
        names = [[f"blocks.{i}.{point}" for i in range(2)] for point in ("hook_resid_mid", "hook_mlp_out")]
        return random_cross_layer("model", *names, d=32)
    stream = tuple(f"blocks.{i}.hook_resid_pre" for i in (1, 2))
    return topk_dictionary(64, 40, 4, origin=Origin(model_name="model", inputs=stream, widths=(32, 32)))


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_dictionaries_of_several_points(here: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    made = several_points(kind)
    Path("several").mkdir()
    save_dictionary(made, Path("several"))
    assert main(["evaluate", "several", *COMMON, *TEXT, "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    config = EvaluateConfig(n_tokens=320, function_tokens=160)
    wanted = evaluate(load_model("model", device="cpu"), made, TokenDataset.open(here / "tokens"), config)
    assert [point["name"] for point in result["points"]] == [point.name for point in wanted.points]
    for said, point in zip(result["points"], wanted.points, strict=True):
        assert (said["fvu"], said["cosine"]) == pytest.approx((point.fvu, point.cosine))
        assert said["loss"] == pytest.approx(point.loss, rel=1e-4)
    assert [layer["l0"] for layer in result["layers"]] == pytest.approx([layer.l0 for layer in wanted.layers])
    assert (result["l0"], result["delta_ce"]) == pytest.approx((wanted.l0, wanted.delta_ce), rel=1e-4)
    assert main(["evaluate", "several", *COMMON, *TEXT, "--metrics", "core", "--whole-only"]) == 0
    shown = capsys.readouterr().out
    assert f"{wanted.points[1].name}: FVU {wanted.points[1].fvu:.4g}" in shown
    assert "replaced: CE" not in shown
    assert ("latents by what they read" in shown) == (kind == "clt")
    assert main(["compare", "few", "several", *COMMON, *TEXT, "--json"]) == 0, capsys.readouterr().err
    table = json.loads(capsys.readouterr().out)["table"]
    assert [row["architecture"] for row in table] == ["topk", made.architecture]
    assert table[1]["fvu"] == pytest.approx(wanted.fvu)


def test_metrics_without_a_corpus(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for word in ("cat", "Moon", "eggs") for i in range(12)]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("evaluate", "few", *COMMON, "--metrics", "geometry,probing,tpp", "--probe-data", "mine.jsonl")
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"out", "geometry", "probing", "tpp"}
    assert [task["attribute"] for task in result["probing"]["tasks"]] == ["Moon", "cat", "eggs"]
    assert json.loads(Path("few/metrics.json").read_text())["geometry"] == result["geometry"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "nearest neighbour's cosine" in shown
    assert "mine: cat" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "few", *COMMON, "--metrics", "coer"), "core"),
        (("evaluate", "few", *COMMON, "--metrics", "core"), "no text to work on"),
        (("evaluate", "few", *COMMON, "--metrics", "probing", "--probe-data", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "few", *COMMON, "--metrics", "ravel", "--entity-data", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "few", *COMMON, "--metrics", "absorption"), "too few words"),
        (("compare", "few", "none", *COMMON, *TEXT, "--out", "a"), "no dictionary at none"),
        (("compare", "few", "few", *COMMON, *TEXT, "--out", "a"), "a name of its own"),
    ],
    ids=["unknown", "no text", "no probe data", "no entities", "tiny vocabulary", "no dictionary", "twice"],
)
def test_bad_words_get_one_clear_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (here / "a").exists()
