"""`microtome lens`, `tune-lens` and `heads`: what they print is what the library gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from microtome.circuits import head_scores, logit_lens
from microtome.cli.main import main
from microtome.model import HookedModel, load_model

MODEL = ("--model", "model", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def model(tiny_llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HookedModel:
    """A model in a folder of the working directory, as the commands open it."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.hf.save_pretrained("model")
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained("model")
    return load_model("model", device="cpu")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *words, "--json"))
    return found


def test_a_prompt_through_the_lens(model: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("lens", "The cat", *MODEL, "--answer", "a", "--top", "2")
    found = as_json(capsys, *words, "--figure", "made/lens.svg")
    lens = logit_lens(model, "The cat")
    assert [depth["depth"] for depth in found["depths"]] == list(lens.labels)
    probability, rank = lens.probability("a"), lens.rank("a")
    for i, depth in enumerate(found["depths"]):
        assert depth["probability"] == pytest.approx(float(probability[i, 0, -1]), abs=1e-6)
        assert depth["rank"] == int(rank[i, 0, -1])
        assert [t["token"] for t in depth["top"]] == [t.token for t in lens.top_tokens(2)[i]]
    assert "</svg>" in Path("made/lens.svg").read_text(encoding="utf-8")
    text = printed(capsys, *words)
    assert "final_post" in text
    assert "own denominator" in text
    assert main(["lens", "The cat", *MODEL, "--answer", "a cat"]) == 1
    assert "not a single token" in capsys.readouterr().err


def test_a_lens_is_tuned_and_read_through(model: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("The cat sat on the mat. In 1969 people walked on the Moon. Goal!\n" * 60)
    words = ("--corpus", "text.txt", "--context", "16", "--steps", "30", "--positions", "64", "--lr", "3e-3")
    made = as_json(capsys, "tune-lens", *MODEL, *words, "--out", "lens", "--valid-tokens", "128")
    assert all(tuned < plain for tuned, plain in zip(made["kl"], made["kl_logit_lens"], strict=True))
    tuned = as_json(capsys, "lens", "The cat", *MODEL, "--tuned", "lens", "--figure", "lens.json")
    plain = as_json(capsys, "lens", "The cat", *MODEL)
    assert tuned["depths"][-1] == plain["depths"][-1]
    assert tuned["depths"][1] != plain["depths"][1]
    assert tuned["notes"][0].startswith("tuned lens")
    assert main(["tune-lens", *MODEL, *words, "--out", "lens"]) == 1
    assert "already there" in capsys.readouterr().err


def test_heads_are_scored(model: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("heads", *MODEL, "--length", "8", "--batch", "3", "--no-bos", "--kinds", "induction,copying", "--top", "2")
    found = as_json(capsys, *words, "--figure", "heads.png")
    scores = head_scores(model, kinds=["induction", "copying"], length=8, batch=3, with_bos=False)
    assert list(found["kinds"]) == ["induction", "copying"]
    for kind, of_kind in found["kinds"].items():
        assert [row["head"] for row in of_kind["top"]] == [name for name, _ in scores.top(kind, 2)]
        assert of_kind["top"][0]["score"] == pytest.approx(float(scores[kind].max()), abs=1e-6)
        assert of_kind["top"][0]["low"] <= of_kind["top"][0]["score"] <= of_kind["top"][0]["high"]
        assert of_kind["scores"] == [pytest.approx(row, abs=1e-6) for row in scores[kind].tolist()]
    assert found["figures"] == ["heads-induction.png", "heads-copying.png"]
    assert all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in found["figures"])
    assert not Path("heads.png").exists()
    drawn = as_json(capsys, *words, "--figure", "made/heads.json")["figures"]
    for kind, name in zip(("induction", "copying"), drawn, strict=True):
        figure = json.loads(Path(name).read_text(encoding="utf-8"))
        assert figure["values"] == [pytest.approx(row, abs=1e-6) for row in scores[kind].tolist()]
        assert figure["limits"] == ([-1, 1] if kind == "copying" else [0, 1])
    one = as_json(capsys, *words[:-4], "--kinds", "copying", "--figure", "one.json")
    assert one["figures"] == ["one.json"]
    assert json.loads(Path("one.json").read_text(encoding="utf-8"))["values"][0] == pytest.approx(
        scores["copying"][0].tolist(), abs=1e-6
    )
    text = printed(capsys, *words)
    assert "without BOS; mean over 8 queries behind the first copy" in text
    assert main(["heads", *MODEL, "--kinds", "induktion"]) == 1
    assert "'induction'" in capsys.readouterr().err


def test_one_sequence_has_no_interval(model: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("heads", *MODEL, "--length", "8", "--batch", "1", "--kinds", "induction")
    assert " to " not in printed(capsys, *words)
    assert main([*words, "--top", "0"]) == 1
    assert "the top 0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("heads",), ("lens", "The cat")], ids=" ".join)
def test_a_figure_of_no_known_kind_is_refused_before_anything_runs(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--model", "no/such/model", "--figure", "a.bmp"]) == 1
    assert "a name that ends in" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_no_traceback(model: HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").write_text("a file")
    words = ("heads", *MODEL, "--length", "8", "--batch", "2", "--kinds", "induction", "--figure", "here/heads.json")
    assert main([*words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("microtome heads: ")
    assert "Got: here" in err
