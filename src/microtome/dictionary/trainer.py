"""Training: any number of dictionaries on one stream of activations.

1. The first batches of the stream give each hook point's scale (mean norm becomes √d), a centre and the variance.
2. Configs that differ only in seed or λ become members of one stack (`group.py`), where that is quicker.
3. Each step: every group takes the same rows; gradients, Adam, decoder rows back to unit norm, counts of silence.
4. Every `checkpoint_every` steps all state is written to the draft folder. A run that was stopped goes on from there,
   on exactly the batches that were to come, and ends with the same weights.
5. At the end the scales are folded into the weights, so that a saved dictionary takes the model's own activations.
"""

import itertools
import json
import math
from collections import deque
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
from microtome.common.artifacts import (
    CONFIG,
    FORMAT,
    PROVENANCE,
    Draft,
    atomic_file,
    describe_run,
    draft,
    read_json,
    write_json,
)
from microtome.common.config import JsonObject, require, to_dict
from microtome.common.device import fast_dtype, parse_device, parse_dtype
from microtome.common.errors import ConfigError, InputError
from microtome.common.memory import freed_memory_kept
from microtome.common.progress import progress
from microtome.dictionary.config import DictionaryConfig, describe
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.formats import read_dictionary, save_dictionary
from microtome.dictionary.group import Group, alike
from microtome.dictionary.layout import Sites
from microtome.dictionary.loggers import Loggers, as_one_row
from microtome.dictionary.stack import StepReport
from microtome.dictionary.statistics import input_scales
from microtome.dictionary.temporal import TemporalDictionary

