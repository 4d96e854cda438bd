"""Harvesting and the store: against single forward passes, stopped and resumed, refused, damaged."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from microtome.activations import ActivationStore, HarvestConfig, harvest
from microtome.activations.harvest import _sequences_per_shard
from microtome.common.artifacts import read_json, write_json
from microtome.common.device import DTypeName
from microtome.common.errors import ArtifactError, ConfigError, InputError, ModelError
from microtome.model import HookedModel, load_model
from microtome.text import TokenDataset

NAMES = ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.2.hook_resid_pre"]
CONFIG = HarvestConfig(dtype="fp32", batch_tokens=96, shard_tokens=480)


@pytest.fixture
def store(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> ActivationStore:
    return harvest(tiny_llama, tiny_dataset, NAMES, tmp_path / "store", config=CONFIG)


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != "provenance.json"}


def test_a_store_holds_what_the_model_computes(
    store: ActivationStore, tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    assert len(store.shards) > 3
    assert store.n_sequences == tiny_dataset.n_sequences
    assert set(store.hook_names) == set(NAMES)
    for start, stop in ((0, 3), (18, 23), (store.n_sequences - 1, store.n_sequences)):
        tokens = torch.from_numpy(tiny_dataset.batch(start, stop))
        assert torch.equal(store.tokens(start, stop), tokens.int())
        _, cache = tiny_llama.run_with_cache(tokens)
        for name in NAMES:
            torch.testing.assert_close(store.read(name, start, stop), cache[name].flatten(2))


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_stores_round_the_same_values(
    tiny_llama: HookedModel,
    tiny_dataset: TokenDataset,
    tmp_path: Path,
    store: ActivationStore,
    dtype: DTypeName,
    bits: torch.dtype,
) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    half = harvest(tiny_llama, tiny_dataset, NAMES[0], tmp_path / dtype, config=config)
    assert torch.equal(half.read(NAMES[0], 0, 9), store.read(NAMES[0], 0, 9).to(bits))


def test_a_value_that_fp16_cannot_hold_is_an_error(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    grow = tiny_llama.hooks([("blocks.0.hook_resid_pre", lambda act, hook: act * 1e6)])
    with pytest.raises(InputError, match=r"not finite in fp16.*bf16 or fp32"), grow:
        harvest(
            tiny_llama, tiny_dataset, "blocks.0.hook_resid_post", tmp_path / "s", config=HarvestConfig(dtype="fp16")
        )


@pytest.mark.parametrize(("width", "sequences"), [(576, 1024), (60 * 576, 121), (10**7, 32)])
def test_a_shard_is_of_at_most_a_gib_or_one_batch(width: int, sequences: int) -> None:
    """Of 128 tokens in bf16: the 131,072 tokens asked for; 2^30 // (60 · 576 · 2 · 128); 4,096 tokens."""
    assert _sequences_per_shard(HarvestConfig(), 128, width) == sequences


