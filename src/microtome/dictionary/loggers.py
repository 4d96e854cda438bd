"""Training figures to TensorBoard or Weights & Biases, for who asks for it and has it installed."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from microtome.common.errors import MissingDependencyError

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Loggers:
    """The loggers named in `names`, written to together. Raises MissingDependencyError for one that is not
    installed."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._writers: list[Callable[[Mapping[str, float]], None]] = []
        self._closers: list[Callable[[], object]] = []
        for name in names:
            if importlib.util.find_spec(_PACKAGES[name]) is None:
                raise MissingDependencyError(
                    f"Logging to {name} needs its package", fix=f"Run `pip install {_PACKAGES[name]}`"
                )
            {"tensorboard": self._tensorboard, "wandb": self._wandb}[name](folder)

    def write(self, row: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer(row)

    def close(self) -> None:
        for closer in self._closers:
            closer()

    def _tensorboard(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"))

        def write(row: Mapping[str, float]) -> None:
            for key, value in row.items():
                board.add_scalar(key, value, int(row["step"]))

        self._writers.append(write)
        self._closers.append(board.close)

    def _wandb(self, folder: Path) -> None:
        import wandb

        run = wandb.init(project="microtome", name=folder.name.removesuffix(".partial"), dir=str(folder))
        self._writers.append(lambda row: run.log(dict(row), step=int(row["step"])))
        self._closers.append(run.finish)


def as_one_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rows of one step as one; figures of several dictionaries get their numbers as prefixes, those of layers
    theirs behind them."""
    together: dict[str, float] = {"step": rows[0]["step"]}
    for row in rows:
        prefix = "" if len(rows) == 1 else f"{row['dictionary']}/"
        for key, value in row.items():
            if isinstance(value, list):
                together |= {f"{prefix}{key}/{i}": each for i, each in enumerate(value)}
            elif key != "dictionary":
                together[f"{prefix}{key}"] = value
    return together
