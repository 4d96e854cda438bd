"""Training: it learns known features, resumes exactly, guards against NaN, revives the dead, and reads stores and models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.activations import ActivationSource, HarvestConfig, ModelSource, harvest
from microtome.common.config import JsonObject
from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.dictionary import TopKConfig, TrainConfig, load_dictionary, train
from microtome.dictionary.config import DictionaryConfig, JumpReLUConfig
from microtome.dictionary.statistics import geometric_median
from microtome.dictionary.trainer import Trainer
from microtome.model import HookedModel
from microtome.text import TokenDataset

HOOK = "blocks.2.hook_resid_pre"
ARCHITECTURE = TopKConfig(d_sae=64, k=4, dead_after=500)
CONFIG = TrainConfig(n_tokens=64 * 40, batch_size=64, buffer_size=512, warmup_steps=5, lr=3e-3, checkpoint_every=16)


class Synthetic(ActivationSource):
    """Rows that are sparse non-negative sums of known unit directions, far from the origin and of any scale."""

    hook_names, widths, model_name, n_blocks = ("blocks.0.hook_resid_pre",), (16,), "synthetic", 64

    def __init__(self, n_features: int = 24, active: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = functional.normalize(torch.randn(n_features, self.d, generator=generator), dim=1)
        self.active, self.spoiled = active, False

    @property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        return np.full(self.n_blocks, 256)

    def read(self, block: int) -> Float[Tensor, "row d"]:
        generator = torch.Generator().manual_seed(block + 1)
        chosen = torch.rand(256, len(self.features), generator=generator).topk(self.active).indices
        strength = torch.rand(256, self.active, generator=generator) + 0.5
        codes = torch.zeros(256, len(self.features)).scatter_(1, chosen, strength)
        rows = 30 * (codes @ self.features) + 5
        return rows * float("nan") if self.spoiled and block % 2 else rows

    def describe(self) -> JsonObject:
        return {"kind": "synthetic", "dataset": {"fingerprint": "0", "context": 1, "special_ids": [0]}}


@pytest.mark.parametrize(
    ("said", "n_tokens", "dead_after"),
    [(None, 5_000, 500), (None, 50_000_000, 1_000_000), (None, 64, 6), (700, 5_000, 700)],
    ids=["a-tenth", "at-most-a-million", "tiny", "said"],
)
def test_after_how_many_tokens_a_latent_is_dead(
    said: int | None, n_tokens: int, dead_after: int, tmp_path: Path
) -> None:
    architecture = TopKConfig(d_sae=8, k=2, dead_after=said)
    trainer = Trainer([architecture], Synthetic(), tmp_path / "x", TrainConfig(n_tokens=n_tokens, batch_size=64))
    [group] = trainer.groups
    group.silent[0, 0] = dead_after - 1
    group.silent[0, 1] = dead_after
    assert group.dead[0].tolist() == [False, True, *[False] * 6]


def test_it_finds_the_features_that_the_data_is_made_of(tmp_path: Path) -> None:
    source = Synthetic()
    architecture = TopKConfig(d_sae=48, k=3, dead_after=4000)
    config = TrainConfig(n_tokens=200_000, batch_size=256, lr=3e-3, warmup_steps=50)
    [sae] = train(architecture, source, out=tmp_path / "sae", config=config)
    cosines = functional.normalize(sae.W_dec, dim=1) @ source.features.T
    assert float(cosines.max(0).values.median()) > 0.95
    x = source.read(0)
    assert float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.1


def weights(sae: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize(
    "architecture", [ARCHITECTURE, JumpReLUConfig(d_sae=64, dead_after=500)], ids=["topk", "jumprelu-two-rates"]
)
def test_a_stopped_training_resumes_to_the_same_weights(architecture: DictionaryConfig, tmp_path: Path) -> None:
    [whole] = train(architecture, Synthetic(), out=tmp_path / "whole", config=CONFIG)
    stopped = Trainer([architecture], Synthetic(), tmp_path / "stopped", CONFIG)
    batches = stopped.begin()
    while stopped.step < 27:  # a checkpoint at 16, and eleven steps that will be lost
        for row in stopped.train_step(next(batches)):
            stopped._log(row)
        if stopped.step % CONFIG.checkpoint_every == 0:
            stopped.save_checkpoint()
    del stopped
    resumed = Trainer([architecture], Synthetic(), tmp_path / "stopped", CONFIG)
    resumed.begin()
    assert resumed.step == 16
    [sae] = train(architecture, Synthetic(), out=tmp_path / "stopped", config=CONFIG)
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(sae).items())
    assert sae.fingerprint == whole.fingerprint
    logs = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "stopped").glob("checkpoint*"))


def test_a_seed_gives_one_dictionary_and_another_seed_another(tmp_path: Path) -> None:
    prints = [
        train(ARCHITECTURE, Synthetic(), out=tmp_path / str(i), config=dataclasses.replace(CONFIG, seed=seed))[
            0
        ].fingerprint
        for i, seed in enumerate((0, 0, 1))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_dead_latents_come_back_with_the_auxiliary_loss(tmp_path: Path) -> None:
    """Half of the latents begin with encoders so small that they are never among the k largest."""

    def dead(coefficient: float) -> int:
        architecture = TopKConfig(d_sae=64, k=3, dead_after=8000, aux_coefficient=coefficient, aux_k=16)
        config = TrainConfig(n_tokens=100_000, batch_size=256, lr=3e-3)
        trainer = Trainer([architecture], Synthetic(n_features=60), tmp_path / str(coefficient), config)
        batches = trainer.begin()
        with torch.no_grad():
            trainer.groups[0].stack.encoder[0, :32] *= 1e-3
        while trainer.step < config.n_steps:
            trainer.train_step(next(batches))
        return int(trainer.groups[0].dead[0, :32].sum())

    assert dead(0.0) > 28
    assert dead(1 / 8) < 8


def test_nan_in_the_data_stops_the_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer([ARCHITECTURE], Synthetic(), tmp_path / "sae", CONFIG)
    batches = trainer.begin()
    for _ in range(16):
        trainer.train_step(next(batches))
    trainer.save_checkpoint()
    spoiled = Synthetic()
    spoiled.spoiled = True
    with pytest.raises(InputError, match="NaN or infinity"):
        train(ARCHITECTURE, spoiled, out=tmp_path / "sae", config=CONFIG)
    state = json.loads((tmp_path / "sae.partial" / "checkpoint.json").read_text())
    assert state["step"] == 16
    [sae] = train(ARCHITECTURE, Synthetic(), out=tmp_path / "sae", config=CONFIG)
    assert all(bool(torch.isfinite(p).all()) for p in sae.parameters())


def test_constant_and_nan_activations_are_refused_at_once(tmp_path: Path) -> None:
    class Constant(Synthetic):
        def read(self, block: int) -> Float[Tensor, "row d"]:
            return torch.ones(256, self.d)

    with pytest.raises(InputError, match="all equal"):
        train(ARCHITECTURE, Constant(), out=tmp_path / "a", config=CONFIG)

    class Spoiled(Synthetic):
        def read(self, block: int) -> Float[Tensor, "row d"]:
            return torch.full((256, self.d), float("inf"))

    with pytest.raises(InputError, match="NaN or infinity"):
        train(ARCHITECTURE, Spoiled(), out=tmp_path / "b", config=CONFIG)


def test_from_a_store_and_straight_from_the_model(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    """Batches agree to rounding (other batch shapes in the forward pass), so the dictionaries nearly do."""
    store = harvest(tiny_llama, tiny_dataset, HOOK, tmp_path / "acts", config=HarvestConfig(dtype="fp32"))
    [stored] = train(ARCHITECTURE, tmp_path / "acts", out=tmp_path / "a", config=CONFIG)
    [streamed] = train(ARCHITECTURE, ModelSource(tiny_llama, tiny_dataset, HOOK), out=tmp_path / "b", config=CONFIG)
    assert stored.hook_name == streamed.hook_name == HOOK
    assert stored.model_name == "tiny-llama"
    x = store.read(HOOK, 0, 8)[:, 1:].flatten(0, 1)
    a, b = stored(x), streamed(x)
    assert float((a - b).square().sum() / (x - x.mean(0)).square().sum()) < 0.02


def test_several_configs_give_several_dictionaries(tmp_path: Path) -> None:
    configs = [ARCHITECTURE, TopKConfig(d_sae=32, k=2)]
    saes = train(configs, Synthetic(), out=tmp_path / "sweep", config=CONFIG)
    assert [(s.d_sae, s.k) for s in saes] == [(64, 4), (32, 2)]
    assert load_dictionary(tmp_path / "sweep" / "1").d_sae == 32


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    train(ARCHITECTURE, Synthetic(), out=tmp_path / "sae", config=CONFIG)
    with pytest.raises(ArtifactError, match="already there"):
        train(ARCHITECTURE, Synthetic(), out=tmp_path / "sae", config=CONFIG)
    [again] = train(TopKConfig(d_sae=32, k=2), Synthetic(), out=tmp_path / "sae", config=CONFIG, overwrite=True)
    assert again.d_sae == 32


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(n_tokens=100 * 10, batch_size=10, lr=1.0, warmup_steps=9, decay_fraction=0.2)
    rates = [config.lr_at(step, 64) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:80], 1.0)
    np.testing.assert_allclose(rates[80:], np.arange(20, 0, -1) / 20)
    assert TrainConfig().lr_at(200, 4096) == pytest.approx(2e-3)
    assert TrainConfig().lr_at(200, 65_536) == pytest.approx(5e-4)
    assert TrainConfig().lr_at(200, 64) == pytest.approx(3e-3)


def test_figures_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(ARCHITECTURE, Synthetic(), out=tmp_path / "sae", config=dataclasses.replace(CONFIG, log_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "sae" / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "sae" / "training.jsonl").read_text().splitlines()]
    assert [e.value for e in events.Scalars("fvu")] == pytest.approx([row["fvu"] for row in logged], rel=1e-6)


def test_the_geometric_median_minimises_the_sum_of_distances() -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    rows[:10] += 1000
    median = geometric_median(rows, steps=200)
    total = (rows - median).norm(dim=1).sum()
    nudges = torch.eye(5).repeat(2, 1) * torch.tensor([[0.05]] * 5 + [[-0.05]] * 5)
    assert all((rows - (median + nudge)).norm(dim=1).sum() > total for nudge in nudges)
    assert float(median.norm()) < 1.0 < float(rows.mean(0).norm())


def test_bad_configs() -> None:
    with pytest.raises(ConfigError, match="must hold a batch"):
        TrainConfig(n_tokens=10, batch_size=20)
    with pytest.raises(ConfigError, match="lr must be positive"):
        TrainConfig(lr=0.0)