def test_a_shard_of_another_size_that_a_stopped_harvest_left_is_made_again(
    store: ActivationStore, tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    """As one from a version that cut them otherwise would be."""
    partial = tmp_path / "other.partial"
    partial.mkdir()
    write_json(partial / "config.json", read_json(store.path / "config.json"))
    first = read_json(store.path / "manifest.json")["shards"][0]
    (partial / first["file"]).write_bytes((store.path / first["file"]).read_bytes())
    write_json(partial / "shard-00000.json", {**first, "stop": first["stop"] + 3})
    again = harvest(tiny_llama, tiny_dataset, NAMES, tmp_path / "other", config=CONFIG)
    assert [(each.start, each.stop) for each in again.shards] == [(each.start, each.stop) for each in store.shards]
    assert torch.equal(again.read(NAMES[0], 0, 9), store.read(NAMES[0], 0, 9))


HARVEST = """
import sys, torch
from transformers import LlamaForCausalLM
from microtome.activations import HarvestConfig, harvest
from microtome.model import load_model
from microtome.text import TokenDataset
model = load_model(sys.argv[1], device="cpu")
harvest(model, TokenDataset.open(sys.argv[2]), ["blocks.2.hook_resid_pre"], sys.argv[3],
        config=HarvestConfig(dtype="bf16", batch_tokens=24, shard_tokens=240))
"""


@pytest.mark.slow
def test_a_killed_harvest_resumes_to_the_same_bytes(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    """Killed with SIGKILL in a process of its own, once some shards are there."""
    folder = tmp_path / "model"
    tiny_llama.hf.save_pretrained(folder)

    process = subprocess.Popen(
        [sys.executable, "-c", HARVEST, str(folder), str(tiny_dataset.path), str(tmp_path / "killed")]
    )
    partial = tmp_path / "killed.partial"
    while process.poll() is None and len(list(partial.glob("shard-*.json"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    done_before = {f.name: f.stat().st_mtime_ns for f in partial.glob("shard-*.safetensors")}
    assert 2 <= len(done_before) < 10

    config = HarvestConfig(dtype="bf16", batch_tokens=24, shard_tokens=240)
    for out in ("killed", "whole"):
        harvest(
            load_model(folder, device="cpu"), tiny_dataset, "blocks.2.hook_resid_pre", tmp_path / out, config=config
        )
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    receipts = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "killed").glob("shard-*.safetensors")}
    assert sum(receipts[name] == made for name, made in done_before.items()) >= 2, "finished shards were made again"


def test_the_same_harvest_again_opens_the_store(
    store: ActivationStore, tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    before = (store.path / "manifest.json").stat().st_mtime_ns
    again = harvest(tiny_llama, tiny_dataset, NAMES, store.path, config=CONFIG)
    assert again.fingerprint == store.fingerprint
    assert (store.path / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_are_refused_with_the_difference_named(
    store: ActivationStore, tiny_llama: HookedModel, tiny: object, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"harvest\.dtype: 'fp32' there, 'bf16' asked for"):
        harvest(tiny_llama, tiny_dataset, NAMES, store.path, config=dataclasses.replace(CONFIG, dtype="bf16"))
    with pytest.raises(ArtifactError, match=r"dataset\.n_sequences"):
        harvest(tiny_llama, tiny_dataset.slice(0, 5), NAMES, store.path, config=CONFIG)
    other = HookedModel(tiny_llama.hf, tiny_llama.tokenizer, name="another", spec=tiny_llama.spec)
    with pytest.raises(ArtifactError, match=r"model\.name: 'tiny-llama' there, 'another' asked for"):
        harvest(other, tiny_dataset, NAMES, store.path, config=CONFIG)
    replaced = harvest(tiny_llama, tiny_dataset.slice(0, 5), NAMES, store.path, config=CONFIG, overwrite=True)
    assert replaced.n_sequences == 5


def test_a_draft_of_other_settings_is_refused(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    made = harvest(tiny_llama, tiny_dataset, NAMES, tmp_path / "s", config=CONFIG)
    made.path.rename(tmp_path / "s.partial")
    with pytest.raises(ArtifactError, match="begun with other settings"):
        harvest(tiny_llama, tiny_dataset, NAMES[:1], tmp_path / "s", config=CONFIG)


def test_a_changed_byte_is_found_when_the_shard_is_read(store: ActivationStore) -> None:
    shard = store.path / store.shards[1].file
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    opened = ActivationStore.open(store.path)
    opened.read(NAMES[0], 0, 1)  # the first shard is sound
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors is damaged"):
        opened.read(NAMES[0], store.shards[1].start, store.shards[1].stop)
    with pytest.raises(ArtifactError, match="damaged"):
        opened.verify()


def test_a_cut_or_missing_shard_is_found_when_the_store_is_opened(store: ActivationStore) -> None:
    shard = store.path / store.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"damaged.*bytes"):
        ActivationStore.open(store.path)
    shard.unlink()
    with pytest.raises(ArtifactError, match="no file"):
        ActivationStore.open(store.path)


def test_reading_what_is_not_there(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"blocks\.1\.hook_resid_pre"):
        store.read("blocks.1.hook_resid_pst", 0, 1)
    with pytest.raises(InputError, match="not in the store"):
        store.read(NAMES[0], 0, 10_000)
    with pytest.raises(ArtifactError, match="There is no activation_store"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="expected|Expected: a activation_store"):
        write_json(tmp_path / "config.json", {**read_json(store.path / "config.json"), "kind": "dictionary"})
        ActivationStore.open(tmp_path)


def test_bad_hook_points_and_tokenizers(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Unknown hook point"):
        harvest(tiny_llama, tiny_dataset, "blocks.1.hook_resid", tmp_path / "s")
    with pytest.raises(ConfigError, match="at least one batch"):
        HarvestConfig(batch_tokens=100, shard_tokens=50)
    assert list(tmp_path.iterdir()) == []
