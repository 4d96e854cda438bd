"""`microtome bench train`: training steps per second of dictionaries, against SAELens, dictionary_learning and sparsify.

1. The model's activations on a corpus are harvested once, into a file that all sides read.
2. For each architecture and seed, each side lives in its own process (`train_worker.py`), so that its peak memory is its
   own; a peer has one for each of its settings. All take the same batches in the same order.
3. The sides take turns of a few steps; while one works, the others wait.
4. At the end each reconstructs the same held-out activations.

Ratios are to the fastest of a peer's settings; those of FVU to that same setting's, as means over the seeds.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import in_turn, installed, machine, rate, ratio, tokens_of
from benchmarks.train_sides import ARCHITECTURES, Config, Task
from benchmarks.train_worker import END, PEERS, Worker, sides_of
from microtome.activations import ModelSource
from microtome.common.config import require, to_dict
from microtome.common.device import fast_dtype, parse_device
from microtome.common.progress import progress
from microtome.model import load_model

__all__ = ["Config", "run"]

_COMPARED = ("saelens", "dictionary_learning", "sparsify")


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    about = machine(parse_device(config.device))
    seconds: dict[str, list[float]] = {}
    ends: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        file = Path(config.rows_file or f"{scratch}/rows.safetensors")
        if not file.is_file():
            _harvest(config, file, Path(scratch) / "tokens")
        for architecture in config.chosen:
            for seed in range(config.seed, config.seed + config.seeds):
                task = Task(config, architecture, seed)
                _add(*_train(sides_of(task), task, file), architecture, seconds, ends)
        if config.many:
            sides = ["microtome_given_batches", "microtome_many"]
            _add(*_train(sides, Task(config, "topk", config.seed), file), "many", seconds, ends)
    speed = {name: rate(config.steps_per_turn, some) for name, some in seconds.items()}
    return {
        "benchmark": "train",
        "machine": about,
        "sizes": to_dict(config),
        "figures": {
            "steps_per_second": speed,
            "activations_per_second": {name: value * config.batch_size for name, value in speed.items()},
            "seconds": seconds,
            **{key: {name: [end[key] for end in some] for name, some in ends.items()} for key in END},
        },
        "ratios": _ratios(config, speed, ends),
        "notes": _notes(),
    }


def _add(
    took: dict[str, list[float]],
    ended: dict[str, dict[str, Any]],
    label: str,
    seconds: dict[str, list[float]],
    ends: dict[str, list[dict[str, Any]]],
) -> None:
    """Put what one seed gave to what others gave."""
    for name, some in took.items():
        seconds.setdefault(f"{label}/{name}", []).extend(some)
        ends.setdefault(f"{label}/{name}", []).append(ended[name])


def _ratios(config: Config, speed: dict[str, float], ends: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {f"{architecture}_vs_saelens": None for architecture in ARCHITECTURES}
    for architecture in config.chosen:
        ours = f"{architecture}/microtome"
        for peer in _COMPARED:
            theirs = [name for name in speed if name.startswith(f"{architecture}/{peer}")]
            if not theirs:
                continue
            fastest = max(theirs, key=speed.__getitem__)
            ratios[f"{architecture}_vs_{peer}"] = ratio(speed[ours], speed[fastest])
            errors = [mean(end["fvu"] for end in ends[name]) for name in (ours, fastest)]
            ratios[f"{architecture}_fvu_vs_{peer}"] = ratio(*errors)
    if config.many:
        # The cost of a dictionary on the stream, the stream's own included, to that of one that is given its batches.
        given, many = speed["many/microtome_given_batches"], speed["many/microtome_many"]
        ratios["cost_of_one_of_many_vs_alone"] = ratio(given, config.many * many)
    return ratios


def _notes() -> list[str]:
    missing = {peer.package: peer.install for peer in PEERS.values() if not installed(peer.package)}
    return [f"{package} is not installed here: {how}" for package, how in missing.items()]


@torch.no_grad()
def _harvest(config: Config, file: Path, scratch: Path) -> None:
    """Write `train` and `held_out` rows, special tokens left out, in the dtype in which the model is quickest."""
    device = parse_device(config.device)
    model = load_model(config.model, dtype=fast_dtype(device), device=config.device)
    wanted = config.rows + config.held_out
    # A little more than wanted, for the special tokens that are left out.
    n_tokens = wanted + wanted // 8 + 4 * config.context
    source = ModelSource(model, tokens_of(model, config, n_tokens, scratch), config.hook_name)
    found = int(source.block_rows.sum())
    require(found >= wanted, "The corpus is too short", got=f"{found} tokens of text", expected=f"{wanted}")
    pieces, n = [], 0
    with progress(wanted, "harvest", "rows") as bar:
        for block in range(source.n_blocks):
            pieces.append(source.read(block).cpu())
            n += len(pieces[-1])
            bar.advance(len(pieces[-1]))
            if n >= wanted:
                break
    rows = torch.cat(pieces)
    save_file({"train": rows[: config.rows].clone(), "held_out": rows[config.rows : wanted].clone()}, file)


def _train(names: list[str], task: Task, file: Path) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each turn, and what each side says at its end."""
    config = task.config
    with ExitStack() as stack:
        workers = {name: Worker(name, task, file) for name in names}  # all start at once
        for worker in workers.values():
            stack.enter_context(worker)
        sides: dict[str, Callable[[], float]] = {name: worker.turn for name, worker in workers.items()}
        label = f"bench train {task.architecture}, seed {task.seed}"
        seconds = in_turn(sides, config.steps // config.steps_per_turn - 1, label)
        return seconds, {name: worker.end() for name, worker in workers.items()}
