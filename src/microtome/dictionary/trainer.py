"""Training: one dictionary on one stream of activations.

1. The first batches of the stream give the data's centre (geometric median), scale (mean norm becomes √d) and variance.
2. Each step: gradients (`TopKSAE.training_step`), Adam, decoder rows back to unit norm, count of tokens since each
   latent fired.
3. Every `checkpoint_every` steps all state is written to the draft folder. A run that was stopped goes on from there,
   on exactly the batches that were to come, and ends with the same weights.
4. At the end the scale is folded into the biases, so that the saved dictionary takes the model's own activations.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.activations import ActivationStore, ActivationStream, StoreSource, StreamConfig
from microtome.activations.source import ActivationSource
from microtome.common.artifacts import Draft, atomic_file, draft, read_json, write_json
from microtome.common.config import JsonObject, require, to_dict
from microtome.common.device import fast_dtype, parse_device, parse_dtype
from microtome.common.errors import InputError
from microtome.common.progress import progress
from microtome.dictionary.activation import TopK
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.formats import load_dictionary, save_dictionary
from microtome.dictionary.loggers import Loggers
from microtome.dictionary.topk import TopKConfig, TopKSAE

KIND = "dictionary"
STATISTICS_BATCHES = 4
_CHECKPOINT, _LOG = "checkpoint", "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. `n_tokens` counts activations taken from the stream, which begins again when it ends.

    `lr` None means 2e-4 / √(d_sae / 16384), the field's rule for TopK; it rises over `warmup_steps` and falls to zero
    over the last `decay_fraction`. `select_dtype` is the dtype of the product that selects latents ("auto": bf16 where
    the hardware has it).
    """

    n_tokens: int = 2_000_000
    batch_size: int = 2048
    buffer_size: int = 0
    lr: float | None = None
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    seed: int = 0
    device: str = "auto"
    select_dtype: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 25
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        require(
            self.n_tokens >= self.batch_size > 0,
            "n_tokens must hold a batch",
            got=f"{self.n_tokens}, batch {self.batch_size}",
        )
        require(self.lr is None or self.lr > 0, "lr must be positive", got=self.lr)
        require(0 <= self.decay_fraction <= 1, "decay_fraction must be in [0, 1]", got=self.decay_fraction)
        require(self.warmup_steps >= 0, "warmup_steps must not be negative", got=self.warmup_steps)
        require(self.checkpoint_every > 0 and self.log_every > 0, "checkpoint_every and log_every must be positive")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def lr_at(self, step: int, d_sae: int) -> float:
        """The learning rate of step `step` (from 0)."""
        peak = self.lr if self.lr is not None else 2e-4 / (d_sae / 16384) ** 0.5
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay_steps = int(self.n_steps * self.decay_fraction)
        fall = min(1.0, (self.n_steps - step) / decay_steps) if decay_steps else 1.0
        return peak * rise * fall


def train(
    configs: TopKConfig | Sequence[TopKConfig],
    source: ActivationStore | ActivationSource | str | Path,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    hook_name: str | None = None,
    overwrite: bool = False,
) -> list[Dictionary]:
    """Train a dictionary (or several, one after another) and return them, saved at `out` (or `out/0`, `out/1` …).

    `source` is a store (opened or its folder; `hook_name` chooses one of its points) or a `ModelSource`. A training
    that was stopped goes on from its last checkpoint. Raises InputError when the loss stops being a number; the last
    good checkpoint is kept.
    """
    config = config or TrainConfig()
    if isinstance(source, str | Path):
        source = ActivationStore.open(source)
    if isinstance(source, ActivationStore):
        source = StoreSource(source, hook_name)
    if isinstance(configs, TopKConfig):
        return [Trainer(configs, source, Path(out), config, overwrite=overwrite).run()]
    return [
        Trainer(each, source, Path(out) / str(i), config, overwrite=overwrite).run() for i, each in enumerate(configs)
    ]


