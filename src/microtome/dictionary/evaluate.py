"""`evaluate`: how well a dictionary stands for the activations, and what the model loses when it runs on the
reconstruction.

Two passes over held-out text, special tokens (BOS, separator) left out everywhere and left as they are in spliced runs:

1. *Reconstruction* (`Moments`, double precision, streamed): FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖² over the whole set; the same
   without the two dimensions of largest variance, since a few outlier dimensions can carry most of a model's variance;
   cosine, L0, firing counts.
2. *Function*: cross-entropy and KL of the next token with x̂ in the place of x, against the clean run and one with
   zeros there. CE recovered = (CE_zero − CE_spliced) / (CE_zero − CE_clean).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.activations.source import text_mask
from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.common.progress import Progress, progress
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.fit import check_fit
from microtome.model import HookedModel
from microtome.text import TokenDataset

_OUTLIER_DIMENSIONS = 2


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much text: `n_tokens` for reconstruction, `function_tokens` of them for CE and KL; `batch_tokens` per forward
    pass."""

    n_tokens: int = 131_072
    function_tokens: int = 16_384
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        require(self.n_tokens >= self.function_tokens >= 0, "n_tokens must hold function_tokens", got=self.n_tokens)
        require(self.batch_tokens > 0, "batch_tokens must be positive", got=self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures. Fractions are of 1; cross-entropies in nats per token; `n_tokens` counts text tokens.

    `fvu_all_positions` counts special tokens too and is there for comparison with tools that do: their outsized norm
    flatters it. `density_counts[i]` is the number of latents whose density lies between `density_edges[i]` and `[i +
    1]` (log10); dead ones are in none.
    """

    l0: float
    fvu: float
    fvu_without_outliers: float
    outlier_dimensions: tuple[int, ...]
    outlier_variance: float
    fvu_all_positions: float
    cosine: float
    norm_ratio: float
    ce_clean: float | None
    ce_spliced: float | None
    ce_zero: float | None
    ce_recovered: float | None
    kl_spliced: float | None
    kl_zero: float | None
    kl_recovered: float | None
    n_dead: int
    dead_fraction: float
    n_tokens: int
    n_function_tokens: int
    density_edges: tuple[float, ...] = field(repr=False)
    density_counts: tuple[int, ...] = field(repr=False)


class Moments:
    """Streaming sums in double precision, per dimension, of x, x² and (x − x̂)²."""

    def __init__(self, d: int) -> None:
        self.n = 0
        self.sum, self.square, self.error = (torch.zeros(d, dtype=torch.float64) for _ in range(3))

    def add(self, x: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"]) -> None:
        x64, difference = x.double(), (x - reconstruction).double()
        self.n += len(x)
        self.sum += x64.sum(0).cpu()
        self.square += x64.square().sum(0).cpu()
        self.error += difference.square().sum(0).cpu()

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Σ(x − x̄)² per dimension."""
        return self.square - self.sum.square() / max(self.n, 1)

    def fvu(self, kept: Bool[Tensor, " d"] | None = None) -> float:
        """The fraction of variance unexplained, over all dimensions or those `kept`."""
        error, variance = (self.error, self.variance) if kept is None else (self.error[kept], self.variance[kept])
        return float(error.sum() / variance.sum())


@torch.no_grad()
def evaluate(
    model: HookedModel, sae: Dictionary, dataset: TokenDataset, config: EvaluateConfig | None = None
) -> Evaluation:
    """All figures of the dictionary on the first tokens of `dataset`, which should be text that it was not trained on.

    Raises ConfigError for a dictionary that does not fit the model, InputError for a dataset without text tokens.
    """
    config = config or EvaluateConfig()
    check_fit(model, sae)
    n_sequences = min(dataset.n_sequences, -(-config.n_tokens // dataset.context))
    function_sequences = (
        min(n_sequences, -(-config.function_tokens // dataset.context)) if config.function_tokens else 0
    )
    total = (n_sequences + function_sequences) * dataset.context
    with progress(total, "evaluate", "tokens") as bar:
        reconstruction = _Reconstruction(sae)
        for tokens in _batches(dataset, n_sequences, config.batch_tokens, bar):
            x = model.activations(tokens, sae.hook_name)[sae.hook_name].flatten(2).float()
            reconstruction.add(x, text_mask(tokens, dataset.special_ids).to(x.device))
        function = _Function(model, sae)
        for tokens in _batches(dataset, function_sequences, config.batch_tokens, bar):
            function.add(tokens.to(model.device), text_mask(tokens, dataset.special_ids).to(model.device))
    return reconstruction.evaluation(function)


def _batches(
    dataset: TokenDataset, n_sequences: int, batch_tokens: int, bar: Progress
) -> Iterator[Int[Tensor, "batch pos"]]:
    per_batch = max(1, batch_tokens // dataset.context)
    for start in range(0, n_sequences, per_batch):
        stop = min(start + per_batch, n_sequences)
        yield torch.from_numpy(dataset.batch(start, stop))
        bar.advance((stop - start) * dataset.context)


class _Reconstruction:
    """Everything that needs only the activations."""

    def __init__(self, sae: Dictionary) -> None:
        self.sae = sae
        self.text, self.everywhere = Moments(sae.d_in), Moments(sae.d_in)
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.l0, self.cosine, self.norm_ratio = 0.0, 0.0, 0.0

    def add(self, x: Float[Tensor, "batch pos d"], is_text: Bool[Tensor, "batch pos"]) -> None:
        self.everywhere.add(x.flatten(0, 1), self.sae(x).flatten(0, 1))
        rows = x[is_text]
        codes = self.sae.encode(rows)
        decoded = self.sae.decode(codes)
        self.text.add(rows, decoded)
        self.fired += torch.bincount(codes.indices[codes.values > 0], minlength=self.sae.d_sae).cpu()
        self.l0 += float(codes.l0.double().sum())
        self.cosine += float(functional.cosine_similarity(rows, decoded).double().sum())
        self.norm_ratio += float((decoded.norm(dim=1) / rows.norm(dim=1)).double().sum())

    def evaluation(self, function: "_Function") -> Evaluation:
        n = self.text.n
        if n == 0:
            raise InputError("There are no text tokens to evaluate on", fix="Use more text")
        variance = self.text.variance
        outliers = variance.topk(min(_OUTLIER_DIMENSIONS, len(variance) - 1)).indices
        kept = torch.ones(len(variance), dtype=torch.bool)
        kept[outliers] = False
        counts, edges = density_histogram(self.fired, n)
        dead = int((self.fired == 0).sum())
        return Evaluation(
            l0=self.l0 / n,
            fvu=self.text.fvu(),
            fvu_without_outliers=self.text.fvu(kept),
            outlier_dimensions=tuple(sorted(outliers.tolist())),
            outlier_variance=float(variance[outliers].sum() / variance.sum()),
            fvu_all_positions=self.everywhere.fvu(),
            cosine=self.cosine / n,
            norm_ratio=self.norm_ratio / n,
            **function.figures(),
            n_dead=dead,
            dead_fraction=dead / self.sae.d_sae,
            n_tokens=n,
            n_function_tokens=function.n,
            density_edges=edges,
            density_counts=counts,
        )


class _Function:
    """Cross-entropy and KL with the dictionary spliced in, against the clean and the zeroed run."""

    def __init__(self, model: HookedModel, sae: Dictionary) -> None:
        self.model, self.sae, self.n = model, sae, 0
        self.ce = dict.fromkeys(("clean", "spliced", "zero"), 0.0)
        self.kl = dict.fromkeys(("spliced", "zero"), 0.0)

    def add(self, tokens: Int[Tensor, "batch pos"], is_text: Bool[Tensor, "batch pos"]) -> None:
        scored = is_text[:, 1:]
        clean = self.model(tokens)[:, :-1][scored].float().log_softmax(-1)
        target = tokens[:, 1:][scored][:, None]
        self.n += len(target)
        self.ce["clean"] -= float(clean.gather(1, target).double().sum())
        replacements: dict[str, Callable[[Tensor], Tensor]] = {"spliced": self.sae, "zero": torch.zeros_like}
        for name, replace in replacements.items():
            logits = self._run(tokens, is_text, replace)[:, :-1][scored]
            edited = logits.float().log_softmax(-1)
            self.ce[name] -= float(edited.gather(1, target).double().sum())
            self.kl[name] += float((clean.exp() * (clean - edited)).sum(-1).double().sum())

    def _run(self, tokens: Tensor, is_text: Bool[Tensor, "batch pos"], replace: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(activation: Tensor, _: object) -> Tensor:
            edited = activation.clone()
            rows = activation[is_text].flatten(1)
            edited[is_text] = replace(rows).view_as(activation[is_text])
            return edited

        return self.model.run_with_hooks(tokens, [(self.sae.hook_name, hook)])

    def figures(self) -> dict[str, float | None]:
        """Means per token, and the fractions recovered; all None when nothing was run."""
        if self.n == 0:
            return dict.fromkeys(
                ("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "kl_spliced", "kl_zero", "kl_recovered")
            )
        ce = {name: total / self.n for name, total in self.ce.items()}
        kl = {name: total / self.n for name, total in self.kl.items()}
        return {
            **{f"ce_{name}": value for name, value in ce.items()},
            "ce_recovered": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
            **{f"kl_{name}": value for name, value in kl.items()},
            "kl_recovered": (kl["zero"] - kl["spliced"]) / kl["zero"],
        }


def density_histogram(fired: Int[Tensor, " d_sae"], n_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Counts of latents by log10 of the fraction of tokens on which they fire (dead ones in no bin), and the edges of
    the bins."""
    density = (fired[fired > 0].double() / n_tokens).log10()
    edges = torch.linspace(-7.0, 0.0, 57, dtype=torch.float64)
    counts = torch.histogram(density.clamp(-7.0, 0.0), edges).hist.long()
    return tuple(counts.tolist()), tuple(edges.tolist())
