"""What is measured of any dictionary, and of the neurons themselves, which are a dictionary too: the identity with a ReLU.

`collect` runs it over text once and keeps every firing; densities, contexts and specificity are read from those.
`losses` runs the model with the activations replaced.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.activations.source import text_mask
from microtome.common.errors import InputError
from microtome.dictionary import Dictionary, Origin
from microtome.dictionary.activation import ReLU
from microtome.model import HookedModel
from microtome.text import TokenDataset

_BATCH = 32  # sequences a forward pass


@torch.no_grad()
def neurons_as_dictionary(model: HookedModel, hook_name: str, *, signed: bool = False) -> Dictionary:
    """The neurons at a hook point as a dictionary whose latent i is neuron i: f = ReLU(x), ŷ = f.

    `signed`, for activations that can be negative, gives each neuron two latents: i for what is above zero, d + i for what is
    below. Either way the reconstruction is the activation itself (without `signed`, where nothing is negative).
    """
    probe = model.activations(torch.zeros(1, 2, dtype=torch.long), hook_name)
    d = probe[hook_name][0, 0].numel()
    ways = (1.0, -1.0) if signed else (1.0,)
    made = Dictionary(d, d * len(ways), ReLU(), origin=Origin.at(model.name, hook_name), center=False)
    identity = torch.cat([way * torch.eye(d) for way in ways])
    made.encoder.copy_(identity)
    made.W_dec.copy_(identity)
    return made.to(model.device)


@torch.no_grad()
def goes_below_zero(model: HookedModel, hook_name: str, dataset: TokenDataset) -> bool:
    """Whether the activations are ever negative, on a batch of the text: those of a ReLU are not, those of a gated MLP are."""
    tokens, _ = next(batches(dataset, _BATCH * dataset.context))
    return bool((model.activations(tokens, hook_name)[hook_name] < 0).any())


# ---- firings --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Firings:
    """Every firing on some text, latent by latent, strongest first.

    `places` are positions in `tokens` flattened; those of latent i are `places[starts[i]:starts[i + 1]]`, with `values` beside.
    """

    tokens: Int[np.ndarray, "sequence context"]
    n_tokens: int
    """Text tokens, special ones left out."""
    starts: Int[np.ndarray, " bound"]
    places: Int[np.ndarray, " firing"]
    values: Float[np.ndarray, " firing"]

    @property
    def d_sae(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> Int[np.ndarray, " d_sae"]:
        """How often each latent fired."""
        return np.diff(self.starts)

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """The share of tokens on which each latent fires."""
        return self.counts / self.n_tokens

    @property
    def l0(self) -> float:
        """Latents that fire on a token, on average."""
        return len(self.places) / self.n_tokens

    def of(self, latent: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Where a latent fires, and how strongly; strongest first."""
        here = slice(self.starts[latent], self.starts[latent + 1])
        return self.places[here], self.values[here]

    def strongest(self, n: int) -> "Firings":
        """With at most the `n` strongest firings of each latent, as if each had a threshold."""
        kept = np.concatenate([np.arange(start, min(start + n, stop)) for start, stop in pairwise(self.starts)])
        starts = np.concatenate([[0], np.cumsum(np.minimum(self.counts, n))])
        return replace(self, starts=starts, places=self.places[kept], values=self.values[kept])


@torch.no_grad()
def collect(model: HookedModel, dictionary: Dictionary, dataset: TokenDataset, n_tokens: int) -> Firings:
    """All firings on the first `n_tokens` tokens (whole sequences). Raises InputError where there is no text."""
    latents, places, values, counted, at = [], [], [], 0, 0
    for tokens, is_text in batches(dataset, n_tokens):
        x = model.activations(tokens, dictionary.hook_name)[dictionary.hook_name].flatten(2)
        where = is_text.flatten().nonzero().squeeze(1)
        codes = dictionary.encode(x.flatten(0, 1)[where.to(x.device)])
        firing = codes.values > 0
        latents.append(codes.indices[firing].int().cpu().numpy())
        values.append(codes.values[firing].float().cpu().numpy())
        rows = where.to(firing.device)[:, None].expand_as(firing)[firing]
        places.append(rows.cpu().numpy() + at)
        counted, at = counted + len(where), at + tokens.numel()
    if counted == 0:
        raise InputError("There are no text tokens to measure on", fix="Use more text")
    found, strength = np.concatenate(latents), np.concatenate(values)
    order = np.lexsort((-strength, found))
    starts = np.concatenate([[0], np.cumsum(np.bincount(found, minlength=dictionary.d_sae))])
    n_sequences = at // dataset.context
    shown = dataset.batch(0, n_sequences)
    return Firings(shown, counted, starts, np.concatenate(places)[order], strength[order])