KIND, SWEEP_KIND = "dictionary", "dictionary_sweep"
STATISTICS_BATCHES = 4
_CHECKPOINT, _LOG = "checkpoint", "training.jsonl"
# Members with more pre-activations than this gain nothing from being stacked on a CPU.
_STACKED_ENTRIES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. `n_tokens` counts activations taken from the stream, which begins again when it ends.

    `lr` None means 1e-3 / √(d_sae / 16384), at most 3e-3: the slope of the field's rule for TopK, five times as high for
    trainings of some thousand steps. It rises over `warmup_steps` and falls to zero over the last `decay_fraction`.
    `select_dtype` is the dtype of the product that selects latents ("auto": bf16 where the hardware has it). `stack` says
    whether alike dictionaries are trained as one ("auto": where they are small, and on a GPU).
    """

    n_tokens: int = 2_000_000
    batch_size: int = 2048
    buffer_size: int = 0
    lr: float | None = None
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    resample_batches: int = 8
    seed: int = 0
    device: str = "auto"
    select_dtype: str = "auto"
    stack: Literal["auto", "always", "never"] = "auto"
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
        require(self.resample_batches > 0, "resample_batches must be positive", got=self.resample_batches)
        require(self.checkpoint_every > 0 and self.log_every > 0, "checkpoint_every and log_every must be positive")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size

    def lr_at(self, step: int, d_sae: int, lr: float | None = None) -> float:
        """The learning rate of step `step` (from 0), for a dictionary with its own peak `lr` or none."""
        lr = self.lr if lr is None else lr
        peak = lr if lr is not None else min(3e-3, 1e-3 / (d_sae / 16384) ** 0.5)
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay_steps = int(self.n_steps * self.decay_fraction)
        fall = min(1.0, (self.n_steps - step) / decay_steps) if decay_steps else 1.0
        return peak * rise * fall


def train(
    configs: DictionaryConfig | Sequence[DictionaryConfig],
    source: ActivationStore | ActivationSource | str | Path,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    hook_name: str | None = None,
    overwrite: bool = False,
) -> list[Dictionary]:
    """Train a dictionary, saved at `out`, or several on one stream (`out/0`, `out/1` …), and return them.

    `source` is a store (opened or its folder; `hook_name` chooses one of its points for configs that name none) or
    another `ActivationSource`. A training that was stopped goes on from its last checkpoint. Raises InputError when a
    loss stops being a number; the last good checkpoint is kept. Cross-layer transcoders: `train_cross_layer`.
    """
    listed = _listed(configs)
    if any(each.cross_layer for each in listed):
        raise ConfigError("train makes no cross-layer transcoders", fix="Train them with train_cross_layer")
    made = _trainer(configs, source, out, config, hook_name=hook_name, overwrite=overwrite).run()
    return [each for each in made if isinstance(each, Dictionary)]


def train_cross_layer(
    configs: DictionaryConfig | Sequence[DictionaryConfig],
    source: ActivationStore | ActivationSource | str | Path,
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    overwrite: bool = False,
) -> list[CrossLayerTranscoder]:
    """Train a cross-layer transcoder, or several on one stream, from configs with `cross_layer=True`. The rest is as in
    `train`."""
    if not all(each.cross_layer for each in _listed(configs)):
        raise ConfigError("train_cross_layer makes cross-layer transcoders", fix="Say cross_layer=True in each config")
    made = _trainer(configs, source, out, config, hook_name=None, overwrite=overwrite).run()
    return [each for each in made if isinstance(each, CrossLayerTranscoder)]


def _listed(configs: DictionaryConfig | Sequence[DictionaryConfig]) -> list[DictionaryConfig]:
    listed = [configs] if isinstance(configs, DictionaryConfig) else list(configs)
    if not listed:
        raise ConfigError("There is nothing to train", got="an empty list of configs")
    return listed


def _trainer(
    configs: DictionaryConfig | Sequence[DictionaryConfig],
    source: ActivationStore | ActivationSource | str | Path,
    out: str | Path,
    config: TrainConfig | None,
    *,
    hook_name: str | None,
    overwrite: bool,
) -> "Trainer":
    listed, single = _listed(configs), isinstance(configs, DictionaryConfig)
    rows = as_source(source, listed, hook_name)
    return Trainer(listed, rows, Path(out), config or TrainConfig(), single=single, overwrite=overwrite)


def as_source(
    source: ActivationStore | ActivationSource | str | Path,
    configs: Sequence[DictionaryConfig],
    hook_name: str | None = None,
) -> ActivationSource:
    """The source itself, or of a store the points that the configs use (`hook_name` for those that name none)."""
    if isinstance(source, str | Path):
        source = ActivationStore.open(source)
    return StoreSource(source, _points(configs, hook_name, source)) if isinstance(source, ActivationStore) else source


def _points(configs: Sequence[DictionaryConfig], hook_name: str | None, store: ActivationStore) -> list[str]:
    """The points of a store that the configs use, in the store's order."""
    used = {name for c in configs for name in (*c.inputs, *c.outputs)}
    if any(not c.inputs for c in configs):
        used.add(hook_name if hook_name is not None else store.hook_names[0])
    for name in used:
        store.check_hook(name)
    return [name for name in store.hook_names if name in used]


