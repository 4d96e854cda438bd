"""`microtome bench train`: training steps per second of a TopK dictionary, against SAELens 6's own trainer.

1. The model's activations on a corpus are harvested once, into a file that all sides read.
2. Each side lives in its own process (`train_sides.py`), so that its peak memory is its own; SAELens has one for each of
   its settings. All take the same batches in the same order.
3. The sides take turns of a few steps; while one works, the others wait.
4. At the end each reconstructs the same held-out activations.

The ratio is to the fastest of SAELens's settings.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import in_turn, installed, machine, rate, ratio, tokens_of
from benchmarks.train_sides import END, SIDES, Config, serve
from microtome.activations import ModelSource
from microtome.common.config import require, to_dict
from microtome.common.device import fast_dtype, parse_device
from microtome.common.errors import MicrotomeError
from microtome.common.progress import progress
from microtome.model import load_model

__all__ = ["Config", "run"]

NOT_BUILT = ("batchtopk_vs_saelens", "relu_vs_saelens", "jumprelu_vs_saelens")
PEER = "sae_lens"
_PATIENCE_S = 10.0


def run(config: Config) -> dict[str, Any]:
    """Measure, and return the machine, the sizes, the figures, the ratios and what there is to note."""
    device = parse_device(config.device)
    about, notes = machine(device), []
    names = [name for name in SIDES if name.startswith("microtome") or installed(PEER)]
    if not installed(PEER):
        notes.append("SAELens is not installed here: pip install 'sae-lens>=6,<7', or '.[bench]' from the repository")
    notes.append(f"Not built yet: {', '.join(NOT_BUILT)}")
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as scratch:
        file = Path(scratch) / "rows.safetensors"
        _harvest(config, file, Path(scratch) / "tokens")
        seconds, ends = _train(names, config, file)
    speed = {name: rate(config.steps_per_turn, some) for name, some in seconds.items()}
    theirs = [value for name, value in speed.items() if name.startswith("saelens")]
    return {
        "benchmark": "train",
        "machine": about,
        "sizes": to_dict(config),
        "figures": {
            "steps_per_second": speed,
            "activations_per_second": {name: value * config.batch_size for name, value in speed.items()},
            "seconds": seconds,
            **{key: {name: end[key] for name, end in ends.items()} for key in END},
        },
        "ratios": {
            "topk_vs_saelens": ratio(speed["microtome"], max(theirs, default=None)),
            **dict.fromkeys(NOT_BUILT),
        },
        "notes": notes,
    }


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


def _train(names: list[str], config: Config, file: Path) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each turn, and what each side says at its end."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_Worker(name, config, file)) for name in names}
        sides: dict[str, Callable[[], float]] = {name: worker.turn for name, worker in workers.items()}
        seconds = in_turn(sides, config.steps // config.steps_per_turn - 1, "bench train")
        return seconds, {name: worker.end() for name, worker in workers.items()}


class _Worker:
    """A side's process, told through a pipe what to do."""

    def __init__(self, name: str, config: Config, file: Path) -> None:
        self.name, self.config = name, config
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, config, str(file)), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        self._answer()  # it is ready: what follows is timed
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # tells it to go, if it is still there
        self.process.join(_PATIENCE_S)
        self.process.terminate()
        self.process.join()

    def turn(self) -> float:
        self.pipe.send(self.config.steps_per_turn)
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
