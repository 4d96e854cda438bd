"""`microtome bench scaling`: the trainer alone, on activations made on the device, over widths and dictionary sizes.

1. Each size and architecture has a process of its own, so that its peak memory is its own. What does not fit is left out,
   with a note.
2. After some steps the peak memory is read. Then turns of training steps and of one bare matrix product follow each other:
   the product that no step can do without, x W_encᵀ, in the dtype in which the trainer selects latents.

The share of the matrix peak is the time of that product divided by the time of a step. Memory is that which the trainer adds
to the process, against weights, gradients, Adam's two moments and three numbers for each activation and latent.
"""

import gc
import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.common import in_turn, machine, resident_bytes, timed
from microtome.activations import ArraySource
from microtome.common.config import require, to_dict
from microtome.common.device import generator, parse_device
from microtome.common.errors import MicrotomeError
from microtome.common.memory import freed_memory_kept
from microtome.dictionary import TrainConfig
from microtome.dictionary.config import ARCHITECTURES, DictionaryConfig, TopKConfig, parse_config
from microtome.dictionary.trainer import STATISTICS_BATCHES, Trainer

_WARM_UP = 3  # steps
_PATIENCE_S = 10.0
_SPARE = 1 << 29  # bytes that are left to everything else
_ENDLESS = 1_000_000  # steps: the learning rate stays what it is


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every `d_in` with every `d_sae` and architecture. `preset` fills in what is not said ("auto": that of the device); a
    turn is `steps` steps, and one more turn than `rounds` is taken, the first of which is not timed."""

    preset: Literal["auto", "cpu", "gpu"] = "auto"
    d_in: tuple[int, ...] = ()
    d_sae: tuple[int, ...] = ()
    architectures: tuple[str, ...] = ("topk", "batchtopk")
    k: int | None = None
    batch_size: int | None = None
    steps: int | None = None
    rounds: int = 3
    device: str = "auto"
    select_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.architectures) - set(ARCHITECTURES))
        require(not unknown, f"architectures are of {', '.join(ARCHITECTURES)}", got=unknown)
        for name in ("d_in", "d_sae", "k", "batch_size", "steps", "rounds"):
            said = getattr(self, name)
            least = min(said, default=1) if isinstance(said, tuple) else said
            require(least is None or least > 0, f"{name} must be positive", got=said)

    def filled(self, device: torch.device) -> "Config":
        """With the preset's sizes for those that are not said."""
        name = self.preset if self.preset != "auto" else "gpu" if device.type == "cuda" else "cpu"
        missing = {key: value for key, value in _PRESETS[name].items() if not getattr(self, key)}
        return replace(self, preset=name, **missing)


_PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"d_in": (576,), "d_sae": (4608, 16384, 65536), "k": 32, "batch_size": 2048, "steps": 3},
    "gpu": {"d_in": (768, 2048, 4096), "d_sae": (24576, 65536, 131072), "k": 64, "batch_size": 8192, "steps": 20},
}


@dataclass(frozen=True)
class Size:
    """One training to measure."""

    architecture: str
    d_in: int
    d_sae: int

    def __str__(self) -> str:
        return f"{self.architecture}/{self.d_in}x{self.d_sae}"

    def dictionary(self, k: int) -> DictionaryConfig:
        """The dictionary to train."""
        has_k = issubclass(ARCHITECTURES[self.architecture], TopKConfig)
        return parse_config({"architecture": self.architecture, "d_sae": self.d_sae, **({"k": k} if has_k else {})})

    def formula(self, batch_size: int, itemsize: int) -> int:
        """Bytes of the weights with gradients and two moments, in fp32, and of three numbers of `itemsize` for each
        pre-activation."""
        weights = 2 * self.d_in * self.d_sae + self.d_sae + self.d_in
        return 4 * 4 * weights + 3 * batch_size * self.d_sae * itemsize


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    device = parse_device(config.device)
    about, config = machine(device), config.filled(device)
    rows: dict[str, dict[str, Any]] = {}
    notes = []
    for size in itertools.starmap(Size, itertools.product(config.architectures, config.d_in, config.d_sae)):
        found = _in_a_process(config, size)
        if isinstance(found, str):
            notes.append(f"{size} is left out: {found}")
        else:
            rows[str(size)] = found
    keys = next(iter(rows.values()), {})
    return {
        "benchmark": "scaling",
        "machine": about,
        "sizes": to_dict(config),
        "figures": {key: {name: row[key] for name, row in rows.items()} for key in keys},
        "ratios": {f"{name}/{key}": row[a] / row[b] for name, row in rows.items() for key, a, b in _RATIOS},
        "notes": [table(rows), *notes],
    }


