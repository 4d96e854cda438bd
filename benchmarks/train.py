"""`microtome bench train`: training steps per second of dictionaries, against SAELens, dictionary_learning and sparsify.

1. The model's activations on a corpus are harvested once, into a file that all sides read.
2. For each architecture and seed, each side lives in its own process (`train_worker.py`), so that its peak memory is its
   own; a peer has one for each of its settings. All take the same batches in the same order.
3. The sides take turns of a few steps; while one works, the others wait.
4. At the end each reconstructs the same held-out activations.
5. Where L0 depends on λ, our side is trained again with other λ, untimed, and FVU is compared at the peer's L0
   (`train_fvu.py`).

Ratios are to the fastest of a peer's settings; those of FVU to that same setting's, as the mean over the seeds of each seed's
own ratio, which `fvu_ratio` and `fvu_without_sinks_ratio` hold with Student's 95 % interval.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import in_turn, installed, machine, rate, ratio, summary, tokens_of
from benchmarks.train_fvu import KINDS, Point, curve, fvu_at
from benchmarks.train_sides import ARCHITECTURES, Config, Task
from benchmarks.train_worker import END, PEERS, Worker, sides_of
from microtome.activations import ModelSource
from microtome.common.config import require, to_dict
from microtome.common.device import fast_dtype, parse_device
from microtome.common.progress import progress
from microtome.model import load_model

__all__ = ["Config", "run"]

_COMPARED = ("saelens", "dictionary_learning", "sparsify")
# By side ("topk/microtome"), for each seed: what it said at its end.
Ends = dict[str, list[dict[str, Any]]]


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    about = machine(parse_device(config.device))
    seconds: dict[str, list[float]] = {}
    ends: Ends = {}
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        file = Path(config.rows_file or f"{scratch}/rows.safetensors")
        if not file.is_file():
            _harvest(config, file, Path(scratch) / "tokens")
        for task in _tasks(config):
            _add(*_train(sides_of(task), task, file), task.architecture, seconds, ends)
        if config.many:
            sides = ["microtome_given_batches", "microtome_many"]
            _add(*_train(sides, Task(config, "topk", config.seed), file), "many", seconds, ends)
        speed = {name: rate(config.steps_per_turn, some) for name, some in seconds.items()}
        compared = _compare_fvu(config, _fastest(config, speed), ends, file)
    return {
        "benchmark": "train",
        "machine": about,
        "sizes": to_dict(config),
        "figures": {
            "steps_per_second": speed,
            "activations_per_second": {name: value * config.batch_size for name, value in speed.items()},
            "seconds": seconds,
            **{key: {name: [end[key] for end in some] for name, some in ends.items()} for key in END},
            **compared.figures(),
        },
        "ratios": {**_speed_ratios(config, speed), **compared.ratios()},
        "notes": [*_notes(), *compared.notes],
    }


def _tasks(config: Config) -> Iterator[Task]:
    for architecture in config.chosen:
        for seed in range(config.seed, config.seed + config.seeds):
            yield Task(config, architecture, seed)


def _add(
    took: dict[str, list[float]],
    ended: dict[str, dict[str, Any]],
    label: str,
    seconds: dict[str, list[float]],
    ends: Ends,
) -> None:
    """Put what one seed gave to what others gave."""
    for name, some in took.items():
        seconds.setdefault(f"{label}/{name}", []).extend(some)
        ends.setdefault(f"{label}/{name}", []).append(ended[name])


def _fastest(config: Config, speed: dict[str, float]) -> dict[tuple[str, str], str]:
    """For each architecture and each peer that trained it, its fastest setting."""
    found = {}
    for architecture in config.chosen:
        for peer in _COMPARED:
            theirs = [name for name in speed if name.startswith(f"{architecture}/{peer}")]
            if theirs:
                found[architecture, peer] = max(theirs, key=speed.__getitem__)
    return found


def _speed_ratios(config: Config, speed: dict[str, float]) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {f"{architecture}_vs_saelens": None for architecture in ARCHITECTURES}
    for (architecture, peer), name in _fastest(config, speed).items():
        ratios[f"{architecture}_vs_{peer}"] = ratio(speed[f"{architecture}/microtome"], speed[name])
    if config.many:
        # The cost of a dictionary on the stream, the stream's own included, to that of one that is given its batches.
        given, many = speed["many/microtome_given_batches"], speed["many/microtome_many"]
        ratios["cost_of_one_of_many_vs_alone"] = ratio(given, config.many * many)
    return ratios


class _Compared:
    """Our FVU to a peer's at its L0, for each seed, and the trainings that say so."""

    def __init__(self) -> None:
        self.by_seed: dict[str, dict[tuple[str, str], list[float | None]]] = {kind: {} for kind in KINDS}
        self.curves: dict[str, list[tuple[float, ...]]] = {}
        self.notes: list[str] = []

    def add(self, task: Task, peer: str, points: list[Point], theirs: dict[str, Any]) -> None:
        found = {kind: fvu_at(points, theirs["l0"], kind) for kind in KINDS}
        for kind, ours in found.items():
            self.by_seed[kind].setdefault((task.architecture, peer), []).append(ratio(ours, theirs[kind]))
        if task.coefficient:
            by_l0 = sorted(points, key=lambda p: p.l0)
            label = f"{task.architecture}/{peer}, seed {task.seed}"
            self.curves[label] = [(p.coefficient, p.l0, p.fvu, p.fvu_without_sinks) for p in by_l0]
        if None in found.values():
            reached = ", ".join(f"{p.l0:.1f}" for p in sorted(points, key=lambda p: p.l0))
            self.notes.append(
                f"{task.architecture}, seed {task.seed}: {peer} ended at L0 {theirs['l0']:.1f}, ours at {reached}: FVU cannot "
                "be compared"
            )

    def figures(self) -> dict[str, Any]:
        known = {
            f"{kind}_ratio": {"/".join(of): summary(_known(some)) for of, some in by.items() if _known(some)}
            for kind, by in self.by_seed.items()
        }
        return {**known, "coefficient_l0_fvu_fvu_without_sinks": self.curves}

    def ratios(self) -> dict[str, float | None]:
        """Means over the seeds; None where a seed has none."""
        return {
            f"{architecture}_{kind}_vs_{peer}": None if None in some else summary(_known(some))["mean"]
            for kind, by in self.by_seed.items()
            for (architecture, peer), some in by.items()
        }


