"""`microtome compare` and the metrics of `microtome evaluate`, as a user types them, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microtome.cli.main import main
from microtome.common.config import to_dict
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    EvaluateConfig,
    Origin,
    encode_texts,
    evaluate,
    load_dictionary,
    probing,
    read_labelled,
    save_dictionary,
)
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


def measured(capsys: pytest.CaptureFixture[str], metrics: str, *more: str, of: str = "few") -> dict[str, Any]:
    assert main(["evaluate", of, *COMMON, "--metrics", metrics, *more, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_own_texts_in_every_format(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two labels that are crossed, one of them three times as frequent."""
    rows = [
        {"text": f"{a} {b} {i}", "label": a, "spurious": b}
        for a, n in (("cat", 24), ("Moon", 8))
        for b in ("dog", "eggs")
        for i in range(n)
    ]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), "mine.parquet")
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    Path("mine.csv").write_text("\n".join(lines))
    found = [
        measured(capsys, "probing,scr,tpp", "--probe-data", f"mine.{kind}") for kind in ("jsonl", "csv", "parquet")
    ]
    assert found[0] == found[1] == found[2]
    [texts] = read_labelled("mine.csv")
    encoded = encode_texts(load_model("model", device="cpu"), load_dictionary("few"), texts)
    assert found[0]["probing"] == json.loads(json.dumps(to_dict(probing([encoded]))))
    assert [task["attribute"] for task in found[0]["probing"]["tasks"]] == ["label cat", "spurious eggs"]
    assert [task["chance"] for task in found[0]["probing"]["tasks"]] == [0.75, 0.5]
    assert set(found[0]["probing"]["tasks"][0]["sparse"]) == {"1", "2", "5"}
    assert found[0]["tpp"][0]["attributes"] == ["label cat", "spurious eggs"]
    assert [(pair["wanted"], pair["spurious"]) for pair in found[0]["scr"]] == [
        ("label cat", "spurious eggs"),
        ("spurious eggs", "label cat"),
    ]


def test_own_entities_with_and_without_a_mask(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ("cat", "dog")
    rows: list[dict[str, object]] = [
        {"entity": name, "attributes": {"a": answers[i % 2], "b": answers[i // 2 % 2]}}
        for i, name in enumerate("abcdefgh")
    ]
    rows += [{"attribute": attribute, "prompt": f"The ={{entity}} {attribute}"} for attribute in "ab"]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--entity-data", "mine.jsonl")
    plain = measured(capsys, "ravel", *data, "--mask-steps", "0")["ravel"]
    assert plain["masked"] is None
    assert plain["n_entities"] == 8
    learned = measured(capsys, "ravel", *data, "--mask-steps", "2", "--mask-sparsity", "0")["ravel"]
    assert learned["by_count"] == plain["by_count"]
    assert set(learned["masked"]["n_latents"]) == {"a", "b"}
    assert main(["evaluate", "few", *COMMON, "--metrics", "ravel", *data, "--mask-steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "the model on a: " in shown
    assert "  learned mask: " in shown
    assert "  64 latents: " in shown


def test_one_document_has_no_intervals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.jsonl").write_text(json.dumps({"text": "The cat sat on the mat."}))
    more = ("--corpus", "one.jsonl", "--tokens", "one", "--context", "10")
    found = measured(capsys, "core", *more)
    assert 4 < found["n_tokens"] < 10
    assert found["intervals"]["fvu"] == [None, None]
    assert main(["evaluate", "few", *COMMON, "--metrics", "core", *more]) == 0
    assert "95 %" not in capsys.readouterr().out


def test_a_dictionary_that_is_silent_and_one_of_nan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = load_dictionary("few").requires_grad_(False)
    sae.encoder.zero_()
    for name in ("silent", "broken"):
        Path(name).mkdir()
    save_dictionary(sae, Path("silent"))
    rows = [{"text": f"{a} {i}", "label": a} for a in ("cat", "Moon", "eggs") for i in range(8)]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = measured(capsys, "core,geometry,probing,tpp", *TEXT, "--probe-data", "mine.jsonl", of="silent")
    assert (found["l0"], found["dead_fraction"], found["notes"][-1][:15]) == (0, 1, "No latent fired")
    assert found["probing"]["mean"]["top_1"] == found["probing"]["mean"]["chance"]
    assert {score["value"] for score in found["tpp"][0]["score"].values()} == {0}
    sae.W_dec[3, 1] = float("nan")
    save_dictionary(sae, Path("broken"))
    assert main(["evaluate", "broken", *COMMON, *TEXT]) == 1
    assert "is damaged. Got: W_dec with 1 values that are NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "few", *COMMON, "--metrics", "coer"), "core"),
        (("evaluate", "few", *COMMON, "--metrics", "core"), "no text to work on"),
        (("evaluate", "few", *COMMON, "--metrics", "probing", "--probe-data", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "few", *COMMON, "--metrics", "ravel", "--entity-data", "none.jsonl"), "no file none.jsonl"),
        (("evaluate", "few", *COMMON, "--metrics", "absorption"), "too few words"),
        (("evaluate", "few", *COMMON, "--mask-steps", "3"), "--mask-steps is read by ravel alone. Got: no --metrics"),
        (
            ("evaluate", "few", *COMMON, "--metrics", "core", "--probe-data", "a"),
            "read by probing and scr and tpp alone",
        ),
        (("evaluate", "few", *COMMON, "--metrics", "ravel", "--mask-steps", "-1"), "one step or more"),
        (("evaluate", "few", *COMMON, "--metrics", "ravel", "--mask-steps", "0", "--mask-sparsity", "1"), "no mask"),
        (("compare", "few", "none", *COMMON, *TEXT, "--out", "a"), "no dictionary at none"),
        (("compare", "few", "few", *COMMON, *TEXT, "--out", "a"), "a name of its own"),
    ],
    ids=[
        "unknown",
        "no text",
        "no probe data",
        "no entities",
        "tiny vocabulary",
        "mask without ravel",
        "texts for nothing",
        "steps",
        "no steps",
        "no dictionary",
        "twice",
    ],
)
def test_bad_words_get_one_clear_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (here / "a").exists()


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        ("probing", "ababababc", "mine: c has too few texts of a class. Got: 1"),
        ("tpp", "abababab", "two attributes or more. Got: mine"),
        ("scr", "abcabcabcabc", "all four combinations"),
        ("probing", "aaaa", "two classes"),
    ],
)
def test_texts_that_do_not_suffice_are_refused_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str], metric: str, labels: str, message: str
) -> None:
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--model", "no/such/model", "--metrics", metric, "--probe-data", "mine.jsonl")
    assert main(["evaluate", "few", *words]) == 1
    assert message in capsys.readouterr().err
