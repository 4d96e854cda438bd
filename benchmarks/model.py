"""`microtome bench model`: a language model's forward pass, captures and generation, against the bare Hugging Face model
and TransformerLens.

1. Each side is opened in a process of its own, `starts` times: seconds to import and to open it, and its memory.
2. Then all are open in one process and take turns at the same tokens. Microtome and Hugging Face share the module, so
   that what differs between them is Microtome alone.

A full cache is every point that `run_with_cache` gives by itself and TransformerLens has too: attention patterns are among
them, per-head results are not. Speeds of captures are compared to Hugging Face's plain forward pass.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import ModelAndText, in_turn, installed, machine, rate, ratio, timed, tokens_of
from benchmarks.model_sides import Inputs, Works, open_side, works
from microtome.common.config import require, to_dict
from microtome.common.device import parse_device
from microtome.common.errors import MicrotomeError
from microtome.common.progress import progress
from microtome.model import HookedModel, load_model
from microtome.model.builtin import BUILTIN, builtin_folder

PEER = "transformer_lens"
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Config(ModelAndText):
    """`batch` rows of `context` tokens are read in each turn; the first `prompt_tokens` of each are continued by
    `new_tokens`. `starts` is how often each side is opened from nothing."""

    batch: int = 4
    prompt_tokens: int = 32
    new_tokens: int = 32
    rounds: int = 15
    starts: int = 3

    def __post_init__(self) -> None:
        require(min(self.rounds, self.starts) > 0, "rounds and starts must be positive", got=self.rounds)
        require(min(self.batch, self.new_tokens) > 0, "batch and new_tokens must be positive", got=self.batch)
        require(
            0 < self.prompt_tokens <= self.context,
            "prompt_tokens must be within the context",
            got=f"prompt_tokens {self.prompt_tokens}, context {self.context}",
        )


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    device = parse_device(config.device)
    about = machine(device)
    folder = _folder(config.model)
    model = load_model(folder, dtype="fp32", device=config.device)
    opened: dict[str, Any] = {"huggingface": model.hf, "microtome": model}
    if installed(PEER):
        opened["transformerlens"] = open_side("transformerlens", folder, str(device))
    inputs = _inputs(model, opened.get("transformerlens"), config)
    started = _starts(list(opened), folder, inputs, config.starts)
    seconds = _turns({name: works(name, side, inputs) for name, side in opened.items()}, config.rounds, device)
    amount = {"generate": config.batch * config.new_tokens}
    speed = {
        name: rate(amount.get(name.partition("/")[0], config.batch * config.context), some)
        for name, some in seconds.items()
    }
    return {
        "benchmark": "model",
        "machine": about,
        "sizes": {**to_dict(config), "full_cache_points": len(inputs.full_cache)},
        "figures": {"tokens_per_second": speed, "seconds": seconds, **started},
        "ratios": {
            f"{ours}_vs_{peer}": ratio(speed[f"{ours}/microtome"], speed.get(f"{theirs}/{peer}"))
            for ours, theirs, peer in _COMPARED
        },
        "notes": _notes(opened),
    }


_COMPARED = (
    ("forward", "forward", "huggingface"),
    ("one_point", "forward", "huggingface"),
    ("all_residual", "forward", "huggingface"),
    ("generate", "generate", "huggingface"),
    ("forward", "forward", "transformerlens"),
    ("one_point", "one_point", "transformerlens"),
    ("all_residual", "all_residual", "transformerlens"),
    ("full_cache", "full_cache", "transformerlens"),
    ("generate", "generate", "transformerlens"),
)


def _folder(model: str) -> str:
    """Where every side finds the model: Microtome's own names mean nothing to the others."""
    folder = builtin_folder(BUILTIN[model]) if model in BUILTIN else None
    return str(folder or model)


def _inputs(model: HookedModel, peer: Any, config: Config) -> Inputs:
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        dataset = tokens_of(model, config, config.batch * config.context, Path(scratch) / "tokens")
        require(dataset.n_sequences >= config.batch, "The corpus is too short", got=f"{dataset.n_sequences} rows")
        tokens = torch.from_numpy(dataset.batch(0, config.batch)).to(model.device)
    full = [str(name) for name in model.resolve("*")]
    if peer is not None:
        with torch.no_grad():
            has = set(peer.run_with_cache(tokens[:1, :4])[1].keys())
        full = [name for name in full if name in has]
    return Inputs(
        tokens=tokens.tolist(),
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        point=config.hook_name,
        full_cache=full,
        device=str(model.device),
    )


def _starts(names: list[str], folder: str, inputs: Inputs, starts: int) -> dict[str, dict[str, Any]]:
    """Import and load seconds (medians), bytes held and peaks (the largest) of each side in processes of its own."""
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with progress(starts * len(names), "bench model", "starts") as bar:
        for _ in range(starts):
            for name in names:
                told[name].append(_start(name, folder, inputs))
                bar.advance(1, name)
    return {
        **{key: {n: median(t[key] for t in told[n]) for n in names} for key in ("import_seconds", "load_seconds")},
        "loaded_bytes": {n: max(t["loaded_bytes"] for t in told[n]) for n in names},
        "peak_bytes": {
            f"{work}/{n}": max(t["peak_bytes"][work] for t in told[n])
            for n in names
            for work in told[n][0]["peak_bytes"]
        },
    }


def _start(name: str, folder: str, inputs: Inputs) -> dict[str, Any]:
    paths = [str(_ROOT), str(_ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.model_sides"],
        input=json.dumps({"name": name, "model": folder, "inputs": asdict(inputs)}),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if done.returncode:
        raise MicrotomeError(
            f"The process that measures {name} ended early",
            got=f"exit status {done.returncode}",
            fix="Its own message is above; -9 often means that there was not enough memory",
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@torch.no_grad()
def _turns(sides: dict[str, Works], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work of each side; the sides of one work follow each other."""
    found = {f"{work}/{name}": run for name, mine in sides.items() for work, run in mine.items()}
    order = [f"{work}/{name}" for work in sides["microtome"] for name in sides if f"{work}/{name}" in found]
    return in_turn({key: lambda run=found[key]: timed(run, device) for key in order}, rounds, "bench model")  # type: ignore[misc]


def _notes(opened: dict[str, Any]) -> list[str]:
    if "transformerlens" not in opened:
        return [
            "TransformerLens is not installed here: pip install 'transformer-lens>=3', or '.[bench]' from the repository"
        ]
    return [
        "TransformerLens is TransformerBridge.boot_transformers on the same folder, without its compatibility mode; it "
        "runs the model with eager attention"
    ]
