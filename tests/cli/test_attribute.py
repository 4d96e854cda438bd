"""`microtome attribute` and `microtome circuit` on a tiny model on the disk: what they print, what they write, what they refuse."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from microtome.circuits import Circuit, attribute, circuit_runner, faithfulness, logit_difference
from microtome.cli.main import main
from microtome.model import HookedModel, load_model

CLEAN, CORRUPT = ["The cat", "The xq"], ["The mat", "The zq"]


@pytest.fixture
def words(tiny_llama: HookedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    """The model and prompts as words of a command; answers are single bytes."""
    folder = tmp_path / "model"
    tiny_llama.hf.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    texts = ["--clean", *CLEAN, "--corrupt", *CORRUPT, "--answer", "a", "--wrong", "b"]
    return ["--model", str(folder), "--device", "cpu", *texts]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_attribute(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = command(capsys, "attribute", *words, "--top", "3", "--figure", str(tmp_path / "a.svg"))
    model = load_model(words[1], device="cpu")
    wanted = attribute(model, CLEAN, CORRUPT, logit_difference(model, "a", "b"))
    assert [tuple(row["place"].values()) for row in found["top"]] == [labels for labels, _ in wanted.top(3)]  # type: ignore[attr-defined]
    assert [row["mean"] for row in found["top"]] == pytest.approx([mean for _, mean in wanted.top(3)])  # type: ignore[attr-defined]
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<")
    assert main(["attribute", *words, "--level", "edge", "--method", "eap", "--rule", "relp"]) == 0
    out = capsys.readouterr().out
    assert "rules: relp" in out
    few, more = (command(capsys, "attribute", *words, "--method", "eap-ig", *said) for said in ([], ["--steps", "2"]))
    wanted = attribute(model, CLEAN, CORRUPT, logit_difference(model, "a", "b"), method="eap-ig", steps=2)
    assert more["effects"] == wanted.to_json() != few["effects"]
    assert "reader" in out


def test_circuit(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, picture = tmp_path / "circuit.json", tmp_path / "circuit.svg"
    asked = ["--edges", "60", "--method", "eap", "--curve", "--out", str(path), "--figure", str(picture)]
    found = command(capsys, "circuit", *words, *asked)
    model, circuit = load_model(words[1], device="cpu"), Circuit.load(path)
    on = circuit_runner(model, CLEAN, CORRUPT, logit_difference(model, "a", "b"))
    assert found["faithfulness"] == faithfulness(on, circuit).to_json()
    assert found["circuit"]["n_edges"] == circuit.n_edges <= 60  # type: ignore[index]
    assert picture.read_text(encoding="utf-8") == circuit.draw().svg
    assert set(found["curve"]) == set(found["random"])  # type: ignore[call-overload]
    again = command(capsys, "circuit", *words, "--circuit", str(path))
    assert again["faithfulness"] == found["faithfulness"]
    other = command(capsys, "circuit", *words, "--edges", "60", "--method", "eap", "--curve", "--seed", "1")
    assert other["curve"] == found["curve"]
    assert other["random"] != found["random"]
    assert main(["circuit", *words, "--edges", "100", "--method", "acdc", "--tau", "1e-6"]) == 0
    assert "faithfulness" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["attribute", "--method", "eapig"], "eap-ig"),
        (["attribute", "--rule", "lrp"], "relp"),
        (["attribute", "--over", "pattern"], "Unknown part to attribute to"),
        (["attribute", "--level", "edge", "--over", "mlp_out"], "nothing to choose"),
        (["attribute", "--level", "edge", "--figure", "a.png"], "microtome circuit"),
        (["attribute", "--by-position", "--figure", "a.png"], "one or two axes"),
        (["attribute", "--top", "-1"], "the top -1"),
        (["circuit", "--figure", "a.png"], "Graphviz"),
        (["circuit", "--circuit", "none.json"], "There is no circuit"),
        (["circuit", "--edges", "0"], "so many edges"),
        (["circuit", "--edges", "100", "--method", "acdc", "--tau", "1000"], "smaller"),
        (["circuit", "--circuit", "a.json", "--curve"], "--curve"),
        *(
            (["circuit", "--circuit", "a.json", f"--{name}", value], f"as it is. Got: --{name}. Leave that out")
            for name, value in (
                *(("edges", "500"), ("method", "eap-ig"), ("rule", "none"), ("steps", "5"), ("tau", "0.01")),
                *(("how", "greedy"), ("by", "size")),
            )
        ),
        (["circuit", "--circuit", "a.json", "--by", "size", "--edges", "3"], "Got: --edges, --by."),
        (["circuit", "--seed", "0"], "Nothing is drawn, so --seed would change nothing. Got: --seed 0"),
        (["circuit", "--circuit", "a.json", "--replace", "mean", "--seed", "3"], "say --replace resample"),
        (["circuit", "--tau", "0.1"], "--tau is not used by the method eap-ig"),
        (["circuit", "--method", "eap", "--steps", "9"], "--steps is not used by the method eap. Got: --steps 9"),
        (["attribute", "--steps", "5"], "The method gradient takes the gradient at one place"),
        (["attribute", "--level", "edge", "--method", "eap", "--steps", "5"], "Got: --steps 5. Leave it out"),
    ],
)
def test_refused(words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    name, *rest = more
    assert main([name, *words, *rest]) == 1
    assert says in capsys.readouterr().err
