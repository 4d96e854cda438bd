"""`Group`: the dictionaries of a training that are one stack, with their optimiser, counters and columns.

The rows of a stream hold the activations of all its hook points, one point behind the other. A group knows which
columns are its inputs and outputs (`Sites`), and how its members differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.common.device import derive_seed, generator
from microtome.common.errors import ConfigError, InputError, unknown_name
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig, PenaltyConfig
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.formats import load_dictionary
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack, StepReport
from microtome.dictionary.statistics import geometric_median

_LOOK_AT_DEAD_EVERY = 10  # steps, where a look means waiting for the device


@dataclass(frozen=True)
class Sites:
    """Where the hook points of a source are in its rows."""

    names: tuple[str, ...]
    widths: tuple[int, ...]

    def columns(self, wanted: Sequence[str]) -> list[slice]:
        """The columns of each point. Raises ConfigError for one that the source does not have."""
        starts = {name: sum(self.widths[:i]) for i, name in enumerate(self.names)}
        for name in wanted:
            if name not in starts:
                raise unknown_name("hook point of the source", name, self.names, ConfigError)
        return [slice(starts[name], starts[name] + self.widths[self.names.index(name)]) for name in wanted]


def take(rows: Float[Tensor, "*n d"], columns: Sequence[slice]) -> Float[Tensor, "*n part"]:
    """These columns of the rows, one behind the other."""
    pieces = [rows[..., each] for each in columns]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def alike(config: DictionaryConfig) -> DictionaryConfig:
    """The config without what members of one stack may differ in."""
    same = replace(config, seed=None, fine_tune=None)
    return replace(same, coefficient=0.0) if isinstance(same, PenaltyConfig) else same


class Group:
    """A stack in training. `numbers` are its members' places in the list of all dictionaries."""

    def __init__(
        self, configs: Sequence[DictionaryConfig], numbers: Sequence[int], sites: Sites, *, device: torch.device
    ) -> None:
        self.configs, self.numbers, self.config = list(configs), list(numbers), configs[0]
        self.inputs = self.config.inputs or sites.names
        self.outputs = self.config.outputs or self.inputs
        self.x_columns, self.y_columns = sites.columns(self.inputs), sites.columns(self.outputs)
        d_in, d_out = (sum(c.stop - c.start for c in columns) for columns in (self.x_columns, self.y_columns))
        self.stack = Stack(self.configs, make_rule(self.configs), d_in, d_out).to(device)
        self.optimiser = torch.optim.Adam(
            self.stack.parameters(), lr=1.0, betas=(self.config.betas[0], self.config.betas[1]), fused=True
        )
        self.variance = 1.0
        self.silent = torch.zeros(len(configs), self.config.d_sae, dtype=torch.int64, device=device)
        self._any_dead, self._looked = False, 0

    # ---- begin --------------------------------------------------------------------------------------------------------

    def begin(self, rows: Float[Tensor, "row d"], scales: Float[Tensor, " d"], seed: int) -> None:
        """Make the members from the first rows (scaled by `scales`). Raises InputError where all rows are equal."""
        x, y = take(rows, self.x_columns), take(rows, self.y_columns)
        center = y.mean(0) if self.config.b_dec_start == "mean" else geometric_median(y)
        spread = float((y - center).square().sum(1).median())
        if spread == 0.0:
            raise InputError(
                "The activations are all equal: there is nothing to learn",
                got=f"{len(rows)} equal rows at {', '.join(self.outputs)}",
            )
        self.variance = spread
        x_center = center if self.inputs == self.outputs else geometric_median(x)
        members = len(self.configs)
        data = DataStatistics(x_center.expand(members, -1), center.expand(members, -1), spread)
        self.stack.initialise(data, [seed if c.seed is None else c.seed for c in self.configs])
        for member, config in enumerate(self.configs):
            if config.fine_tune is not None:
                start = load_dictionary(config.fine_tune, device=str(rows.device))
                self.stack.begin_with(member, start, take(scales, self.x_columns), take(scales, self.y_columns))

    # ---- a step -------------------------------------------------------------------------------------------------------

    def train_step(
        self, rows: Float[Tensor, "n d"], *, lr: float, fraction: float, select_dtype: torch.dtype
    ) -> StepReport:
        """One update of all members on scaled rows."""
        x, y = take(rows, self.x_columns)[None], take(rows, self.y_columns)[None]
        report = self.stack.step(
            x, y, variance=self.variance, fraction=fraction, dead=self._dead_if_any(), select_dtype=select_dtype
        )
        self.stack.before_update()
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        self.stack.after_update()
        self.silent = torch.where(report.fired, 0, self.silent + len(rows))
        return report

    @property
    def dead(self) -> Bool[Tensor, "S F"]:
        """The latents that have been silent for `dead_after` tokens."""
        return self.silent >= self.config.dead_after

    def _dead_if_any(self) -> Bool[Tensor, "S F"] | None:
        dead = self.dead
        if not dead.is_cuda or self._looked % _LOOK_AT_DEAD_EVERY == 0:
            self._any_dead = bool(dead.any())
        self._looked += 1
        return dead if self._any_dead else None

    def resample(self, rows: Float[Tensor, "n d"], *, step: int, seed: int) -> None:
        """Give dead latents new weights, drawn from these scaled rows."""
        x, y = take(rows, self.x_columns), take(rows, self.y_columns)
        for member, dead in enumerate(self.dead):
            draw = generator(derive_seed(seed, "resample", step, self.numbers[member]), "inputs")
            resample(self.stack, self.optimiser, member, dead, x, y, generator=draw)
            self.silent[member][dead] = 0

    def resamples_at(self, step: int, n_steps: int) -> bool:
        """Whether dead latents get new weights after this many steps."""
        config = self.config
        return (
            config.revival == "resample"
            and step % config.resample_every == 0
            and 0 < step <= config.resample_until * n_steps
        )

    # ---- checkpoints and the end --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""
        tensors = {f"stack.{name}": value for name, value in self.stack.state_dict().items()}
        for name, p in self.stack.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimiser.state[p].items()}
        return {**tensors, "silent": self.silent, "variance": torch.tensor(self.variance, dtype=torch.float64)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        prefix = "stack."
        self.stack.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.silent, self.variance = tensors["silent"].to(self.silent.device), float(tensors["variance"])
        for name, p in self.stack.named_parameters():
            keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
            self.optimiser.state[p] = {key.rpartition(".")[2]: tensors[key].to(p.device) for key in keys}

    def export(self, member: int, scales: Float[Tensor, " d"], origin: dict[str, Any]) -> Dictionary:
        """A member as a dictionary of the model's own activations."""
        where = Origin(inputs=self.inputs, outputs=self.outputs, **origin)
        return self.stack.export(member, where, take(scales, self.x_columns), take(scales, self.y_columns))
