"""`evaluate`: how well a dictionary stands for the activations, and what the model loses when it runs on its output.

Two passes over held-out text, special tokens (BOS, separator) left out everywhere and left as they are in spliced runs:

1. `reconstruction.py`: FVU and its parts, cosine, L0, firing counts, summed in double precision while they stream;
2. `splice.py`: cross-entropy and KL with the dictionary in place, against zero and mean ablation; of cross-layer
   transcoders and sets also with all layers replaced in one run (`replacement.py`).

`evaluate_all` measures several dictionaries on one model: each batch is read once for all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from microtome.activations.source import text_mask
from microtome.common.config import require
from microtome.common.progress import Progress, progress, say
from microtome.dictionary.fit import check_fit
from microtome.dictionary.moments import Moments, units_of
from microtome.dictionary.reconstruction import LayerLatents, PointFit, Reconstruction, density_histogram
from microtome.dictionary.replacement import as_replacement
from microtome.dictionary.splice import FIGURES, Function, Splice, runs_per_batch
from microtome.dictionary.surface import Read, SparseDictionary
from microtome.model import HookedModel
from microtome.text import TokenDataset

__all__ = ["EvaluateConfig", "Evaluation", "Moments", "density_histogram", "evaluate", "evaluate_all"]

_MANY_POINTS = 8  # with more, the points alone take most of the time


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much text: `n_tokens` for reconstruction, `function_tokens` of them for CE and KL; `batch_tokens` per forward
    pass. `whole_only`: of a dictionary that writes several points no CE and KL with each of these alone replaced, which
    cost three passes for each point."""

    n_tokens: int = 131_072
    function_tokens: int = 16_384
    batch_tokens: int = 2048
    whole_only: bool = False

    def __post_init__(self) -> None:
        require(self.n_tokens >= self.function_tokens >= 0, "n_tokens must hold function_tokens", got=self.n_tokens)
        require(self.batch_tokens > 0, "batch_tokens must be positive", got=self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures. Fractions are of 1; cross-entropies and KL in nats per token; `n_tokens` counts text tokens.

    `fvu` = Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all text tokens (y = x for an autoencoder); `explained_variance` is 1 − fvu, so
    about the mean, not about zero. `points` has each output point alone; `layers` has, of a cross-layer transcoder or a set, the
    latents of each layer, whose `l0` add up to that of all. `fvu_without_sinks` leaves out `n_sinks` tokens whose squared
    norm is above ten times the median of their batch: a few attention sinks can carry most of the variance.
    `fvu_all_positions` counts special tokens too and is there for comparison with tools that do: their outsized norm
    flatters it.

    `ce_recovered` = (ce_zero − ce_spliced) / (ce_zero − ce_clean), `kl_recovered` = (kl_zero − kl_spliced) / kl_zero; the
    fields that end in `_mean` are against the mean of y over the data set. `delta_ce` = ce_spliced − ce_clean;
    `top1_spliced` is the share of tokens after which the most likely next token is the clean model's.

    There every input is the clean run's. The fields that end in `_replaced` are the replacement model's, whose layers read
    what the layers before them have made; None of all others than cross-layer transcoders and sets: of an autoencoder or
    a transcoder alone, where the two runs would be one (as they are of a set of one), and of a crosscoder; also of a
    cross-layer transcoder that makes one choice among the latents of all layers.

    A latent is dead that fired on none of the `n_tokens` tokens (that is the window), dense above a tenth of them,
    frequent above a hundredth. `density_counts[i]` is the number of latents whose density lies between
    `density_edges[i]` and `[i + 1]` (log10); dead ones are in none.

    `intervals` has, by field, the ends of a 95 % bootstrap interval over sequences.
    """

    l0: float
    fvu: float
    explained_variance: float
    fvu_without_outliers: float
    outlier_dimensions: tuple[int, ...]
    outlier_variance: float
    fvu_without_sinks: float
    n_sinks: int
    fvu_all_positions: float
    points: tuple[PointFit, ...]
    layers: tuple[LayerLatents, ...]
    cosine: float
    norm_ratio: float
    ce_clean: float | None
    ce_spliced: float | None
    ce_zero: float | None
    ce_mean: float | None
    delta_ce: float | None
    ce_recovered: float | None
    ce_recovered_mean: float | None
    kl_spliced: float | None
    kl_zero: float | None
    kl_mean: float | None
    kl_recovered: float | None
    kl_recovered_mean: float | None
    top1_spliced: float | None
    ce_replaced: float | None
    delta_ce_replaced: float | None
    kl_replaced: float | None
    top1_replaced: float | None
    n_dead: int
    dead_fraction: float
    n_dense: int
    n_frequent: int
    n_tokens: int
    n_function_tokens: int
    density_edges: tuple[float, ...] = field(repr=False)
    density_counts: tuple[int, ...] = field(repr=False)
    intervals: dict[str, tuple[float, float]] = field(repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know before using the figures."""
        found = []
        if self.fvu > 1:
            found.append(
                f"FVU {self.fvu:.3g} is worse than the mean of the activations: is this the hook point, the model and the "
                "scale of activations that the dictionary was trained on?"
            )
        if self.dead_fraction == 1:
            found.append(f"No latent fired on any of the {self.n_tokens:,} tokens.")
        return tuple(found)


def evaluate(
    model: HookedModel, sae: SparseDictionary, dataset: TokenDataset, config: EvaluateConfig | None = None
) -> Evaluation:
    """All figures of the dictionary on the first tokens of `dataset`, which should be text that it was not trained on.

    Raises ConfigError for a dictionary that does not fit the model, InputError for a dataset without text tokens.
    """
    return evaluate_all(model, [sae], dataset, config)[0]


@torch.no_grad()
def evaluate_all(
    model: HookedModel,
    dictionaries: Sequence[SparseDictionary],
    dataset: TokenDataset,
    config: EvaluateConfig | None = None,
) -> list[Evaluation]:
    """`evaluate` for several dictionaries of one model, which may sit at different points. Raises as `evaluate` does."""
    config = config or EvaluateConfig()
    for sae in dictionaries:
        check_fit(model, sae)
    n_sequences = min(dataset.n_sequences, -(-config.n_tokens // dataset.context))
    n_function = min(n_sequences, -(-config.function_tokens // dataset.context)) if config.function_tokens else 0
    unit, function_unit = units_of(n_sequences), units_of(n_function)
    parts = [Reconstruction(sae, int(unit.max()) + 1) for sae in dictionaries]
    splices = Splice.all_of(dictionaries, each_point=not config.whole_only)
    if n_function:
        _say_cost(splices, sum(as_replacement(model, sae) is not None for sae in dictionaries), len(dictionaries))
    with progress((n_sequences + n_function) * dataset.context, "evaluate", "tokens") as bar:
        for rows, tokens in _batches(dataset, n_sequences, config.batch_tokens, bar):
            read, is_text = Read.of(model, tokens, dictionaries), text_mask(tokens, dataset.special_ids)
            for part in parts:
                part.add(read, is_text, unit[rows])
        figures = [part.figures() for part in parts]
        means = {name: mean for part in parts for name, mean in part.means().items()}
        function = Function(model, dictionaries, splices, means, min(n_function, len(function_unit.unique())))
        for rows, tokens in _batches(dataset, n_function, config.batch_tokens, bar):
            is_text = text_mask(tokens, dataset.special_ids)
            function.add(tokens.to(model.device), is_text.to(model.device), function_unit[rows])
    return [_evaluation(found, function, i) for i, found in enumerate(figures)]


def _say_cost(splices: Sequence[Splice], n_replaced: int, n_dictionaries: int) -> None:
    """Say beforehand how much the points alone cost, where there are many. The splices of whole dictionaries come first."""
    alone = len(splices) - n_dictionaries
    if alone > _MANY_POINTS:
        runs = [runs_per_batch(some, n_replaced) for some in (splices, splices[:n_dictionaries])]
        say(
            f"evaluate: for CE and KL each batch runs through the model {runs[0]} times, since each of {alone} points is replaced "
            f"alone as well; whole_only (--whole-only) leaves these out: {runs[1]} times"
        )


def _evaluation(reconstruction: dict[str, Any], function: Function, i: int) -> Evaluation:
    """The figures of dictionary `i`."""
    of_points = {splice.points: splice for splice in function.splices if splice.of == i}
    whole = tuple(point.name for point in reconstruction["points"])
    loss, replaced = function.figures(of_points[whole]), function.replaced(i)
    points = tuple(
        _with_loss(point, function.figures(of_points[(point.name,)]))
        if len(whole) > 1 and function.n > 0 and (point.name,) in of_points
        else point
        for point in reconstruction["points"]
    )
    intervals = {**reconstruction["intervals"], **loss["intervals"], **replaced["intervals"]}
    return Evaluation(**{**reconstruction, **loss, **replaced, "points": points, "intervals": intervals})


def _with_loss(point: PointFit, loss: dict[str, Any]) -> PointFit:
    """What comes near at a point, and what the model loses there."""
    intervals = {**point.intervals, **loss["intervals"]}
    return replace(point, loss={name: loss[name] for name in FIGURES}, intervals=intervals)


def _batches(
    dataset: TokenDataset, n_sequences: int, batch_tokens: int, bar: Progress
) -> Iterator[tuple[slice, Int[Tensor, "batch pos"]]]:
    per_batch = max(1, batch_tokens // dataset.context)
    for start in range(0, n_sequences, per_batch):
        stop = min(start + per_batch, n_sequences)
        yield slice(start, stop), torch.from_numpy(dataset.batch(start, stop))
        bar.advance((stop - start) * dataset.context)