_RATIOS = (
    ("share_of_matrix_peak", "product_seconds", "step_seconds"),
    ("memory_vs_formula", "peak_bytes", "formula_bytes"),
    ("memory_vs_formula_fp32", "peak_bytes", "formula_fp32_bytes"),
)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table; memory in GB, with the formula's beside it."""
    lines = [
        "| training | activations/s | TFLOP/s | of the matrix peak | peak GB | formula | formula, fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        share = row["product_seconds"] / row["step_seconds"]
        memory = (row[key] / 1e9 for key in ("peak_bytes", "formula_bytes", "formula_fp32_bytes"))
        speeds = f"{row['activations_per_second']:,.0f} | {row['tflops']:.3g} | {share:.1%}"
        lines.append(f"| {name} | {speeds} | {' | '.join(f'{each:.2f}' for each in memory)} |")
    return "\n".join(lines)


# ---- one size, in a process of its own --------------------------------------------------------------------------------


def _in_a_process(config: Config, size: Size) -> dict[str, Any] | str:
    """Its figures, or why there are none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, config, size), daemon=True)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] | str = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:
            return "its process was killed, as happens where memory runs out"
        raise MicrotomeError(
            f"The process that measures {size} ended early", got=f"exit status {process.exitcode}", fix="See above"
        ) from None
    finally:
        ours.close()
        process.join(_PATIENCE_S)
        process.terminate()
        process.join()
    return found


def _serve(pipe: Connection, config: Config, size: Size) -> None:
    pipe.send(measured(config, size))


def measured(config: Config, size: Size) -> dict[str, Any] | str:
    """The figures of one training, or why it does not fit."""
    device = parse_device(config.device)
    assert config.k is not None
    assert config.batch_size is not None
    free, least = _free(device), size.formula(config.batch_size, 2) + _SPARE
    if least > free:
        return f"it needs about {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    try:
        return _measured(config, size, device)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return f"memory ran out ({str(error).partition('.')[0]})"
        raise


def _measured(config: Config, size: Size, device: torch.device) -> dict[str, Any]:
    n, steps = config.batch_size or 0, config.steps or 0
    batches = list(_batches(n, size.d_in, config.seed, device))
    source = ArraySource(torch.cat(batches).cpu(), rows_per_block=n)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microtome-bench-")))
        # What importing and a first step load is not the dictionary's memory, and neither is the data.
        small = _trainer(config, replace(size, d_sae=max(1024, config.k or 0)), source, scratch / "small")
        with freed_memory_kept():  # at its end what is free goes back to the system
            small.train_step(batches[0])
            del small
            gc.collect()
        _forget_peak(device)
        held = _held(device)
        trainer = _trainer(config, size, source, scratch / "sized")
        stack.enter_context(freed_memory_kept())  # as in Trainer.run
        stream = itertools.cycle(batches)
        for _ in range(_WARM_UP):
            trainer.train_step(next(stream))
        peak = _peak(device) - held
        sides = {
            "step": lambda: timed(lambda: [trainer.train_step(next(stream)) for _ in range(steps)], device),
            "product": lambda: _product_seconds(batches[0], trainer, steps, device),
        }
        seconds = in_turn(sides, config.rounds, f"bench scaling, {size}")
    step, product = (median(seconds[name]) / steps for name in ("step", "product"))
    operations = 2 * n * size.d_in * size.d_sae
    return {
        "activations_per_second": n / step,
        "step_seconds": step,
        "product_seconds": product,
        "tflops": operations / step / 1e12,
        "product_tflops": operations / product / 1e12,
        "peak_bytes": peak,
        "formula_bytes": size.formula(n, trainer.select_dtype.itemsize),
        "formula_fp32_bytes": size.formula(n, 4),
        "select_dtype": str(trainer.select_dtype).removeprefix("torch."),
        "seconds": seconds,
    }


def _trainer(config: Config, size: Size, source: ArraySource, folder: Path) -> Trainer:
    """A trainer that has begun, and wants batches."""
    batch_size = config.batch_size or 0
    settings = TrainConfig(
        n_tokens=_ENDLESS * batch_size,
        batch_size=batch_size,
        seed=config.seed,
        device=config.device,
        select_dtype=config.select_dtype,
    )
    trainer = Trainer([size.dictionary(config.k or 0)], source, folder, settings)
    trainer.begin()
    return trainer


def _batches(n: int, d: int, seed: int, device: torch.device) -> Iterator[Float[Tensor, "n d"]]:
    """Normal rows around a centre, with a spectrum that falls as those of residual streams do: some latents fire much more
    often than others."""
    rng = generator(seed, "scaling", device=device)
    spectrum = torch.arange(1, d + 1, device=device).rsqrt()
    center = torch.randn(d, generator=rng, device=device)
    for _ in range(STATISTICS_BATCHES):
        yield torch.randn(n, d, generator=rng, device=device) * spectrum * d**0.5 + center


@torch.no_grad()
def _product_seconds(batch: Float[Tensor, "n d"], trainer: Trainer, times: int, device: torch.device) -> float:
    """Seconds of so many bare products of the selection's shape and dtype."""
    x = batch.to(trainer.select_dtype)
    weight = trainer.groups[0].stack.encoder[0].to(trainer.select_dtype).T
    out = x @ weight
    timed(lambda: torch.mm(x, weight, out=out), device)  # waits for all that came before
    return timed(lambda: [torch.mm(x, weight, out=out) for _ in range(times)], device)


# ---- memory -----------------------------------------------------------------------------------------------------------


def _free(device: torch.device) -> int:
    """Bytes that can be had."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def _forget_peak(device: torch.device) -> None:
    """Let the peak begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
