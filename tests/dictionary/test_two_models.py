"""A crosscoder of two models, trained on a `PairedSource`, saved and opened; a dictionary of rows in a file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import microtome as mt
from microtome.activations import ArraySource, ModelSource, PairedSource
from microtome.model import HookedModel
from microtome.text import TokenDataset

CONFIG = mt.TrainConfig(n_tokens=6400, batch_size=64, lr=3e-3, warmup_steps=5, device="cpu")


def test_a_crosscoder_of_two_models(
    tiny: Callable[[str], HookedModel], tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    point = "blocks.2.hook_resid_pre"
    pair = PairedSource(*(ModelSource(tiny(family), tiny_dataset, point) for family in ("llama", "gpt2")))
    config = mt.BatchTopKConfig(d_sae=96, k=8, inputs=pair.hook_names)
    [made] = mt.train(config, pair, out=tmp_path / "crosscoder", config=CONFIG)
    opened = mt.load_dictionary(tmp_path / "crosscoder")
    assert opened.origin.inputs == opened.origin.outputs == pair.hook_names
    assert opened.model_name == "tiny-llama+tiny-gpt2"
    rows = torch.cat([pair.read(block) for block in range(pair.n_blocks)])
    torch.testing.assert_close(made(rows), opened(rows))
    for part in (slice(0, 32), slice(32, 64)):  # each model's half is explained, not only the larger one's
        x, error = rows[:, part], (opened(rows) - rows)[:, part]
        assert float(error.square().sum() / (x - x.mean(0)).square().sum()) < 0.5


def test_a_dictionary_of_a_file(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    [from_file] = mt.train(
        mt.TopKConfig(d_sae=16, k=4), ArraySource(tmp_path / "rows.npy"), out=tmp_path / "a", config=CONFIG
    )
    [from_memory] = mt.train(
        mt.TopKConfig(d_sae=16, k=4), ArraySource(torch.from_numpy(rows)), out=tmp_path / "b", config=CONFIG
    )
    assert from_file.fingerprint == from_memory.fingerprint
    assert from_file.hook_name == "rows"
