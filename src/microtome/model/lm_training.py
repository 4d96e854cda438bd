"""Training of a small language model: the transformer of `reference.py` on a token dataset.

1. The last part of the dataset is held out. The rest is gone through in an order shuffled anew each time, so batch `i` is
   a function of the seed and `i` alone.
2. Each step: next-token loss, gradients clipped to a largest norm, AdamW with decay on matrices only, a learning rate that
   warms up and then falls along a cosine.
3. At the steps of `checkpoint_steps` the model is written to `checkpoints/step-…`, each a folder that `load_model` opens:
   many early on, since that is when much happens.
4. Every `save_every` steps the state (weights and Adam's moments) is written to the draft folder. A training that was
   stopped goes on from there and ends with the same weights.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from microtome.common.artifacts import CONFIG, Draft, atomic_file, draft, read_json, write_json
from microtome.common.config import require, to_dict
from microtome.common.device import fast_dtype, generator, parse_device, parse_dtype
from microtome.common.errors import ConfigError, InputError
from microtome.common.progress import progress
from microtome.model.hooked import HookedModel
from microtome.model.load import load_model
from microtome.model.reference import ReferenceConfig
from microtome.model.reference_hf import ReferenceTransformer
from microtome.text import TokenDataset, tokenizer_fingerprint

KIND = "language_model"
LOG, CHECKPOINTS = "training.jsonl", "checkpoints"
_STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainLMConfig:
    """How to train. A batch is `batch_size` sequences of the dataset.

    The learning rate rises to `lr` over `warmup_steps` and falls to `final_lr_fraction` of it. `checkpoints` None means
    0, 1, 2, 4, …, every `checkpoint_every` steps, and the last. `valid_fraction` of the sequences are held out; the loss
    on up to `valid_sequences` of them is measured every `valid_every` steps. `dtype` "auto" multiplies in bf16 where the
    hardware has it (weights stay fp32).
    """

    n_steps: int = 2000
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    checkpoints: tuple[int, ...] | None = None
    checkpoint_every: int = 500
    save_every: int = 200
    log_every: int = 10
    valid_fraction: float = 0.05
    valid_sequences: int = 256
    valid_every: int = 200
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        require(self.n_steps > 0 and self.batch_size > 0, "n_steps and batch_size must be positive")
        require(self.lr > 0, "lr must be positive", got=self.lr)
        require(self.warmup_steps >= 0 and self.weight_decay >= 0, "warmup_steps and weight_decay must not be negative")
        require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction must be in [0, 1]", got=self.final_lr_fraction)
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(in_range, "betas are two numbers in [0, 1)", got=self.betas)
        require(self.max_gradient_norm > 0, "max_gradient_norm must be positive", got=self.max_gradient_norm)
        require(0 < self.valid_fraction < 1, "valid_fraction must be between 0 and 1", got=self.valid_fraction)
        counts = (self.checkpoint_every, self.save_every, self.log_every, self.valid_every, self.valid_sequences)
        require(min(counts) > 0, "The …_every settings and valid_sequences must be positive", got=counts)
        inside = all(0 <= step <= self.n_steps for step in self.checkpoints or ())
        require(
            inside, "checkpoints must be steps of this training", got=self.checkpoints, expected=f"0 to {self.n_steps}"
        )

    @property
    def checkpoint_steps(self) -> frozenset[int]:
        """After how many updates the model is written down."""
        if self.checkpoints is not None:
            return frozenset(self.checkpoints)
        powers = (1 << i for i in range(self.n_steps.bit_length()))
        return frozenset({0, self.n_steps, *powers, *range(0, self.n_steps, self.checkpoint_every)})

    def lr_at(self, step: int) -> float:
        """The learning rate of the update `step` (from 0)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        way = (step - self.warmup_steps) / max(self.n_steps - self.warmup_steps, 1)
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * (1 + math.cos(math.pi * way)) / 2)


