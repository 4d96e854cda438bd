"""What the benchmarks share: what machine this is, sides timed in turn, ratios, and the shape of a result."""

import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microtome.common.device import cpu_has_bf16
from microtome.common.errors import ConfigError
from microtome.common.progress import progress
from microtome.model import HookedModel
from microtome.text import TokenDataset, TokenizeConfig, open_corpus, tokenize_corpus

# Student's t at 97.5 %, by degrees of freedom: intervals of so few seeds are wide.
_T = (float("nan"), 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T)
_PACKAGES = ("microtome", "torch", "transformers", "sae-lens", "transformer-lens")


@dataclass(frozen=True, kw_only=True)
class ModelAndText:
    """What all benchmarks are told: the activations of which model, entering which layer, on which text."""

    model: str = "smollm2-135m"
    layer: int = 15
    corpus: str = "demo"
    context: int = 128
    device: str = "auto"

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.layer}.hook_resid_pre"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on. `load` is the number of busy processes in the last minute before: it should be near
    0."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": cpu_has_bf16(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(module: str) -> bool:
    """Whether a peer can be imported here."""
    return importlib.util.find_spec(module) is not None


def tokens_of(model: HookedModel, text: ModelAndText, n_tokens: int, folder: Path) -> TokenDataset:
    """About `n_tokens` tokens of the corpus as a token dataset in `folder`."""
    if model.tokenizer is None:
        raise ConfigError(f"{model.name} came without a tokenizer", fix="Choose a model that has one")
    config = TokenizeConfig(context=text.context, max_tokens=n_tokens)
    return tokenize_corpus(
        open_corpus(text.corpus), model.tokenizer, folder, config=config, max_context=model.config.n_ctx
    )


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int, label: str) -> dict[str, list[float]]:
    """Call the sides in turn, A B C A B C …, `rounds` times after one that is not counted.

    Each side does its work and returns the seconds that it took; returns these per side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with progress((rounds + 1) * len(sides), label, "turns") as bar:
        for number in range(rounds + 1):
            for name, side in sides.items():
                gc.collect()
                took = side()
                if number:
                    seconds[name].append(took)
                bar.advance(1, name)
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work()`, the GPU's part included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rate(amount: float, seconds: Sequence[float]) -> float:
    """`amount` per second at the median."""
    return amount / statistics.median(seconds)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs; None where one was not measured."""
    return None if ours is None or theirs is None else ours / theirs


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds, and the ends of Student's 95 % interval for it (none for a single value)."""
    mean = statistics.mean(values)
    half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    ends = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "interval": ends, "seeds": list(values)}


def resident_bytes(key: str) -> int:
    """This process's memory: `VmRSS`, what it holds now, or `VmHWM`, the most that it ever held."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # no /proc: the peak is the best there is
    return peak if sys.platform == "darwin" else peak * 1024