def _known(some: list[float | None]) -> list[float]:
    return [each for each in some if each is not None]


def _compare_fvu(config: Config, fastest: dict[tuple[str, str], str], ends: Ends, file: Path) -> _Compared:
    """Compare FVU at equal L0, with what further trainings this needs."""
    compared = _Compared()
    for task in _tasks(config):
        for (architecture, peer), name in fastest.items():
            if architecture != task.architecture:
                continue
            ours, theirs = (ends[each][task.seed - config.seed] for each in (f"{architecture}/microtome", name))
            points = [_point(task, ours)]
            if task.coefficient:
                points = curve(points[0], theirs["l0"], partial(_again, task, file), config.more_coefficients)
            compared.add(task, peer, points, theirs)
    return compared


def _again(task: Task, file: Path, coefficient: float) -> Point:
    """Our side once more, with another λ."""
    other = task.with_coefficient(coefficient)
    return _point(other, _train(["microtome"], other, file)[1]["microtome"])


def _point(task: Task, end: dict[str, Any]) -> Point:
    return Point(task.coefficient, end["l0"], *(end[kind] for kind in KINDS))


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
        if task.coefficient:
            label += f", λ {task.coefficient:.3g}"
        seconds = in_turn(sides, config.steps // config.steps_per_turn - 1, label)
        return seconds, {name: worker.end() for name, worker in workers.items()}
