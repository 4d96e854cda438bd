"""`Group`: the dictionaries of a training that are one stack, with their optimiser, counters and columns.

The rows of a stream hold the activations of all its hook points, one point behind the other. A group's `Layout` knows
which columns its members read and predict.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from microtome.common.device import derive_seed, generator
from microtome.common.errors import InputError
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig, GatedConfig, JumpReLUConfig, PenaltyConfig
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.fine_tuning import L0_ROWS, checked, with_thresholds
from microtome.dictionary.formats import load_any_dictionary
from microtome.dictionary.layout import Layered, Layout, Separate, Sites, take
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack, StepReport
from microtome.dictionary.statistics import distances, geometric_median

_LOOK_AT_DEAD_EVERY = 10  # steps, where a look means waiting for the device


def alike(config: DictionaryConfig) -> DictionaryConfig:
    """The config without what members of one stack may differ in."""
    same = replace(config, seed=None, fine_tune=None)
    return replace(same, coefficient=0.0) if isinstance(same, PenaltyConfig) else same


class Group:
    """A stack in training. `numbers` are its dictionaries' places in the list of all: its members', or the one of the
    cross-layer transcoder whose layers its members are; the training takes `n_tokens` in all."""

    def __init__(
        self,
        configs: Sequence[DictionaryConfig],
        numbers: Sequence[int],
        sites: Sites,
        *,
        n_tokens: int,
        device: torch.device,
    ) -> None:
        self.configs = [c if c.inputs else replace(c, inputs=sites.names) for c in configs]
        self.numbers, self.config = list(numbers), self.configs[0]
        self.layout: Layout = (
            Layered(self.config, sites) if self.config.cross_layer else Separate(self.config, len(configs), sites)
        )
        of_members = self.layout.configs(self.configs)
        decoder = self.layout.decoder(self.config.d_sae)
        self.stack = Stack(of_members, make_rule(of_members), self.layout.d_in, self.layout.d_out, decoder).to(device)
        self.optimiser = torch.optim.Adam(
            _by_rate(self.stack), lr=1.0, betas=(self.config.betas[0], self.config.betas[1]), fused=True
        )
        self.variance = torch.ones(len(of_members), device=device)
        self.silent = torch.zeros(len(of_members), self.config.d_sae, dtype=torch.int64, device=device)
        self.dead_after = self.config.dead_after_in(n_tokens)
        self._any_dead, self._looked = False, 0

    # ---- begin --------------------------------------------------------------------------------------------------------

    def begin(self, rows: Float[Tensor, "row d"], scales: Float[Tensor, " d"], seed: int) -> None:
        """Make the members from the first rows (scaled by `scales`). Raises InputError where all rows of an output are
        equal."""
        for name, columns in zip(self.layout.outputs, self.layout.y_columns, strict=True):
            if bool((rows[:, columns] == rows[:1, columns]).all()):
                raise InputError(
                    "The activations are all equal: there is nothing to learn", got=f"{len(rows)} equal rows at {name}"
                )
        x, y = self.layout.x(rows), self.layout.y(rows)
        find = _mean if self.config.b_dec_start == "mean" else geometric_median
        centers = torch.stack([find(each) for each in y])
        reads_other = self.config.is_transcoder
        x_centers = torch.stack([geometric_median(each) for each in x]) if reads_other else centers
        spread = distances(y, centers).square().median(1).values
        members = len(self.stack)
        self.variance = spread.expand(members).clone()
        data = DataStatistics(x_centers.expand(members, -1), centers.expand(members, -1), self.variance)
        self.stack.initialise(data, self.layout.seeds([seed if c.seed is None else c.seed for c in self.configs]))
        for member, config in enumerate(self.configs):
            if config.fine_tune is not None:
                start = checked(load_any_dictionary(config.fine_tune, device=str(rows.device)))
                if isinstance(config, JumpReLUConfig | GatedConfig):
                    start = with_thresholds(start, take(rows[:L0_ROWS] / scales, self.layout.x_columns))
                self.layout.begin_with(self.stack, member, start, scales)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def train_step(
        self, rows: Float[Tensor, "n d"], *, lr: float, fraction: float, select_dtype: torch.dtype
    ) -> StepReport:
        """One update of all members on scaled rows."""
        report = self.stack.step(
            self.layout.x(rows),
            self.layout.y(rows),
            variance=self.variance,
            fraction=fraction,
            dead=self._dead_if_any(),
            select_dtype=select_dtype,
        )
        self.stack.before_update()
        for each in self.optimiser.param_groups:
            each["lr"] = lr * each["rate"]
        self.optimiser.step()
        self.stack.after_update()
        self.silent = torch.where(report.fired, 0, self.silent + len(rows))
        return report

    @property
    def dead(self) -> Bool[Tensor, "S F"]:
        """The latents that have been silent for `dead_after` tokens."""
        return self.silent >= self.dead_after

    def _dead_if_any(self) -> Bool[Tensor, "S F"] | None:
        dead = self.dead
        if not dead.is_cuda or self._looked % _LOOK_AT_DEAD_EVERY == 0:
            self._any_dead = bool(dead.any())
        self._looked += 1
        return dead if self._any_dead else None

    def resample(self, rows: Float[Tensor, "n d"], *, step: int, seed: int) -> None:
        """Give dead latents new weights, drawn from these scaled rows."""
        x, y = self.layout.x(rows), self.layout.y(rows)
        residual = self.stack.residual(x, y)
        for member, dead in enumerate(self.dead):
            draw = generator(derive_seed(seed, "resample", step, self.numbers[0], member), "inputs")
            resample(self.stack, self.optimiser, member, dead, x, y, generator=draw, residual=residual)
            self.silent[member][dead] = 0

    def figures(self, report: StepReport) -> list[dict[str, Any]]:
        """The figures of each dictionary after a step."""
        by_member = {"loss": report.loss, "fvu": report.fvu, "aux": report.aux, "l0": report.l0}
        return self.layout.figures({**by_member, "dead": self.dead.sum(1)})

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
        looked = torch.tensor([self._looked, int(self._any_dead)])
        return {**tensors, "silent": self.silent, "variance": self.variance, "looked": looked}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        prefix = "stack."
        self.stack.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.silent, self.variance = (tensors[name].to(self.silent.device) for name in ("silent", "variance"))
        self._looked, self._any_dead = int(tensors["looked"][0]), bool(tensors["looked"][1])
        for name, p in self.stack.named_parameters():
            keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
            self.optimiser.state[p] = {key.rpartition(".")[2]: tensors[key].to(p.device) for key in keys}

    def export(
        self, which: int, scales: Float[Tensor, " d"], origin: dict[str, Any]
    ) -> Dictionary | CrossLayerTranscoder:
        """One of its dictionaries, on the model's own activations."""
        return self.layout.export(self.stack, which, origin, scales)


def _by_rate(stack: Stack) -> list[dict[str, Any]]:
    """The stack's parameters, in groups for the optimiser: `rate` times the learning rate is a group's own."""
    rates = {id(p): rate for p, rate in stack.rule.rates()}
    groups: dict[float, list[nn.Parameter]] = {}
    for p in stack.parameters():
        groups.setdefault(rates.get(id(p), 1.0), []).append(p)
    return [{"params": some, "rate": rate} for rate, some in groups.items()]


def _mean(rows: Float[Tensor, "row d"]) -> Float[Tensor, " d"]:
    return rows.mean(0)