def train_lm(
    config: ReferenceConfig,
    dataset: TokenDataset,
    *,
    out: str | Path,
    train: TrainLMConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> HookedModel:
    """Train a model from nothing and return it, saved at `out` with its checkpoints and its loss curve.

    `tokenizer`, the one that made the dataset, is saved beside the weights. A training that was stopped goes on where its
    state was last saved. Raises ConfigError where model, dataset and tokenizer do not fit each other, InputError when loss
    or gradient stop being numbers (what was saved before is kept).
    """
    return LMTrainer(config, dataset, Path(out), train or TrainLMConfig(), tokenizer, overwrite=overwrite).run()


def next_token_loss(model: Callable[[Tensor], Tensor], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of each token given those before it. The last token is only asked for, never asked."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


class LMTrainer:
    """One training: model, optimiser, place in the data, and the draft folder with state, checkpoints and log."""

    def __init__(
        self,
        config: ReferenceConfig,
        dataset: TokenDataset,
        out: Path,
        train: TrainLMConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        overwrite: bool = False,
    ) -> None:
        _check_fit(config, dataset, tokenizer)
        self.train, self.tokenizer, self.overwrite = train, tokenizer, overwrite
        self.data, self.held_out = dataset.split(1 - train.valid_fraction)
        if len(self.data) < train.batch_size:
            raise ConfigError(
                "There is not one batch to train on",
                got=f"{len(self.data)} sequences beside the held-out part",
                expected=f"batch_size {train.batch_size} or more",
            )
        self.device = parse_device(train.device)
        self.dtype = fast_dtype(self.device) if train.dtype == "auto" else parse_dtype(train.dtype)
        about = {"path": str(dataset.path), "fingerprint": dataset.fingerprint, "context": dataset.context}
        settings = {"model": to_dict(config), "train": to_dict(train), "dataset": about}
        self.draft: Draft = draft(out, KIND, settings, overwrite=overwrite, resume=True)
        self.step = 0
        self._round, self._order = 0, self._shuffled(0)
        self.hf = ReferenceTransformer.build(config, train.seed)
        separator = dataset.config["separator_id"]
        self.hf.generation_config = GenerationConfig(
            bos_token_id=dataset.bos_id, eos_token_id=separator, pad_token_id=separator
        )
        self.model = self.hf.transformer.to(self.device)
        self.optimiser = self._make_optimiser()

    def _make_optimiser(self) -> torch.optim.AdamW:
        """Decay pulls on what multiplies; biases and norms are left alone."""
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.train.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(self.train.betas[0], self.train.betas[1]), fused=True)

    def run(self) -> HookedModel:
        """Train to the end and publish."""
        n_steps = self.train.n_steps
        self._begin()
        with progress(n_steps, "train a language model", "steps") as bar:
            bar.advance(self.step)
            while self.step < n_steps:
                row = self._train_step()
                if self.step % self.train.log_every == 0 or self.step == n_steps:
                    self._log(row)
                self._keep()
                if self.step % self.train.save_every == 0 and self.step < n_steps:
                    self._save_state()
                bar.advance(1, f"loss {row['loss']:.3f}")
        return self._publish()

    def _begin(self) -> None:
        """Go on from the saved state, or start: what a run without one left in the log is forgotten."""
        if (self.draft.folder / _STATE).exists():
            self._load_state()
            self._trim_log()
            return
        (self.draft.folder / LOG).unlink(missing_ok=True)
        (self.draft.folder / CHECKPOINTS).mkdir(exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.draft.folder / "tokenizer")
        self._keep()

    # ---- a step -------------------------------------------------------------------------------------------------------

    def _train_step(self) -> dict[str, float]:
        """One update, and what it was like."""
        lr = self.train.lr_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        tokens = self._batch(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = next_token_loss(self.model, tokens)
        self.optimiser.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_gradient_norm))
        value = float(loss.detach())
        if not math.isfinite(norm) or not math.isfinite(value):
            raise InputError(
                f"The training went wrong at step {self.step}",
                got=f"loss {value}, gradient norm {norm}, learning rate {lr:.2e}",
                fix=f"Lower lr. What was saved before is kept in {self.draft.folder}",
            )
        self.optimiser.step()
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * tokens.numel(),
            "loss": value,
            "lr": lr,
            "gradient_norm": norm,
        }

    def _batch(self, step: int) -> Int[Tensor, "batch pos"]:
        """The sequences of one step; those that do not fill the last batch of a round are left out of that round."""
        size = self.train.batch_size
        round_, i = divmod(step, len(self.data) // size)
        if round_ != self._round:
            self._round, self._order = round_, self._shuffled(round_)
        rows = np.sort(self._order[i * size : (i + 1) * size])
        return torch.from_numpy(self.data.tokens[rows].astype(np.int64)).to(self.device)

    def _shuffled(self, round_: int) -> Int[np.ndarray, " sequence"]:
        order: np.ndarray = torch.randperm(
            len(self.data), generator=generator(self.train.seed, "order", round_)
        ).numpy()
        return order

    @torch.no_grad()
    def _valid_loss(self) -> float:
        """Mean loss on the first held-out sequences."""
        n, size = min(len(self.held_out), self.train.valid_sequences), self.train.batch_size
        total = 0.0
        for start in range(0, n, size):
            stop = min(start + size, n)
            tokens = torch.from_numpy(self.held_out.batch(start, stop)).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                total += float(next_token_loss(self.model, tokens)) * (stop - start)
        return total / n

    # ---- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The held-out loss and the checkpoint of this step, where they are due."""
        if self.step % self.train.valid_every == 0 or self.step == self.train.n_steps:
            self._log({"step": self.step, "valid_loss": self._valid_loss()})
        folder = self.draft.folder / CHECKPOINTS / f"step-{self.step:07d}"
        if self.step in self.train.checkpoint_steps and not folder.exists():
            part = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(part, ignore_errors=True)
            self._save_model(part)
            part.rename(folder)

    def _save_model(self, folder: Path) -> None:
        """The model as a Hugging Face folder; the tokenizer's files are links, so many checkpoints hold them once."""
        with _quiet():
            self.hf.save_pretrained(folder)
        if self.tokenizer is not None:
            for file in (self.draft.folder / "tokenizer").iterdir():
                _link(file, folder / file.name)

    def _log(self, row: Mapping[str, float]) -> None:
        with (self.draft.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _trim_log(self) -> None:
        """Forget the rows behind the saved state: those steps are made again."""
        file = self.draft.folder / LOG
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _save_state(self) -> None:
        tensors = {}
        for name, p in self.model.named_parameters():
            tensors[f"model.{name}"] = p.detach()
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimiser.state[p].items()}
        with atomic_file(self.draft.folder / _STATE) as temporary:
            on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, temporary, metadata={"step": str(self.step)})

    def _load_state(self) -> None:
        file = self.draft.folder / _STATE
        with safe_open(file, "pt") as opened:
            self.step = int(opened.metadata()["step"])
        tensors = load_file(file, device=str(self.device))
        for name, p in self.model.named_parameters():
            p.data.copy_(tensors[f"model.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimiser.state[p] = {key: tensors[f"adam.{key}.{name}"] for key in keys}

    def _publish(self) -> HookedModel:
        """The model goes to the top of the folder. `config.json` says at once what the model is and, for `read_head`, what it
        was trained with. What only the training needed goes last: a writer killed before can still go on."""
        folder, final = self.draft.folder, self.draft.folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        self._save_model(final)
        head = {**read_json(folder / CONFIG), **read_json(final / CONFIG)}
        for file in list(final.iterdir()):
            if file.name != CONFIG:
                file.replace(folder / file.name)
        write_json(folder / CONFIG, head)
        target = self.draft.publish(overwrite=self.overwrite, seed=self.train.seed, dtype=str(self.dtype))
        for scrap in (target / "final", target / "tokenizer"):
            shutil.rmtree(scrap, ignore_errors=True)
        (target / _STATE).unlink(missing_ok=True)
        return load_model(target, device=str(self.device))


def _check_fit(config: ReferenceConfig, dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if dataset.vocabulary_size > config.d_vocab:
        raise ConfigError(
            "The dataset has tokens that the model has not",
            got=f"{dataset.vocabulary_size} for d_vocab {config.d_vocab}",
        )
    if dataset.context > config.n_ctx:
        raise ConfigError(
            "The dataset's sequences are longer than the context", got=dataset.context, expected=f"≤ {config.n_ctx}"
        )
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != dataset.config["tokenizer"]["fingerprint"]:
        raise ConfigError(
            "The dataset was made by another tokenizer",
            got=tokenizer.name_or_path or type(tokenizer).__name__,
            expected=dataset.config["tokenizer"]["name"],
        )


def _link(file: Path, to: Path) -> None:
    """A second name for a file, or a copy where the disk knows no such thing."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bar for each file that it writes."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
