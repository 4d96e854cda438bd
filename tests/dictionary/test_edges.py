"""Trainings at the edges: constant dimensions, λ = 0, k = d_sae, a wide anneal of k, everything dead, short stores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.activations.array import ArraySource
from microtome.common.errors import InputError
from microtome.dictionary import Dictionary, TrainConfig, train
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
)

SIZES: dict[str, Any] = {"d_sae": 32, "dead_after": 256}
CONFIG = TrainConfig(n_tokens=64 * 30, batch_size=64, lr=3e-3, warmup_steps=3, device="cpu")
EDGES: dict[str, DictionaryConfig] = {
    "relu-without-penalty": ReLUConfig(**SIZES, coefficient=0.0),
    "p-anneal-without-penalty": PAnnealConfig(**SIZES, coefficient=0.0),
    "gated-without-penalty": GatedConfig(**SIZES, coefficient=0.0),
    "jumprelu-without-penalty": JumpReLUConfig(**SIZES, coefficient=0.0),
    "relu-silent": ReLUConfig(**SIZES, coefficient=1e6),
    "p-anneal-silent": PAnnealConfig(**SIZES, coefficient=1e6),
    "gated-silent-ghost": GatedConfig(**SIZES, coefficient=1e6, revival="ghost"),
    "jumprelu-silent-resampled": JumpReLUConfig(
        **SIZES, coefficient=1e6, revival="resample", resample_every=5, start_threshold=50.0
    ),
    "topk-all": TopKConfig(**SIZES, k=32),
    "batchtopk-all": BatchTopKConfig(**SIZES, k=32),
    "topk-annealed": TopKConfig(**SIZES, k=2, k_start=32, k_anneal=0.5),
    "matryoshka-ghost": MatryoshkaConfig(**SIZES, k=2, revival="ghost"),
}


def rows(n: int = 1024) -> Float[Tensor, "n 12"]:
    """Rows of which some dimensions never change, and one is much larger than all others."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    x[:, 3:6] = 2.0
    x[:, 7] = x[:, 7] * 100 + 500
    return x


def made(config: DictionaryConfig, folder: Path) -> Dictionary:
    [sae] = train(config, ArraySource(rows()), out=folder, config=CONFIG)
    assert isinstance(sae, Dictionary)
    return sae


@pytest.mark.parametrize("name", EDGES)
def test_weights_stay_finite(name: str, tmp_path: Path) -> None:
    sae = made(EDGES[name], tmp_path / "sae")
    assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())
    assert bool(torch.isfinite(sae(rows())).all())


def test_k_of_all_latents_and_an_annealed_k_end_as_said(tmp_path: Path) -> None:
    every = made(EDGES["topk-all"], tmp_path / "all").encode(rows())
    annealed = made(EDGES["topk-annealed"], tmp_path / "annealed").encode(rows())
    assert every.indices.shape[1] == 32
    assert float(annealed.l0.max()) <= 2


def test_a_source_shorter_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fewer activations than one batch"):
        train(EDGES["topk-all"], ArraySource(rows(40)), out=tmp_path / "sae", config=CONFIG)
    assert not (tmp_path / "sae").exists()


def test_the_threshold_in_use_gives_the_l0_of_the_training(tmp_path: Path) -> None:
    x = torch.randn(8192, 24, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(n_tokens=256 * 200, batch_size=256, lr=3e-3, device="cpu")
    for norms in ("unit", "free"):
        sizes: dict[str, Any] = {"d_sae": 64, "k": 4, "norms": norms}
        [sae] = train(BatchTopKConfig(**sizes), ArraySource(x), out=tmp_path / norms, config=config)
        assert isinstance(sae, Dictionary)
        assert float(sae.encode(x).l0.double().mean()) == pytest.approx(4.0, rel=0.05)
