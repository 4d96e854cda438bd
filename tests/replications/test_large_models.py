"""`recipes/llama_8b_mlp.sh` on a random Llama of the 8B's proportions, narrow and of four layers: the point that it reads, and the
whole recipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import microtome as mt
from microtome.activations import ModelSource
from microtome.common.artifacts import read_json
from microtome.common.errors import ConfigError
from microtome.model import HookedModel, load_model
from microtome.text import TokenDataset

RECIPE = Path(__file__).parents[2] / "recipes" / "llama_8b_mlp.sh"
POINT = "blocks.3.mlp.hook_post"


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3 8B: hidden 4,096, intermediate 3.5 times that, 32 query and 8 key/value heads, θ 500,000, ε 1e-5, untied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    home = tmp_path_factory.mktemp("llama") / "narrow-8b"
    LlamaForCausalLM(config).save_pretrained(home)
    tiny_tokenizer.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedModel:
    return load_model(folder, device="cpu")


def test_the_point_is_silu_gate_times_up_and_goes_below_zero(model: HookedModel, tiny_dataset: TokenDataset) -> None:
    part = tiny_dataset.slice(0, 6)
    inputs = list[Tensor]()
    mlp = model.hf.model.layers[3].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.hf(torch.from_numpy(part.batch(0, 6)))
    handle.remove()
    expected = functional.silu(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])
    is_text = torch.isin(torch.from_numpy(part.batch(0, 6)), torch.tensor(part.special_ids), invert=True)
    source = ModelSource(model, part, POINT)
    rows = source.read(0)
    assert source.widths == (224,)
    torch.testing.assert_close(rows, expected[is_text])
    assert (rows < 0).float().mean() > 0.2


def test_a_dictionary_of_another_point_is_refused(
    model: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    source = ModelSource(model, tiny_dataset, "blocks.2.mlp.hook_post")
    config = mt.TrainConfig(n_tokens=512, batch_size=128, device="cpu")
    mt.train(mt.TopKConfig(d_sae=32, k=4), source, out=tmp_path / "sae", config=config)
    with pytest.raises(ConfigError, match="another hook point"):
        mt.replicate(
            "towards_monosemanticity", model, preset="smoke", dictionary_folder=str(tmp_path / "sae"), context=32
        )


@pytest.mark.slow
def test_the_recipe_trains_and_reports(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog looked on. Whisk the eggs with sugar until pale.\n" * 1500)
    command = tmp_path / "bin" / "microtome"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m microtome.cli.main "$@"\n')
    command.chmod(0o755)
    sizes = {"TOKENS": 6000, "MEASURED": 24000, "CONTEXT": 32, "D_SAE": 128, "K": 4, "BATCH": 64, "LAYER": 3}
    out = tmp_path / "out"
    settings = {
        **os.environ,
        **{name: str(size) for name, size in sizes.items()},
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "MODEL": str(folder),
        "TEXT": str(text),
        "HELD_OUT": str(text),
        "OUT": str(out),
        "DTYPE": "fp32",
    }
    done = subprocess.run(["sh", str(RECIPE)], env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sae = mt.load_dictionary(out / "dictionary")
    assert (sae.hook_name, sae.d_in, sae.d_sae) == (POINT, 224, 128)
    claims = {claim["name"]: claim for claim in read_json(out / "report" / "report.json")["claims"]}
    assert claims["neurons_exact"]["verdict"] == "passed"
    assert claims["norms"]["verdict"] == "passed"
    assert 0 < claims["l0"]["measured"] < 64
    assert "Fires on" in (out / "sheets" / "features.md").read_text()
    assert not list(out.rglob("shard-*")), "no activations on the disk"
