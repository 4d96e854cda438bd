"""Composition: how much of what one head writes is in what a later head reads (Elhage et al. 2021, "Composition").

    V   ‖W_OV¹ W_OV²‖ / ‖W_OV¹‖ ‖W_OV²‖      what head 2 moves
    K   ‖W_OV¹ W_QK²ᵀ‖ / ‖W_OV¹‖ ‖W_QK²‖     what is found by head 2's keys
    Q   ‖W_OV¹ W_QK²‖ / ‖W_OV¹‖ ‖W_QK²‖      what head 2's queries look for

with Frobenius norms and W_OV = W_V W_O, W_QK = W_Q W_Kᵀ (rows are inputs). None of these d_model × d_model matrices is formed: with
W_V = Q R, ‖W_V W_O M‖ = ‖R W_O M‖, and likewise on the other side, so each pair costs a product of d_head × d_model × d_head.

Two random matrices of these shapes have a score near 1/√d_model, not 0: compare with `baseline`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.circuits.effects import Axis, Effects
from microtome.circuits.reading_weights import CircuitWeights
from microtome.common.device import generator
from microtome.common.errors import InputError
from microtome.model.hooked import HookedModel

Part = Literal["Q", "K", "V"]
PARTS: tuple[Part, ...] = ("Q", "K", "V")


@dataclass(frozen=True)
class Baseline:
    """Mean and standard deviation of the score of random matrices."""

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A pair of heads, its score, and how many standard deviations of the baseline that lies above the baseline's mean."""

    part: Part
    writer: str
    reader: str
    score: float
    deviations: float


@dataclass(frozen=True, eq=False)
class Composition:
    """`scores[part][l1, h1, l2, h2]`: head h1 of layer l1 with a head of a later layer; 0 where l2 is not later."""

    Q: Float[Tensor, "writer_layer writer reader_layer reader"]
    K: Float[Tensor, "writer_layer writer reader_layer reader"]
    V: Float[Tensor, "writer_layer writer reader_layer reader"]
    baseline: Baseline

    def __getitem__(self, part: str) -> Float[Tensor, "writer_layer writer reader_layer reader"]:
        if part not in PARTS:
            raise InputError("There is no such composition", got=part, expected="'Q', 'K' or 'V'")
        scores: Tensor = getattr(self, part)
        return scores

    def top(self, part: Part, k: int = 10) -> list[Composed]:
        """The k pairs of the highest score."""
        scores = self[part]
        order = scores.flatten().argsort(descending=True, stable=True)[:k]
        found = []
        for i in order.tolist():
            l1, h1, l2, h2 = (int(x) for x in torch.unravel_index(torch.tensor(i), scores.shape))
            score = float(scores[l1, h1, l2, h2])
            above = (score - self.baseline.mean) / self.baseline.std
            found.append(
                Composed(part=part, writer=f"L{l1}.H{h1}", reader=f"L{l2}.H{h2}", score=score, deviations=above)
            )
        return found

    def effects(self, part: Part) -> Effects:
        """The grid writer × reader over all heads of the model, to draw."""
        scores = self[part]
        n_layers, n_heads = scores.shape[:2]
        labels = tuple(f"L{layer}.H{head}" for layer in range(n_layers) for head in range(n_heads))
        note = f"random matrices: {self.baseline.mean:.4f} ± {self.baseline.std:.4f}"
        grid = scores.reshape(len(labels), len(labels), 1)
        return Effects(
            values=grid,
            axes=(Axis("writer", labels), Axis("reader", labels)),
            what=f"{part}-composition",
            notes=(note,),
        )


@torch.no_grad()
def composition_scores(model: HookedModel, *, samples: int = 200, seed: int = 0) -> Composition:
    """The scores of all pairs of heads, and the baseline of `samples` random pairs.

    Norms before readers and behind writers are folded in (`reading_weights.py`); rotation of queries and keys is left out. A
    key/value head that several query heads share counts with each of them.
    """
    weights, config = CircuitWeights.of(model), model.config
    n, heads = config.n_layers, config.n_heads
    scores = {part: torch.zeros(n, heads, n, heads) for part in PARTS}
    written: list[Tensor] = []
    for layer in range(n):
        for part, (reads, other) in _readers(weights, layer).items():
            narrow = _narrow(reads, other)
            for before, by in enumerate(written):
                scores[part][before, :, layer] = _scores(by, narrow).cpu()
        V, W_O = weights.W_V(layer), weights.W_O(layer)
        written.append(_small(V) @ W_O)
    return Composition(**scores, baseline=random_composition(config.d_model, config.d_head, samples=samples, seed=seed))


def random_composition(d_model: int, d_head: int, *, samples: int = 200, seed: int = 0) -> Baseline:
    """The composition score of `samples` pairs of random heads: Gaussian factors `[d_model, d_head]` and `[d_head, d_model]`.

    Its mean is close to 1/√d_model. Raises InputError for less than two samples.
    """
    if samples < 2:
        raise InputError("A baseline needs at least two samples", got=samples)
    rng = generator(seed, "composition baseline")
    found = []
    for _ in range(samples):
        V, O, Q, K = (torch.randn(d_model, d_head, generator=rng) for _ in range(4))  # noqa: E741 - W_Oᵀ
        found.append(float(_scores((_small(V) @ O.T)[None], _narrow(Q[None], K[None]))))
    values = torch.tensor(found, dtype=torch.float64)
    return Baseline(float(values.mean()), float(values.std()))


def _readers(weights: CircuitWeights, layer: int) -> dict[Part, tuple[Tensor, Tensor]]:
    """For each part the factor `[heads, d_model, d_head]` that reads the stream, and the other, transposed."""
    Q, K = weights.W_Q(layer), weights.W_K(layer)
    return {"Q": (Q, K), "K": (K, Q), "V": (weights.W_V(layer), weights.W_O(layer).mT)}


def _narrow(
    reads: Float[Tensor, "readers d_model d_head"], other: Float[Tensor, "readers d_model d_head"]
) -> Float[Tensor, "readers d_model rank"]:
    """A Rᵀ, as large as A Bᵀ for every product from the left."""
    return reads @ _small(other).mT


def _scores(
    written: Float[Tensor, "writers rank d_model"], narrow: Float[Tensor, "readers d_model other"]
) -> Float[Tensor, "writers readers"]:
    """‖W (A Bᵀ)‖ / ‖W‖ ‖A Bᵀ‖ for each writer W = R W_O, and each reader A Bᵀ as `_narrow` has it."""
    product = written.flatten(0, 1) @ narrow.movedim(1, 0).flatten(1)
    squares = product.square().view(len(written), -1, len(narrow), narrow.shape[-1]).sum((1, 3))
    sizes = written.square().sum((-1, -2)).sqrt()[..., None] * narrow.square().sum((-1, -2)).sqrt()
    return squares.sqrt() / sizes.clamp_min(1e-30)


def _small(W: Float[Tensor, "*heads d_model d_head"]) -> Float[Tensor, "*heads rank d_head"]:
    """R of W = Q R: as large as W for every product from the right."""
    R: Tensor = torch.linalg.qr(W, mode="r").R
    return R
