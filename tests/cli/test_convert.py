"""`microtome convert`, on files of other libraries and on the shipped dictionary."""

import json
from pathlib import Path

import pytest
import torch

from microtome.cli.main import main
from microtome.dictionary import load_cross_layer_transcoder, load_dictionary
from microtome.dictionary.formats import log_sparsity

FIXTURES = Path(__file__).parents[1] / "dictionary/fixtures"


@pytest.mark.parametrize(
    ("name", "read_as", "written_as"),
    [
        ("dictionary_learning/GatedAutoEncoder", "dictionary_learning", "saelens"),
        ("sparsify/layers.4", "sparsify", "microtome"),
        ("saelens_checkpoint/batchtopk", "saelens", "saelens"),
    ],
)
def test_any_format_becomes_one(
    name: str, read_as: str, written_as: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(FIXTURES / name), str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["read_as"], said["written_as"]) == (read_as, written_as)
    before, after = load_dictionary(FIXTURES / name), load_dictionary(tmp_path / "out")
    assert before.fingerprint == after.fingerprint == said["fingerprint"]
    assert before.origin == after.origin
    assert json.loads((tmp_path / "out/provenance.json").read_text())["source"] == str(FIXTURES / name)


def test_a_cross_layer_transcoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FIXTURES / "clt/jump_relu"), str(tmp_path / "out")]) == 0
    assert "cross_layer_transcoder" in capsys.readouterr().out
    before = load_cross_layer_transcoder(FIXTURES / "clt/jump_relu")
    assert load_cross_layer_transcoder(tmp_path / "out").fingerprint == before.fingerprint


def test_what_the_caller_says_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hook-name", "blocks.2.hook_mlp_out", "--model-name", "mine", "--fold-decoder-norms", "--dtype", "bf16"]
    assert main(["convert", str(FIXTURES / "saelens/old"), str(tmp_path / "out"), *words]) == 0
    assert "note: the layout from before version 6" in capsys.readouterr().out
    made = load_dictionary(tmp_path / "out")
    assert (made.hook_name, made.model_name) == ("blocks.2.hook_mlp_out", "mine")
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(16), atol=1e-2, rtol=0)
    assert log_sparsity(tmp_path / "out") is not None


def test_signs_are_taken_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A TopK of twice as many latents with the same output; no other kind has signs."""
    out = tmp_path / "out"
    assert main(["convert", str(FIXTURES / "saelens/abstopk"), str(out), "--split-signs"]) == 0
    before, after = load_dictionary(FIXTURES / "saelens/abstopk"), load_dictionary(out)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    assert (after.architecture, after.d_sae) == ("topk", 32)
    torch.testing.assert_close(after(x), before(x))
    for name in ("saelens/topk", "clt/relu"):
        assert main(["convert", str(FIXTURES / name), str(tmp_path / "other"), "--split-signs"]) == 1
        assert "Only an AbsTopK dictionary has signs to split" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(FIXTURES / "saelens/topk"), tmp_path / "out"
    assert main(["convert", source, str(out), "--fold-decoder-norms"]) == 1
    assert "which latents are the largest" in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", source, str(out)]) == 0
    assert main(["convert", source, str(out)]) == 1
    assert "already there" in capsys.readouterr().err
    assert main(["convert", source, str(out), "--overwrite"]) == 0
    assert main(["convert", str(tmp_path), str(tmp_path / "other")]) == 1
    assert "There is no dictionary" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "other"), "--format", "nonsense"]) == 1
    assert "Unknown dictionary format" in capsys.readouterr().err


def test_the_shipped_dictionary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", str(tmp_path / "out")]) == 0
    assert (
        load_dictionary(tmp_path / "out").fingerprint == load_dictionary("demo").fingerprint in capsys.readouterr().out
    )