def batches(dataset: TokenDataset, n_tokens: int) -> Iterator[tuple[Tensor, Bool[Tensor, "sequence context"]]]:
    """The first sequences, up to `n_tokens` tokens (one sequence at least), with where they are text."""
    n = min(dataset.n_sequences, max(1, n_tokens // dataset.context))
    for start in range(0, n, _BATCH):
        tokens = torch.from_numpy(dataset.batch(start, min(start + _BATCH, n)))
        yield tokens, text_mask(tokens, dataset.special_ids)


# ---- losses ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Next-token cross-entropies in nats: of the model as it is, with the activations reconstructed, set to zero, and set to their
    mean. Special tokens keep their activations."""

    clean: float
    spliced: float
    zero: float
    mean: float
    n_tokens: int

    @property
    def recovered_zero(self) -> float:
        """(zero − spliced) / (zero − clean)."""
        return (self.zero - self.spliced) / (self.zero - self.clean)

    @property
    def recovered_mean(self) -> float:
        """(mean − spliced) / (mean − clean)."""
        return (self.mean - self.spliced) / (self.mean - self.clean)


@torch.no_grad()
def losses(model: HookedModel, dictionary: Dictionary, dataset: TokenDataset, n_tokens: int) -> Losses:
    """The four losses on the first `n_tokens` tokens; the mean activation is of the same text."""
    hook_name, total, n_rows = dictionary.hook_name, torch.zeros(dictionary.d_in, dtype=torch.float64), 0
    for tokens, is_text in batches(dataset, n_tokens):
        rows = model.activations(tokens, hook_name)[hook_name].flatten(2)[is_text.to(model.device)]
        total += rows.double().sum(0).cpu()
        n_rows += len(rows)
    mean = (total / max(n_rows, 1)).to(model.device, torch.float32)
    instead: dict[str, Callable[[Tensor], Tensor]] = {
        "spliced": dictionary,
        "zero": torch.zeros_like,
        "mean": lambda rows: mean.to(rows.dtype).expand_as(rows),
    }
    sums, n = dict.fromkeys(("clean", *instead), 0.0), 0
    for tokens, is_text in batches(dataset, n_tokens):
        scored = is_text[:, 1:]
        n += int(scored.sum())
        sums["clean"] += _summed(model(tokens), tokens, scored)
        for name, other in instead.items():
            logits = model.run_with_hooks(tokens, [(hook_name, _replaced(is_text, other))])
            sums[name] += _summed(logits, tokens, scored)
    if n == 0:
        raise InputError("There are no text tokens to measure on", fix="Use more text")
    return Losses(**{name: value / n for name, value in sums.items()}, n_tokens=n)


def _replaced(is_text: Bool[Tensor, "b p"], other: Callable[[Tensor], Tensor]) -> Callable[[Tensor, object], Tensor]:
    def hook(activation: Tensor, _: object) -> Tensor:
        here, edited = is_text.to(activation.device), activation.clone()
        rows = activation[here]
        edited[here] = other(rows.flatten(1)).view_as(rows)
        return edited

    return hook


def _summed(logits: Float[Tensor, "b p v"], tokens: Int[Tensor, "b p"], scored: Bool[Tensor, "b later"]) -> float:
    where = scored.to(logits.device)
    chances = logits[:, :-1][where].float().log_softmax(-1)
    return -float(chances.gather(1, tokens[:, 1:].to(logits.device)[where][:, None]).double().sum())


# ---- densities ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Two Gaussians in log₁₀ density, the sparser first, and whether two are better than one.

    `separation` is Ashman's D = √2 |μ₁ − μ₂| / √(σ₁² + σ₂²), above 2 for clusters that stand apart (Ashman, Bird and Zepf 1994,
    §2.2). `gain` is by how much the Bayesian information criterion of two Gaussians is lower than that of one.
    """

    means: tuple[float, float]
    spreads: tuple[float, float]
    shares: tuple[float, float]
    gain: float

    @property
    def separation(self) -> float:
        return math.sqrt(2) * abs(self.means[1] - self.means[0]) / math.hypot(*self.spreads)

    @property
    def two(self) -> bool:
        """Whether the data has two clusters: both tests say so."""
        return self.gain > 10 and self.separation > 2


def density_clusters(density: Float[np.ndarray, " d_sae"], *, steps: int = 300) -> Clusters | None:
    """The clusters of the latents that fire at all, by expectation maximisation from the two halves; None for fewer than 8.

    No Gaussian is narrower than 0.05, so that latents with one firing each do not become a cluster of no width.
    """
    x = np.log10(density[density > 0])
    if len(x) < 8:
        return None
    low = x <= np.median(x)
    resp = np.stack([low, ~low], 1).astype(float)
    for _ in range(steps):
        weight = resp.sum(0) + 1e-12
        mean = (resp * x[:, None]).sum(0) / weight
        spread = np.sqrt((resp * (x[:, None] - mean) ** 2).sum(0) / weight).clip(0.05)
        parts = np.log(weight / len(x)) + _log_normal(x[:, None], mean, spread)
        total = np.logaddexp(parts[:, 0], parts[:, 1])
        resp = np.exp(parts - total[:, None])
    one = _log_normal(x, x.mean(), max(x.std(), 0.05)).sum()
    gain = 2 * (float(total.sum()) - float(one)) - 3 * math.log(len(x))  # three parameters more
    first, second = np.argsort(mean)
    return Clusters(
        means=(float(mean[first]), float(mean[second])),
        spreads=(float(spread[first]), float(spread[second])),
        shares=(float(weight[first] / len(x)), float(weight[second] / len(x))),
        gain=gain,
    )


def _log_normal(x: np.ndarray, mean: np.ndarray | float, spread: np.ndarray | float) -> np.ndarray:
    return -0.5 * ((x - mean) / spread) ** 2 - np.log(spread) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Kind:
    """Features or neurons: a dictionary with its firings and its losses."""

    name: str
    dictionary: Dictionary
    firings: Firings
    losses: Losses

    @property
    def dead(self) -> int:
        """Latents that fire nowhere in the text that was looked at."""
        return int((self.firings.counts == 0).sum())
