"""A side of `microtome bench train` in a process of its own, so that its peak memory is its own, and the table of all
sides."""

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import installed, resident_bytes, timed
from benchmarks.train_peers import DictionaryLearning, SAELens, Sparsify
from benchmarks.train_sides import ARCHITECTURES, Microtome, Rows, Side, Task
from microtome.common.device import parse_device
from microtome.common.errors import MicrotomeError
from microtome.dictionary.moments import Moments, is_sink

END = ("fvu", "fvu_without_sinks", "sinks", "l0", "dead", "start_bytes", "peak_bytes", "peak_gpu_bytes")
_BLOCK = 2048
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Peer:
    """A package, how to install it, and its way to train some architectures."""

    package: str
    install: str
    make: Callable[[Task, Rows], Side]
    architectures: tuple[str, ...] = ARCHITECTURES


_SAELENS = ("sae_lens", "pip install 'sae-lens>=6,<7'")
_SPARSIFY = ("sparsify", "pip install eai-sparsify")
PEERS: dict[str, Peer] = {
    "saelens_fp32": Peer(*_SAELENS, SAELens),
    "saelens_fp32_sparse": Peer(*_SAELENS, partial(SAELens, sparse=True), ("topk",)),
    "saelens_autocast": Peer(*_SAELENS, partial(SAELens, autocast=True)),
    "dictionary_learning": Peer(
        "dictionary_learning", "pip install dictionary-learning", DictionaryLearning, ("topk", "batchtopk")
    ),
    "sparsify_fp32": Peer(*_SPARSIFY, Sparsify, ("topk",)),
    "sparsify_autocast": Peer(*_SPARSIFY, partial(Sparsify, autocast=True), ("topk",)),
}
OURS: dict[str, Callable[[Task, Rows], Side]] = {
    "microtome": Microtome,
    "microtome_given_batches": partial(Microtome, stream=False),
    "microtome_many": lambda task, rows: Microtome(task, rows, many=task.config.many),
}


def sides_of(task: Task) -> list[str]:
    """Microtome, and the peers that can train this architecture and are installed."""
    there = [
        name for name, peer in PEERS.items() if task.architecture in peer.architectures and installed(peer.package)
    ]
    wanted = set(filter(None, task.config.sides.split(",")))
    return ["microtome", *(name for name in there if not wanted or name in wanted)]


class Worker:
    """A side's process, told through a pipe what to do."""

    def __init__(self, name: str, task: Task, file: Path) -> None:
        self.name, self.task = name, task
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, task, str(file)), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        self._answer()  # it is ready: what follows is timed
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # tells it to go, if it is still there
        self.process.join(_PATIENCE_S)
        self.process.terminate()
        self.process.join()

    def turn(self) -> float:
        self.pipe.send(self.task.config.steps_per_turn)
        return float(self._answer())

    def end(self) -> dict[str, Any]:
        self.pipe.send(None)
        end: dict[str, Any] = self._answer()
        return end

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise MicrotomeError(
                f"The process that measures {self.name} ended early",
                got=f"exit status {self.process.exitcode}",
                fix="Its own message is above; -9 often means that there was not enough memory",
            ) from None


def serve(pipe: Connection, name: str, task: Task, file: str) -> None:
    """Make the side, then answer: a number of steps with the seconds that they took, None with the figures of the end."""
    sys.stdout = sys.stderr  # what a peer prints is no part of the result
    device = parse_device(task.config.device)
    rows = load_file(file)
    side = (OURS[name] if name in OURS else PEERS[name].make)(task, rows["train"])
    start = resident_bytes("VmRSS")
    pipe.send("ready")
    try:
        while (steps := pipe.recv()) is not None:
            pipe.send(timed(lambda: [side.step() for _ in range(steps)] and None, device))
        pipe.send(_end(side, rows["held_out"], device, start))
    except (EOFError, KeyboardInterrupt):
        return  # whoever asked has gone


def _end(side: Side, held_out: Rows, device: torch.device, start: int) -> dict[str, Any]:
    peak = resident_bytes("VmHWM")
    peak_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    moments, without_sinks = Moments(held_out.shape[1]), Moments(held_out.shape[1])
    sinks, fired = is_sink(held_out), 0
    for x, is_out in zip(held_out.float().split(_BLOCK), sinks.split(_BLOCK), strict=True):
        reconstruction, n = side.reconstruct(x.to(device))
        made = reconstruction.float().cpu()
        moments.add(x, made)
        without_sinks.add(x[~is_out], made[~is_out])
        fired += n
    fvu, l0 = (moments.fvu(), without_sinks.fvu(), int(sinks.sum())), fired / len(held_out)
    return dict(zip(END, (*fvu, l0, side.n_dead(), start, peak, peak_gpu), strict=True))
