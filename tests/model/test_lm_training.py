"""Training of small language models: that they learn, stop, go on and end the same, and what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from microtome.common.artifacts import read_head
from microtome.common.errors import ArtifactError, ConfigError, InputError
from microtome.model import load_model
from microtome.model.lm_training import KIND, LMTrainer, TrainLMConfig, next_token_loss, train_lm
from microtome.model.reference import ReferenceConfig
from microtome.text import TokenDataset, TokenizeConfig, tokenize_corpus
from microtome.text.corpora import MemoryCorpus

SIZES: dict[str, Any] = {"d_vocab": 320, "n_ctx": 24, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8}
QUICK: dict[str, Any] = {"n_steps": 12, "batch_size": 8, "warmup_steps": 2, "lr": 1e-2, "save_every": 5, "log_every": 3}


def model_config(**settings: Any) -> ReferenceConfig:
    return ReferenceConfig(**{**SIZES, **settings})


def train_config(**settings: Any) -> TrainLMConfig:
    return TrainLMConfig(**{**QUICK, "dtype": "fp32", "device": "cpu", **settings})


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, device="cpu").hf.state_dict())


# ---- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"d_mlp": 32, "activation": "solu", "positions": "shortformer", "tied": True}])
def test_the_loss_falls_and_the_curve_is_written(
    kind: dict[str, Any], tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    train = train_config(n_steps=60, valid_every=20)
    model = train_lm(model_config(**kind), tiny_dataset, out=tmp_path / "lm", train=train)
    steps = [row for row in rows(tmp_path / "lm") if "loss" in row]
    valid = [row for row in rows(tmp_path / "lm") if "valid_loss" in row]
    assert [row["step"] for row in valid] == [0, 20, 40, 60]
    assert valid[0]["valid_loss"] == pytest.approx(5.77, abs=0.5)  # ln 320: nothing is known yet
    assert valid[-1]["valid_loss"] < 3.0
    assert [row["step"] for row in steps] == list(range(3, 61, 3))
    assert all(row["tokens"] == row["step"] * 8 * 24 for row in steps)
    assert steps[-1]["loss"] < 3.0
    held_out = tiny_dataset.split(0.95)[1]
    tokens = torch.from_numpy(held_out.batch(0, len(held_out)))
    assert float(next_token_loss(model, tokens)) == pytest.approx(valid[-1]["valid_loss"], abs=1e-4)


def test_bf16_learns_as_well_and_keeps_its_weights_in_fp32(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    finals = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        model = train_lm(model_config(), tiny_dataset, out=out, train=train_config(n_steps=40, dtype=dtype))
        assert model.dtype == torch.float32
        finals.append(rows(out)[-1]["valid_loss"])
    assert finals[0] == pytest.approx(finals[1], abs=0.1)
    assert finals[0] != finals[1]


def test_one_step_is_adamw_with_decay_on_matrices_only(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    """Against torch's plain AdamW, clipping and schedule written out."""
    train = train_config(weight_decay=0.5, max_gradient_norm=0.1)
    trainer = LMTrainer(model_config(), tiny_dataset, tmp_path / "lm", train, None)
    twin = LMTrainer(model_config(), tiny_dataset, tmp_path / "twin", train, None)
    tokens = trainer._batch(0)
    next_token_loss(twin.model, tokens).backward()
    gradients = [p.grad for p in twin.model.parameters() if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    row = trainer._train_step()
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert row["lr"] == pytest.approx(1e-2 / 3)
    for new, old in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert old.grad is not None
        g = old.grad * (0.1 / (norm + 1e-6))
        decayed = old * (1 - row["lr"] * 0.5) if old.ndim == 2 else old
        torch.testing.assert_close(new, decayed - row["lr"] * g / (g.abs() + 1e-8))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    train = TrainLMConfig(n_steps=110, warmup_steps=10, lr=1.0, final_lr_fraction=0.2)
    assert train.lr_at(0) == pytest.approx(1 / 11)
    assert train.lr_at(10) == 1.0
    assert train.lr_at(60) == pytest.approx(0.6)
    assert train.lr_at(110) == pytest.approx(0.2)


def test_each_round_takes_other_batches_and_each_sequence_once(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    trainer = LMTrainer(model_config(), tiny_dataset, tmp_path / "lm", train_config(batch_size=8), None)
    per_round = len(trainer.data) // 8
    orders = [torch.from_numpy(trainer._shuffled(i)) for i in range(2)]
    assert torch.equal(orders[0].sort().values, torch.arange(len(trainer.data)))
    assert not torch.equal(*orders)
    again = trainer._batch(per_round)  # the first of the second round
    assert torch.equal(
        trainer._batch(0), torch.from_numpy(trainer.data.batch(0, len(trainer.data)))[orders[0][:8].sort().values]
    )
    assert torch.equal(trainer._batch(per_round), again)
    held_out = {tuple(row) for row in trainer.held_out.batch(0, len(trainer.held_out)).tolist()}
    assert len(trainer.data) + len(trainer.held_out) == len(tiny_dataset)
    assert held_out


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_checkpoints_are_models(
    tiny_dataset: TokenDataset, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    out = tmp_path / "lm"
    train = train_config(checkpoint_every=5)
    model = train_lm(model_config(), tiny_dataset, out=out, train=train, tokenizer=tiny_tokenizer)
    folders = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step-{i:07d}" for i in (0, 1, 2, 4, 5, 8, 10, 12)]
    first, last = load_model(folders[0], device="cpu"), load_model(folders[-1], device="cpu")
    assert torch.equal(last("The cat sat"), model("The cat sat"))
    fresh = LMTrainer(model_config(), tiny_dataset, tmp_path / "fresh", train, None).hf.hooked(tiny_tokenizer)
    assert torch.equal(first("The cat sat"), fresh("The cat sat"))
    assert model.to_string(model.to_tokens("The cat")[0]).endswith("The cat")  # type: ignore[union-attr]
    shared = {(folder / "tokenizer.json").stat().st_ino for folder in [*folders, out]}
    assert len(shared) == 1
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "provenance.json", "training.jsonl"}
    assert not {p.name for p in out.iterdir()} & {"final", "tokenizer", "state.safetensors"}
    assert read_head(out, KIND)["train"]["n_steps"] == 12
    assert model.hf.generation_config is not None
    assert model.hf.generation_config.eos_token_id == tiny_dataset.config["separator_id"]


def test_the_same_training_gives_the_same_weights(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_lm(model_config(), tiny_dataset, out=tmp_path / name, train=train_config(seed=seed))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.unembed.weight"], c["transformer.unembed.weight"])


_PROGRAM = """
import sys, time
from microtome.model import lm_training
from microtome.model.reference import ReferenceConfig
from microtome.text import TokenDataset
dataset, out, sizes, quick = TokenDataset.open(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
log = lm_training.LMTrainer._log
def slowly(self, row):
    log(self, row)
    time.sleep(0.1)
lm_training.LMTrainer._log = slowly
lm_training.train_lm(ReferenceConfig(**sizes), dataset, out=out, train=lm_training.TrainLMConfig(**quick))
"""


def test_killed_and_started_again_it_ends_the_same(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    settings = {**QUICK, "n_steps": 60, "log_every": 1, "dtype": "fp32", "device": "cpu", "checkpoint_every": 20}
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", _PROGRAM, str(tiny_dataset.path), str(out), repr(SIZES), repr(settings)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(arguments, env={**os.environ, **threads}) as process:
        partial = tmp_path / "killed.partial"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (partial / "checkpoints/step-0000016").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert (partial / "state.safetensors").exists()
    train = TrainLMConfig(**settings)
    train_lm(model_config(), tiny_dataset, out=out, train=train)
    train_lm(model_config(), tiny_dataset, out=tmp_path / "whole", train=train)
    resumed, whole = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert rows(out) == rows(tmp_path / "whole")
    for step in ("step-0000016", "step-0000040"):
        a, b = (weights(tmp_path / name / "checkpoints" / step) for name in ("killed", "whole"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_saved(
    tiny_dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = train_config()
    trainer = LMTrainer(model_config(), tiny_dataset, tmp_path / "lm", train, None)
    step = LMTrainer._train_step

    def poisoned(self: LMTrainer) -> dict[str, float]:
        if self.step == 7:
            self.model.embed.weight.data[3:] = torch.inf
        return step(self)

    monkeypatch.setattr(LMTrainer, "_train_step", poisoned)
    with pytest.raises(InputError, match=r"went wrong at step 7.*nan"):
        trainer.run()
    monkeypatch.undo()
    partial = tmp_path / "lm.partial"
    assert load_model(partial / "checkpoints/step-0000004", device="cpu").W_E.isfinite().all()
    train_lm(model_config(), tiny_dataset, out=tmp_path / "lm", train=train)  # goes on from step 5
    train_lm(model_config(), tiny_dataset, out=tmp_path / "whole", train=train)
    a, b = weights(tmp_path / "lm"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr must"),
        ({"n_steps": 0}, "n_steps"),
        ({"betas": (0.9,)}, "betas"),
        ({"valid_fraction": 0.0}, "valid_fraction"),
        ({"checkpoints": (3, 99)}, "checkpoints"),
        ({"save_every": 0}, "_every"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_config(**settings)


def test_what_does_not_fit_together_is_refused(
    tiny_dataset: TokenDataset, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    out = tmp_path / "lm"
    with pytest.raises(ConfigError, match="tokens that the model has not"):
        train_lm(model_config(d_vocab=300), tiny_dataset, out=out)
    with pytest.raises(ConfigError, match="longer than the context"):
        train_lm(model_config(n_ctx=23), tiny_dataset, out=out)
    with pytest.raises(ConfigError, match="not one batch"):
        train_lm(model_config(), tiny_dataset, out=out, train=train_config(batch_size=10_000))
    other = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>")
    other.add_tokens(["hippopotamus"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        train_lm(model_config(), tiny_dataset, out=out, tokenizer=other)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    out = tmp_path / "lm"
    train_lm(model_config(), tiny_dataset, out=out, train=train_config())
    before = weights(out)
    with pytest.raises(ArtifactError, match="already there"):
        train_lm(model_config(), tiny_dataset, out=out, train=train_config())
    (tmp_path / "lm.partial").mkdir()
    train_lm(model_config(), tiny_dataset, out=out, train=train_config(seed=1), overwrite=True)
    assert not torch.equal(before["transformer.embed.weight"], weights(out)["transformer.embed.weight"])


def test_another_training_in_the_same_place_is_refused(tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    LMTrainer(model_config(), tiny_dataset, tmp_path / "lm", train_config(), None)
    with pytest.raises(ArtifactError, match=r"train\.lr: 0\.01 there, 0\.1 asked for"):
        LMTrainer(model_config(), tiny_dataset, tmp_path / "lm", train_config(lr=0.1), None)


def test_a_dataset_without_bos_trains_too(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = MemoryCorpus.of(["one two three four five six seven eight"] * 40)
    config = TokenizeConfig(context=8, bos="none", separator="none")
    dataset = tokenize_corpus(texts, tiny_tokenizer, tmp_path / "tokens", config=config)
    model = train_lm(model_config(), dataset, out=tmp_path / "lm", train=train_config(), tokenizer=tiny_tokenizer)
    assert model.hf.generation_config is not None
    assert model.hf.generation_config.eos_token_id is None
