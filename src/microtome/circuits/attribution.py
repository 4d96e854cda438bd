"""Attribution patching: what patching every part of a model would do to a metric, estimated from a gradient.

The effect of replacing the activation a of a part by the value a′ that it has on another prompt is, to first order,

    m(a′) − m(a)  ≈  (a′ − a) · ∂m/∂a        (Nanda 2023; edges: Syed et al. 2023, arXiv 2310.10348)

so one backward pass estimates all parts at once. `direction="noising"` replaces clean activations by corrupt ones (gradients
on the clean prompt): a part that the task needs has a score that lowers the metric. `"denoising"` is the other way round.

Where the gradient is taken:

    gradient, eap                  on the prompt itself: two forward passes and one backward
    integrated-gradients, eap-ig   mean over `steps` points on the line from the replacement's embedding to the prompt's
                                   (Hanna et al. 2024, arXiv 2403.17806)
    eap-ig-activations             for each layer's part by itself, mean over `steps` points on the line between its own two
                                   values: the closest, at a forward and backward pass for each layer and step

`rules` change the gradient (`rules.py`). Scores are of each prompt; the metric is summed over prompts, not averaged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits.attribution_config import POINTS, AttributeConfig
from microtome.circuits.backward import Activations, chunks, differentiate, measure, some_pair
from microtome.circuits.edges import EdgeScores
from microtome.circuits.effects import Axis, Effects, head_axis, layer_axis, numbers
from microtome.circuits.metrics import AnyMetric, Metric, as_metric
from microtome.circuits.pairs import Pair, pair, position_labels
from microtome.circuits.rules import rule_taps
from microtome.common.errors import ModelError
from microtome.common.progress import progress
from microtome.model.hooked import HookedModel, Input
from microtome.model.names import HookName
from microtome.model.taps import Tap


def attribute(
    model: HookedModel,
    clean: Input,
    corrupt: Input,
    metric: AnyMetric,
    config: AttributeConfig | None = None,
    **settings: Any,
) -> Effects:
    """Estimate for every part what patching it would add to the metric of each prompt.

    `settings` are those of `AttributeConfig`. `level="node"`: Effects `[layer, head or neuron, position if by_position]`.
    `level="edge"`: Effects `[writer, reader]` over all edges (`Graph`), 0 where there is none; `prune` makes a `Circuit` of it.
    `clean` and `corrupt` of the Effects are the metric of the prompts themselves.

    Raises ConfigError for settings that cannot be; InputError for prompts that do not fit each other or are the same, and for a
    metric that is NaN or has the wrong shape; ModelError for a part that the model has not.
    """
    config = AttributeConfig.of(config, settings)
    both = pair(model, clean, corrupt)
    noising = config.direction == "noising"
    both = both if noising else Pair(both.corrupt, both.clean)
    measured = as_metric(metric, both.n_prompts)
    taps = rule_taps(config.rules, model)
    values, ends = [], []
    with progress(both.n_prompts, "attribute", "prompts") as bar:
        for rows in chunks(both.n_prompts, config.batch_size, measured):
            scores: Scores = EdgeScores(model, config.rules) if config.level == "edge" else NodeScores(model, config)
            ends.append(_Estimate(model, measured, scores, config, taps).add(both, rows))
            values.append(scores.result())
            bar.advance(len(rows))
    own, others = (torch.cat(side) for side in zip(*ends, strict=True))
    return Effects(
        values=torch.cat(values, dim=-1),
        axes=scores.axes(both),
        what=f"estimated change of the {measured.name} by {config.direction} ({config.method})",
        clean=own if noising else others,
        corrupt=others if noising else own,
        notes=(f"rules: {config.rules}",),
    )


@runtime_checkable
class Scores(Protocol):
    """Where gradients are taken and what scores are made of them. A stage is a set of points that one layer's writers share."""

    @property
    def at(self) -> Sequence[HookName]: ...

    @property
    def reads(self) -> Sequence[HookName]: ...

    @property
    def written(self) -> Sequence[HookName]: ...

    @property
    def stages(self) -> Sequence[HookName]: ...

    def begin(self, current: Activations, other: Activations) -> None:
        """Told the activations at `written` of the prompts and of their replacements, once."""

    def add(self, activations: Activations, gradients: Activations, weight: float, stage: HookName | None) -> None:
        """Count one run's gradients (for the writers of one stage only, or for all)."""

    def result(self) -> Float[Tensor, "*grid rows"]: ...

    def axes(self, pair: Pair) -> tuple[Axis, ...]: ...