class Trainer:
    """One training: its groups, and the draft folder in which its checkpoints are.

    `run()` does all of it. Its parts: `begin()` gives the batches that are to come, `train_step(batch)` is one update.
    """

    def __init__(
        self,
        configs: Sequence[DictionaryConfig],
        source: ActivationSource,
        out: Path,
        config: TrainConfig,
        *,
        single: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.configs, self.source, self.config = list(configs), source, config
        self.single, self.overwrite = single, overwrite
        self.device = parse_device(config.device)
        self.select_dtype = (
            fast_dtype(self.device) if config.select_dtype == "auto" else parse_dtype(config.select_dtype)
        )
        about = {"train": to_dict(config), "source": source.describe()}
        described = [describe(each) for each in self.configs]
        what = {"architecture": described[0]} if single else {"dictionaries": described}
        self.draft: Draft = draft(
            out, KIND if single else SWEEP_KIND, {**what, **about}, overwrite=overwrite, resume=True
        )
        self.step, self.scales = 0, torch.ones(source.d, device=self.device)
        self.groups = self._make_groups()
        self.recent: deque[Float[Tensor, "n d"]] = deque(maxlen=config.resample_batches)

    def _make_groups(self) -> list[Group]:
        of, whole, sites = self.configs, self.config.n_tokens, Sites(self.source.hook_names, self.source.widths)
        together: list[list[int]] = []
        for number, config in enumerate(of):
            fitting = [each for each in together if self._stacks(config, of[each[0]])]
            if fitting:
                fitting[0].append(number)
            else:
                together.append([number])
        return [Group([of[n] for n in some], some, sites, n_tokens=whole, device=self.device) for some in together]

    def _stacks(self, a: DictionaryConfig, b: DictionaryConfig) -> bool:
        """Whether the two become members of one stack."""
        small = self.config.batch_size * a.d_sae <= _STACKED_ENTRIES or self.device.type == "cuda"
        wanted = self.config.stack == "always" or (self.config.stack == "auto" and small)
        return wanted and not a.cross_layer and alike(a) == alike(b)

    def run(self) -> list[Dictionary | CrossLayerTranscoder]:
        """Train to the end and publish."""
        batches = self.begin()
        loggers = Loggers(self.config.log_to, self.draft.folder)
        names = ", ".join(dict.fromkeys(each.architecture for each in self.configs))
        try:
            with freed_memory_kept(), progress(self.config.n_steps, f"train {names}", "steps") as bar:
                bar.advance(self.step)
                while self.step < self.config.n_steps:
                    rows = self.train_step(next(batches))
                    for row in rows:
                        self._log(row)
                    if rows:
                        loggers.write(as_one_row(rows))
                    bar.advance(1, " ".join(f"FVU {row['fvu']:.3f}" for row in rows[:1]))
                    if self.step % self.config.checkpoint_every == 0 and self.step < self.config.n_steps:
                        self.save_checkpoint()
        finally:
            loggers.close()
        return self._publish()

    # ---- begin, or go on ----------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[Float[Tensor, "batch d"]]:
        """Make the dictionaries from the first batches, or read the last checkpoint; return the batches to come."""
        stream_config = StreamConfig(
            batch_size=self.config.batch_size, buffer_size=self.config.buffer_size, seed=self.config.seed
        )
        stream = ActivationStream(self.source, stream_config)
        saved = self.draft.folder / f"{_CHECKPOINT}.json"
        if self.draft.resumed and saved.exists():
            self._load_checkpoint(read_json(saved))
            seen = min(self.step, self.config.resample_batches) if self._resampling else 0
            stream.skip(self.step - seen)
            for _ in range(seen):
                self.recent.append(self._scaled(next(stream)))
            return iter(stream)
        first = [next(stream) for _ in range(min(STATISTICS_BATCHES, self.config.n_steps))]
        rows = torch.cat(first).to(self.device, torch.float32)
        self.scales = input_scales(rows, self.source.widths)
        rows *= self.scales
        for group in self.groups:
            group.begin(rows, self.scales, self.config.seed)
        return itertools.chain(first, stream)

    @property
    def _resampling(self) -> bool:
        return any(group.config.revival == "resample" for group in self.groups)

    def _scaled(self, batch: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        if self.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()  # so that it is copied while the device works, and in its own dtype
        return batch.to(self.device, non_blocking=True).float() * self.scales

    # ---- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Float[Tensor, "batch d"]) -> list[dict[str, Any]]:
        """One update of all dictionaries. Every `log_every` steps, and before a checkpoint, a row of figures for
        each."""
        rows = self._scaled(batch)
        if self._resampling:
            self.recent.append(rows)
        reports = []
        for group in self.groups:
            lr = self.config.lr_at(self.step, group.config.d_sae, group.config.lr)
            fraction = self.step / self.config.n_steps
            reports.append(group.train_step(rows, lr=lr, fraction=fraction, select_dtype=self.select_dtype))
        self.step += 1
        for group in self.groups:
            if group.resamples_at(self.step, self.config.n_steps):
                group.resample(torch.cat(list(self.recent)), step=self.step, seed=self.config.seed)
        due = (self.step % self.config.log_every, self.step % self.config.checkpoint_every)
        if all(due) and self.step != self.config.n_steps:
            return []
        found = [row for pair in zip(self.groups, reports, strict=True) for row in self._rows(*pair)]
        return sorted(found, key=lambda row: row["dictionary"])

    def _rows(self, group: Group, report: StepReport) -> Iterator[dict[str, Any]]:
        lr, batch_size = self.config.lr_at(self.step - 1, group.config.d_sae, group.config.lr), self.config.batch_size
        for number, config, figures in zip(group.numbers, group.configs, group.figures(report), strict=True):
            if not math.isfinite(figures["loss"]):
                raise InputError(
                    f"The loss is {figures['loss']} at step {self.step}",
                    got=f"learning rate {lr:.2e}, dictionary {number} ({config.architecture})",
                    fix="Lower lr or look at the activations; the last checkpoint is kept, and the same command goes on "
                    "from it",
                )
            yield {"dictionary": number, "step": self.step, "tokens": self.step * batch_size, **figures, "lr": lr}

    def _log(self, row: dict[str, Any]) -> None:
        file = self.folder(int(row["dictionary"])) / _LOG
        file.parent.mkdir(exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({key: value for key, value in row.items() if key != "dictionary"}) + "\n")

    def folder(self, number: int) -> Path:
        """Where a dictionary's files are while the training lasts."""
        return self.draft.folder if self.single else self.draft.folder / str(number)

    # ---- checkpoints and the end --------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write all state, then forget the checkpoint before."""
        tensors = {f"{i}.{key}": value for i, group in enumerate(self.groups) for key, value in group.state().items()}
        tensors["scales"] = self.scales
        file = f"{_CHECKPOINT}-{self.step}.safetensors"
        with atomic_file(self.draft.folder / file) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        write_json(self.draft.folder / f"{_CHECKPOINT}.json", {"step": self.step, "file": file})
        for old in self.draft.folder.glob(f"{_CHECKPOINT}-*.safetensors"):
            if old.name != file:
                old.unlink()

    def _load_checkpoint(self, state: JsonObject) -> None:
        self.step = state["step"]
        tensors = load_file(self.draft.folder / state["file"])
        self.scales = tensors["scales"].to(self.device)
        for i, group in enumerate(self.groups):
            prefix = f"{i}."
            group.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for number in range(len(self.configs)):
            _trim_log(self.folder(number) / _LOG, self.step)

    def _publish(self) -> list[Dictionary | CrossLayerTranscoder]:
        about: dict[str, Any] = self.source.describe()
        dataset = about.get("dataset") or {}
        origin = {
            "model_name": self.source.model_name,
            "context": dataset.get("context"),
            "prepend_bos": bool(dataset.get("special_ids")),
            "dataset": dataset.get("fingerprint"),
        }
        for group in self.groups:
            for which, number in enumerate(group.numbers):
                folder = self.folder(number)
                folder.mkdir(exist_ok=True)
                save_dictionary(group.export(which, self.scales, origin), folder)
                if not self.single:
                    self._write_head(folder, self.configs[number])
        for old in self.draft.folder.glob(f"{_CHECKPOINT}*"):
            old.unlink()
        target = self.draft.publish(overwrite=self.overwrite, seed=self.config.seed)
        places = [target] if self.single else [target / str(n) for n in range(len(self.configs))]
        return [_trained(place) for place in places]

    def _write_head(self, folder: Path, config: DictionaryConfig) -> None:
        """A dictionary of a sweep is an artifact of its own."""
        shared = {key: self.draft.config[key] for key in ("train", "source")}
        head = {"kind": KIND, "format": FORMAT, "config": {"architecture": describe(config), **shared}}
        write_json(folder / CONFIG, head)
        write_json(folder / PROVENANCE, {**describe_run(), "seed": self.config.seed})


def _trained(place: Path) -> Dictionary | CrossLayerTranscoder:
    """What was just written there."""
    made = read_dictionary(place).dictionary
    assert not isinstance(made, TemporalDictionary)
    return made


def _trim_log(file: Path, step: int) -> None:
    """Forget the log's rows behind the checkpoint: those steps are made again."""
    if not file.exists():
        return
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    with atomic_file(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