class Trainer:
    """One training: its dictionary, optimiser and counters, and the draft folder in which its checkpoints are.

    `run()` does all of it. Its parts: `begin()` gives the batches that are to come, `train_step(batch)` is one update.
    """

    def __init__(
        self,
        architecture: TopKConfig,
        source: ActivationSource,
        out: Path,
        config: TrainConfig,
        *,
        overwrite: bool = False,
    ) -> None:
        self.architecture, self.source, self.config, self.overwrite = architecture, source, config, overwrite
        self.device = parse_device(config.device)
        self.select_dtype = (
            fast_dtype(self.device) if config.select_dtype == "auto" else parse_dtype(config.select_dtype)
        )
        settings = {
            "architecture": {"name": architecture.architecture, **to_dict(architecture)},
            "train": to_dict(config),
            "source": source.describe(),
        }
        self.draft: Draft = draft(out, KIND, settings, overwrite=overwrite, resume=True)
        self.step = 0
        self.scale, self.variance = 1.0, 1.0
        self.silent = torch.zeros(
            architecture.d_sae, dtype=torch.int64, device=self.device
        )  # tokens since each latent fired

    def run(self) -> Dictionary:
        """Train to the end and publish."""
        batches = self.begin()
        loggers = Loggers(self.config.log_to, self.draft.folder)
        try:
            with progress(self.config.n_steps, f"train {self.architecture.architecture}", "steps") as bar:
                bar.advance(self.step)
                while self.step < self.config.n_steps:
                    row = self.train_step(next(batches))
                    if row is not None:
                        self._log(row)
                        loggers.write(row)
                    bar.advance(1, f"FVU {row['fvu']:.3f}" if row else "")
                    if self.step % self.config.checkpoint_every == 0 and self.step < self.config.n_steps:
                        self._save_checkpoint()
        finally:
            loggers.close()
        return self._publish()

    # ---- begin, or go on ----------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[Float[Tensor, "batch d"]]:
        """Make the dictionary from the first batches, or read the last checkpoint; return the batches to come."""
        stream_config = StreamConfig(
            batch_size=self.config.batch_size, buffer_size=self.config.buffer_size, seed=self.config.seed
        )
        stream = ActivationStream(self.source, stream_config)
        saved = self.draft.folder / f"{_CHECKPOINT}.json"
        if self.draft.resumed and saved.exists():
            self._load_checkpoint(read_json(saved))
            stream.skip(self.step)
            return iter(stream)
        first = [next(stream) for _ in range(min(STATISTICS_BATCHES, self.config.n_steps))]
        self._begin_anew(torch.cat(first).float())
        return itertools.chain(first, stream)

    def _begin_anew(self, rows: Float[Tensor, "row d"]) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise InputError("The activations hold NaN or infinity", fix="Harvest them in bf16 or fp32")
        norm = float(rows.norm(dim=1).mean())
        center = geometric_median(rows)
        spread = float((rows - center).square().sum(1).median())
        if spread == 0.0:
            raise InputError("The activations are all equal: there is nothing to learn", got=f"{len(rows)} equal rows")
        self.scale = self.source.d**0.5 / norm
        self.variance = spread * self.scale**2
        self.sae = TopKSAE.initialised(
            self.source.d, self.architecture, center=center * self.scale, seed=self.config.seed
        ).to(self.device)
        self.optimiser = self._make_optimiser()

    def _make_optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.sae.parameters(), lr=1.0, fused=True)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Float[Tensor, "batch d"]) -> dict[str, float] | None:
        """One update. Every `log_every` steps, and before a checkpoint, the row of figures to log."""
        x = batch.to(device=self.device, dtype=torch.float32) * self.scale
        dead = self.silent >= self.architecture.dead_after
        report = self.sae.training_step(
            x,
            self.architecture,
            variance=self.variance,
            dead=dead if bool(dead.any()) else None,
            select_dtype=self.select_dtype,
        )
        lr = self.config.lr_at(self.step, self.architecture.d_sae)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        self.sae.after_step()
        self.silent = torch.where(report.fired, 0, self.silent + len(x))
        self.step += 1
        if (
            self.step % self.config.log_every
            and self.step % self.config.checkpoint_every
            and self.step != self.config.n_steps
        ):
            return None
        loss = float(report.loss)
        if not math.isfinite(loss):
            raise InputError(
                f"The loss is {loss} at step {self.step}",
                got=f"learning rate {lr:.2e}",
                fix="Lower lr or look at the activations; the last checkpoint is kept, and the same command goes on from it",
            )
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "loss": loss,
            "fvu": float(report.fvu),
            "aux": float(report.aux),
            "dead": int(dead.sum()),
            "lr": lr,
        }

    def _log(self, row: dict[str, float]) -> None:
        with (self.draft.folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    # ---- checkpoints and the end --------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        tensors = {f"sae.{name}": p.detach() for name, p in self.sae.named_parameters()}
        for name, p in self.sae.named_parameters():
            for key, value in self.optimiser.state[p].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["silent"] = self.silent
        file = f"{_CHECKPOINT}-{self.step}.safetensors"
        with atomic_file(self.draft.folder / file) as temporary:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
        state = {"step": self.step, "scale": self.scale, "variance": self.variance, "file": file}
        write_json(self.draft.folder / f"{_CHECKPOINT}.json", state)
        for old in self.draft.folder.glob(f"{_CHECKPOINT}-*.safetensors"):
            if old.name != file:
                old.unlink()

    def _load_checkpoint(self, state: JsonObject) -> None:
        self.step, self.scale, self.variance = state["step"], state["scale"], state["variance"]
        tensors = {name: t.to(self.device) for name, t in load_file(self.draft.folder / state["file"]).items()}
        self.sae = TopKSAE(self.source.d, self.architecture.d_sae, self.architecture.k).to(self.device)
        self.silent = tensors["silent"]
        self.optimiser = self._make_optimiser()
        for name, p in self.sae.named_parameters():
            p.data.copy_(tensors[f"sae.{name}"])
            keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
            self.optimiser.state[p] = {key.rpartition(".")[2]: tensors[key] for key in keys}
        self._trim_log()

    def _trim_log(self) -> None:
        """Forget the log's rows behind the checkpoint: those steps are made again."""
        file = self.draft.folder / _LOG
        if not file.exists():
            return
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= self.step]
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _publish(self) -> Dictionary:
        self.sae.rescale(self.scale)
        about: dict[str, Any] = self.source.describe()
        origin = Origin(
            model_name=self.source.model_name,
            inputs=(self.source.hook_name,),
            context=about["dataset"]["context"],
            prepend_bos=bool(about["dataset"]["special_ids"]),
            dataset=about["dataset"]["fingerprint"],
        )
        made = Dictionary(self.sae.d_in, self.sae.d_sae, TopK(self.sae.k), origin=origin)
        made.load_state_dict(self.sae.state_dict())
        save_dictionary(made, self.draft.folder)
        for old in self.draft.folder.glob(f"{_CHECKPOINT}*"):
            old.unlink()
        self.draft.publish(overwrite=self.overwrite, seed=self.config.seed)
        return load_dictionary(self.draft.target)


def geometric_median(rows: Float[Tensor, "row d"], steps: int = 20) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to all rows, by Weiszfeld's iteration: a centre that outliers do not
    move."""
    point = rows.mean(0)
    for _ in range(steps):
        weights = 1.0 / (rows - point).norm(dim=1).clamp_min(1e-9)
        point = (rows * weights[:, None]).sum(0) / weights.sum()
    return point