@dataclass(frozen=True)
class _Estimate:
    """One way of taking gradients, for one kind of scores."""

    model: HookedModel
    metric: Metric
    scores: Scores
    config: AttributeConfig
    rules: Sequence[Tap]

    def add(self, pair: Pair, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Score some rows; returns the metric of the prompts and of their replacements."""
        scores, (current, replacement) = self.scores, some_pair(pair, rows)
        start = HookName("hook_resid_pre", 0)
        written = list(dict.fromkeys([*scores.written, start]))
        other_value, other = measure(self.model, replacement, self.metric, rows, written)
        at = list(dict.fromkeys([*scores.at, start]))
        here = differentiate(
            self.model, current, self.metric, rows, at=at, reads=[*scores.reads, *written], taps=self.rules
        )
        scores.begin(here.activations, other)
        runs = list(self._runs(here.activations, other))
        weight = 1 / self.config.steps if runs else 1.0
        scores.add(here.activations, here.gradients, weight, None)
        for tap, stage in runs:
            run = differentiate(
                self.model, current, self.metric, rows, at=at, reads=scores.reads, taps=[tap, *self.rules]
            )
            scores.add(run.activations, run.gradients, weight, stage)
        return here.values, other_value

    def _runs(self, here: Activations, other: Activations) -> Iterator[tuple[Tap, HookName | None]]:
        """The runs besides the one on the prompt itself: at steps 1 … m − 1 of m between replacement and prompt."""
        path, steps = self.config.path, self.config.steps
        stages = {None: [], "inputs": [HookName("hook_resid_pre", 0)], "activations": self.scores.stages}[path]
        for name in stages:
            for step in range(1, steps):
                between = torch.lerp(other[name], here[name], step / steps)
                yield _set(name, between), name if path == "activations" else None


def _set(name: HookName, value: Tensor) -> Tap:
    return Tap(name, lambda activation: value, through=True)


class NodeScores:
    """Δ · gradient at one kind of part of every layer."""

    def __init__(self, model: HookedModel, config: AttributeConfig) -> None:
        self.names = [HookName(POINTS[config.over], layer) for layer in range(model.config.n_layers)]
        missing = [name for name in self.names if str(name) not in model.hook_points]
        if missing or not self.names:
            beside = "Attention and MLP read the same stream side by side: use resid_pre or resid_post"
            raise ModelError(
                f"{model.name} has no {config.over} to attribute to",
                got=f"no hook point {missing[0]}" if missing else "a model without blocks",
                fix=beside if config.over == "resid_mid" and model.spec.parallel else None,
            )
        self.model, self.over, self.by_position = model, config.over, config.by_position
        self.at = self.written = self.stages = self.names
        self.reads: list[HookName] = []
        self.scores: list[Tensor] = []

    def begin(self, current: Activations, other: Activations) -> None:
        self.delta = {name: other[name] - current[name] for name in self.names}

    def add(self, activations: Activations, gradients: Activations, weight: float, stage: HookName | None) -> None:
        if not self.scores:
            self.scores = [torch.zeros(()) for _ in self.names]
        for i, name in enumerate(self.names):
            if stage in (None, name):
                product = self.delta[name].float() * gradients[name].float()
                self.scores[i] = self.scores[i] + weight * self._summed(product)

    def _summed(self, product: Float[Tensor, "rows pos *part"]) -> Tensor:
        """`[head or neuron, position, rows]`, of which only the wanted axes are there."""
        if self.over != "neuron":
            product = product.sum(-1)
        if not self.by_position:
            return product.sum(1).movedim(0, -1).cpu()
        return product.movedim(0, -1).movedim(0, -2).cpu()

    def result(self) -> Float[Tensor, "layer *grid rows"]:
        return torch.stack(self.scores)

    def axes(self, pair: Pair) -> tuple[Axis, ...]:
        sizes = self.model.config
        axes = [layer_axis(sizes.n_layers)]
        if self.over in ("head", "q"):
            axes.append(head_axis(sizes.n_heads))
        elif self.over in ("k", "v"):
            axes.append(Axis("key/value head", numbers(sizes.n_kv_heads)))
        elif self.over == "neuron":
            axes.append(Axis("neuron", numbers(sizes.d_mlp)))
        return tuple(axes) + ((position_labels(self.model, pair.clean),) if self.by_position else ())
