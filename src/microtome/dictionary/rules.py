"""What makes an architecture: which latents a step keeps, the values they get, and the penalty on them.

A `Rule` belongs to a stack of S members (`stack.py`) and holds the parameters and counters that its architecture adds.
A step calls `keep` (from pre-activations without gradient, in the dtype of the selection); then, for each of the `pieces` of
the batch, `values` (with gradient, from the pre-activations at the kept entries), `penalty` and `observe`; and after the update
`after_update`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from microtome.dictionary.activation import Activation, JumpReLU, ReLU, TopK
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    PenaltyConfig,
    TopKConfig,
)
from microtome.dictionary.fine_tuning import Start, take_thresholds
from microtome.dictionary.kept import DenseKept, Entries, Kept, SparseKept, where_positive
from microtome.dictionary.selection import PreActivations, batch_top_k, is_positive, top_k

C = TypeVar("C", bound=DictionaryConfig)
# From this share of latents on, dense products in bf16 are quicker. A step of ReLU (d_sae 4,608, 2,048 rows, one thread) takes,
# sparse and dense, 131 and 164 ms at a share of 0.04, 165 and 167 at 0.06, 227 and 164 at 0.08. For a GPU it is an estimate
# from bandwidth and peak (H100: 3 TB/s, 700 TFLOP/s), not a measurement.
_DENSE_FROM, _DENSE_FROM_ON_GPU = 1 / 17, 1 / 256
_TINY = 512
# With so many latents for each one kept, TopK's sparse products are as quick on a CPU however few latents there are. A step
# (one thread, selection in bf16, d 576, 1,024 or 2,048 rows) takes, sparse and dense, at d_sae 512 7.5 and 18.5 ms for 64 latents
# to each kept, 24.0 and 31.7 for 16, 33.4 and 31.5 for 8, 26.5 and 18.3 for 4; in fp32 sparse ones are quicker at 4, too.
_ROOMY = 8
_COUNTED_ROWS = 16  # one row of so many says how many latents fire
# A step on so many pre-activations takes so long that the GPU may be asked in between how many latents fire.
_COUNTED_ON_GPU = 1 << 27


@dataclass(frozen=True)
class Step:
    """Where a step is in the run (`fraction` of all steps), and what all rules see: how much each row counts, the stack's
    decoder norms (with gradient where norms are free), its encoder bias, and each latent's sum of pre-activations over
    the rows."""

    fraction: float
    weights: Float[Tensor, "S n"]
    norms: Float[Tensor, "S F"]
    b_enc: Float[Tensor, "S F"]
    column_sums: Callable[[], Float[Tensor, "S F"]]

    def of(self, rows: slice, column_sums: Callable[[], Float[Tensor, "S F"]]) -> "Step":
        """The same for some of the rows."""
        return replace(self, weights=self.weights[:, rows], column_sums=column_sums)


@dataclass(frozen=True)
class NewLatents:
    """Latents of a member with new encoder rows, of the norms `sizes`, `share` times as long as those of others. With the
    biases `b_enc` the middle of the inputs has pre-activations of zero."""

    which: Int[Tensor, " c"]
    sizes: Float[Tensor, " c"]
    share: float
    b_enc: Float[Tensor, " c"]


class Rule(nn.Module, ABC, Generic[C]):
    """One architecture, for the members whose configs are given (they differ in numbers of no shape alone)."""

    def __init__(self, configs: list[C]) -> None:
        super().__init__()
        self.configs, self.config = configs, configs[0]
        self.products: Literal["auto", "sparse", "dense"] = "auto"

    @abstractmethod
    def keep(self, pre: PreActivations, step: Step) -> Kept:
        """The latents to keep, given what they are selected from."""

    def pieces(self, kept: Kept) -> Iterator[tuple[slice, Kept]]:
        """Groups of rows whose losses can be had one after the other, which takes less memory."""
        return kept.pieces()

    def values(self, pre: Entries, kept: Kept, step: Step) -> Entries:
        """f at the kept entries, given the pre-activations there."""
        return pre.relu()

    def penalty(self, pre: Entries, f: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        """What is added to each member's summed squared error, given its codes (the frozen ones, where there are any)."""
        return f.new_zeros(kept.shape[0])

    def frozen_codes(self, pre: Entries, kept: Kept, step: Step) -> Entries | None:
        """Codes that must reconstruct the target through a constant decoder as well, if there are any."""
        return None

    def parts(self, f: Entries, kept: Kept) -> Iterator[tuple[Entries, Kept]]:
        """The codes piece by piece: after each, what has been decoded so far is compared to the target."""
        yield f, kept

    def observe(self, f: Entries, kept: Kept, step: Step) -> None:
        """Take note of the codes of a step (without gradient)."""

    def after_update(self) -> None:
        """Bring the rule's own parameters back to where they may be."""

    @abstractmethod
    def activation(self, member: int, norms: Float[Tensor, " F"]) -> Activation:
        """The activation with which a member is used after training, given the norms of its decoder rows."""

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters that learn at another rate than the rest, each with the factor to it."""
        return []

    def begin(self, b_enc: Float[Tensor, "S F"], sizes: Float[Tensor, "S F"]) -> None:
        """Put the rule's parameters, and if need be the encoder's biases, to where they begin, given the norms of the
        encoder's rows: what pre-activations are about the size of."""

    def begin_again(self, member: int, new: NewLatents) -> Float[Tensor, " c"]:
        """Put what the rule has for these latents back to its start, and say with which encoder biases they begin."""
        return new.b_enc

    def begin_with(self, member: int, start: Start) -> None:
        """Take over what a dictionary's activation holds, for a training that begins with it; its encoder and b_enc are
        brought, in place, to what the rule needs."""
        take_thresholds(start)

    def _kept(self, pre: PreActivations, edges: Float[Tensor, "S F"] | None = None) -> Kept:
        """The entries above their latents' edges (zero, if there are none), or all, if with so many dense products are
        quicker."""
        if self.products == "auto" and pre.device.type == "cuda" and math.prod(pre.shape) < _COUNTED_ON_GPU:
            return DenseKept(pre)
        some = _above(pre.of_rows(slice(None, None, _COUNTED_ROWS)).whole, edges)
        # A CPU counts trues many times quicker than it adds them.
        if self._sparsely(int(some.count_nonzero()) * math.prod(pre.shape) // some.numel(), pre):
            return SparseKept.of_mask(torch.cat([_above(block, edges) for block in pre.blocks()], 1))
        return DenseKept(pre)

    def _sparsely(self, n_kept: int, pre: PreActivations) -> bool:
        """Whether sparse products are quicker for so many entries."""
        if self.products != "auto":
            return self.products == "sparse"
        dense_from = _DENSE_FROM_ON_GPU if pre.device.type == "cuda" else _DENSE_FROM
        return pre.shape[2] > _TINY and n_kept < dense_from * math.prod(pre.shape)


class TopKRule(Rule[TopKConfig]):
    """The k largest of each row."""

    def keep(self, pre: PreActivations, step: Step) -> Kept:
        d_sae, k = pre.shape[2], self.config.k_at(step.fraction)
        roomy = d_sae > _TINY or (pre.device.type == "cpu" and d_sae >= _ROOMY * k)
        sparsely = self.products == "sparse" or (self.products == "auto" and roomy)
        blocks = pre.blocks() if sparsely else [pre.whole]
        scores = (self._scores(block, step) for block in blocks)
        indices = torch.cat([top_k(each.flatten(0, 1), k).view(*each.shape[:2], k) for each in scores], 1)
        if sparsely:
            return SparseKept.of_indices(indices, d_sae)
        mask = torch.zeros(pre.shape, dtype=torch.bool, device=indices.device).scatter_(2, indices, True)
        return DenseKept(pre, mask)

    def _scores(self, pre: Float[Tensor, "S n F"], step: Step) -> Float[Tensor, "S n F"]:
        """By what latents are selected: how much each would write."""
        return pre if self.config.unit_norms else pre * step.norms[:, None].detach().to(pre.dtype)

    def activation(self, member: int, norms: Float[Tensor, " F"]) -> Activation:
        return TopK(self.config.k)


class BatchTopKRule(TopKRule):
    """The k · n largest of a batch; `threshold` [S] follows the smallest value kept, in units of f · ‖W_dec,i‖."""

    def __init__(self, configs: list[TopKConfig]) -> None:
        super().__init__(configs)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.full((len(configs),), -1.0))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def keep(self, pre: PreActivations, step: Step) -> Kept:
        whole = pre.whole
        _, n, d_sae = whole.shape
        k = self.config.k_at(step.fraction) * n
        places = torch.cat([batch_top_k(each, k) + s * n * d_sae for s, each in enumerate(self._scores(whole, step))])
        if self._sparsely(len(places), pre):
            return SparseKept.of_places(places, pre.shape)
        mask = torch.zeros(whole.numel(), dtype=torch.bool, device=whole.device).index_fill_(0, places, True)
        return DenseKept(pre, mask.view_as(whole))

    def pieces(self, kept: Kept) -> Iterator[tuple[slice, Kept]]:
        yield slice(None), kept  # what is kept of a row depends on the other rows

    def values(self, pre: Entries, kept: Kept, step: Step) -> Entries:
        """Of the entries that the selection's dtype could not tell apart, the largest by their exact values."""
        f = super().values(pre, kept, step)
        sizes = (f * kept.latent(step.norms)).detach()
        return f * (sizes >= kept.edges(sizes, self.config.k_at(step.fraction) * kept.shape[1]))

    @torch.no_grad()
    def observe(self, f: Entries, kept: Kept, step: Step) -> None:
        assert isinstance(self.config, BatchTopKConfig)
        smallest = kept.member_minima(f * kept.latent(step.norms))
        # A young mean forgets sooner: else the first steps, when values are others, would stay in it for long.
        decay = ((1 + self.seen) / (10 + self.seen)).clamp_max(self.config.threshold_decay)
        self.seen += 1
        moved = torch.where(self.threshold < 0, smallest, decay * self.threshold + (1 - decay) * smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    def activation(self, member: int, norms: Float[Tensor, " F"]) -> Activation:
        return JumpReLU(self.threshold[member].clamp_min(0) / norms.clamp_min(1e-12))

    @torch.no_grad()
    def begin_with(self, member: int, start: Start) -> None:
        threshold = take_thresholds(start)
        if threshold is not None and bool((threshold > 0).any()):
            self.threshold[member] = (threshold * start.norms).mean()


class MatryoshkaRule(BatchTopKRule):
    """BatchTopK, decoded prefix by prefix."""

    def parts(self, f: Entries, kept: Kept) -> Iterator[tuple[Entries, Kept]]:
        assert isinstance(self.config, MatryoshkaConfig)
        first = 0
        for stop in self.config.boundaries:
            inside, part = kept.within(first, stop)
            yield f[part], inside
            first = stop


class ReLURule(Rule[PenaltyConfig]):
    """All positive latents, and λ Σ f ‖W_dec,i‖."""

    def __init__(self, configs: list[PenaltyConfig]) -> None:
        super().__init__(configs)
        self.coefficient: Tensor
        self.register_buffer("coefficient", torch.tensor([config.coefficient for config in configs]))

    def keep(self, pre: PreActivations, step: Step) -> Kept:
        return self._kept(pre)

    def penalty(self, pre: Entries, f: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        return self.strength(step) * kept.member_sums(f, step.weights, step.norms)

    def strength(self, step: Step) -> Float[Tensor, " S"]:
        """λ of each member at this step."""
        warmup = self.config.coefficient_warmup
        return self.coefficient * (min(1.0, step.fraction / warmup) if warmup else 1.0)

    def activation(self, member: int, norms: Float[Tensor, " F"]) -> Activation:
        return ReLU()


class PAnnealRule(ReLURule):
    """ReLU with λ Σ (f ‖W_dec,i‖)^p; `p` falls in steps, at each of which `coefficient` keeps the penalty as it was."""

    def __init__(self, configs: list[PenaltyConfig]) -> None:
        super().__init__(configs)
        self.p: Tensor
        self.register_buffer("p", torch.ones(()))
        self._p = 1.0  # `p` of this step, read once: a GPU is waited for
        self._fall: tuple[float, Tensor, Tensor] | None = None  # to which p, and the penalties before and after it

    def keep(self, pre: PreActivations, step: Step) -> Kept:
        self._p = float(self.p)
        return super().keep(pre, step)

    def penalty(self, pre: Entries, f: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        powers: Tensor = _Power.apply(f * kept.latent(step.norms), self._p)  # type: ignore[no-untyped-call]
        return self.strength(step) * kept.member_sums(powers, step.weights)

    @torch.no_grad()
    def observe(self, f: Entries, kept: Kept, step: Step) -> None:
        p = self._p_at(step.fraction)
        if math.isclose(p, self._p, rel_tol=1e-6):  # `p` itself is in fp32
            return
        sizes = f * kept.latent(step.norms)
        before, after = (kept.member_sums(_powers(sizes, each), step.weights) for each in (self._p, p))
        seen = (0.0, 0.0) if self._fall is None else self._fall[1:]
        self._fall = (p, before + seen[0], after + seen[1])

    @torch.no_grad()
    def after_update(self) -> None:
        if self._fall is not None:
            p, before, after = self._fall
            self.coefficient.mul_(torch.where(after > 0, before / after.clamp_min(1e-12), torch.ones_like(after)))
            self.p.fill_(p)
            self._fall = None

    def _p_at(self, fraction: float) -> float:
        config = self.config
        assert isinstance(config, PAnnealConfig)
        done = max(0.0, (fraction - config.p_start_at) / (1 - config.p_start_at))
        return 1 - (1 - config.p_end) * int(done * config.p_steps) / config.p_steps


def _above(pre: Float[Tensor, "S n F"], edges: Float[Tensor, "S F"] | None) -> Bool[Tensor, "S n F"]:
    return is_positive(pre if edges is None else pre - edges[:, None].to(pre.dtype))


class _Power(torch.autograd.Function):
    """Sizes to the power p; zeros stay zeros, and have no gradient."""

    @staticmethod
    def forward(ctx: Any, sizes: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(sizes)
        ctx.p = p
        return _powers(sizes, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (sizes,) = ctx.saved_tensors
        return _powers(sizes, ctx.p - 1).mul_(grad).mul_(ctx.p), None


def _powers(sizes: Entries, p: float) -> Entries:
    """Sizes to the power p where they are positive, else 0."""
    powers = sizes.clamp_min(1e-12).pow_(p)
    return where_positive(powers, sizes, out=powers)
