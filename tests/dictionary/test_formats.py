"""SAELens v6 files: written and read back, and refused when damaged or of another kind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.makers import topk_dictionary

from microtome.common.errors import ArtifactError
from microtome.dictionary import Origin, load_dictionary, save_dictionary

ORIGIN = Origin.at("tiny", "blocks.1.hook_resid_pre", context=24, dataset="abc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_dictionary(topk_dictionary(8, 20, 3, origin=ORIGIN, center=torch.arange(8.0)), tmp_path)
    return tmp_path


def test_a_dictionary_survives_a_round_trip(folder: Path, tmp_path: Path) -> None:
    sae = load_dictionary(folder)
    assert sae.origin == ORIGIN
    assert (sae.d_in, sae.d_sae, sae.k) == (8, 20, 3)
    (tmp_path / "again").mkdir()
    save_dictionary(sae, tmp_path / "again")
    assert load_dictionary(tmp_path / "again").fingerprint == sae.fingerprint
    assert load_file(folder / "sae_weights.safetensors").keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_the_files_mean_what_saelens_says_they_mean(folder: Path) -> None:
    """Its TopK encoder, written out from the tensors: subtract b_dec, encode, keep k, rectify; decode, add b_dec."""
    t = load_file(folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "topk"
    assert cfg["apply_b_dec_to_input"] is True
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    kept = pre.topk(cfg["k"], dim=-1)
    f = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    torch.testing.assert_close(load_dictionary(folder)(x), f @ t["W_dec"] + t["b_dec"])


def test_files_without_our_config_are_read(folder: Path) -> None:
    """Only the two files of the format, with keys that this reader has never seen."""
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"]["something_new"] = 1
    cfg["something_else"] = None
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert load_dictionary(folder).hook_name == ORIGIN.inputs[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", "gated", "architecture 'gated'"),
        ("apply_b_dec_to_input", False, "apply_b_dec_to_input False"),
        ("normalize_activations", "layer_norm", "normalize_activations 'layer_norm'"),
        ("rescale_acts_by_decoder_norm", True, "rescale_acts_by_decoder_norm True"),
        ("k", "many", "k 'many'"),
        ("d_in", 9, r"W_enc \(8, 20\)"),
    ],
)
def test_kinds_that_cannot_be_read_yet_are_named(folder: Path, key: str, value: object, message: str) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, key: value}))
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(folder)


def test_damaged_and_missing_files(folder: Path, tmp_path: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if name != "b_enc"}, weights)
    with pytest.raises(ArtifactError, match="b_enc None"):
        load_dictionary(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged"):
        load_dictionary(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        load_dictionary(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_dictionary(folder)
    with pytest.raises(ArtifactError, match="There is no dictionary"):
        load_dictionary(tmp_path / "nowhere")
