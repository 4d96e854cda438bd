"""JumpReLU: f = z·1[z > θ], trained through a straight-through estimator (Rajamanoharan et al. 2024, 2407.14435, §3).

    ∂f/∂z = 1[z > θ]      ∂f/∂θ = −(θ/ε) K((z − θ)/ε)      ∂1[z > θ]/∂θ = −(1/ε) K((z − θ)/ε)      K = 1[|u| < ½]

θ itself is the parameter, in fp32: Adam moves log θ too little, and bf16 does not move at all. With the sparsity
"tanh" the gradient reaches all parameters (Anthropic, January 2025), which is why it has no estimator of its own. The
only gradient of θ then has θ for a factor, so that one that came to zero would stay there: with "tanh" thresholds are at
least a hundredth of the bandwidth. Adam, which asks for the sign alone, takes them from there to where they belong.
Both operations keep z and θ alone for their gradients: z is there in any case, and z − θ is quickly made again.
Only entries above θ − ε/2 have a gradient, so only those are kept; the penalty on all others (`revive_coefficient`)
is a sum over whole columns, less the kept ones.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.dictionary import activation as used
from microtome.dictionary.config import JumpReLUConfig
from microtome.dictionary.fine_tuning import Start, need_thresholds
from microtome.dictionary.kept import Entries, Kept, fires, where_positive
from microtome.dictionary.rules import NewLatents, ReLURule, Step
from microtome.dictionary.selection import PreActivations

_LEAST = 0.01  # of the bandwidth


class JumpReLURule(ReLURule):
    """Thresholds `[S, F]` in units of z."""

    config: JumpReLUConfig

    def __init__(self, configs: list[JumpReLUConfig]) -> None:
        super().__init__(list(configs))
        self.starts: Tensor
        self.register_buffer("starts", torch.tensor([config.first_threshold for config in configs]), persistent=False)
        self.threshold = nn.Parameter(self.starts[:, None].repeat(1, configs[0].d_sae))
        self.least = _LEAST * self.config.bandwidth if self.config.sparsity == "tanh" else 0.0

    def keep(self, pre: PreActivations, step: Step) -> Kept:
        return self._kept(pre, (self.threshold - self.config.bandwidth / 2).detach())

    def pieces(self, kept: Kept) -> Iterator[tuple[slice, Kept]]:
        # With "quadratic" the penalty is of the mean L0 of all rows.
        return iter([(slice(None), kept)]) if self.config.sparsity == "quadratic" else super().pieces(kept)

    def values(self, pre: Entries, kept: Kept, step: Step) -> Entries:
        f: Tensor = JumpReLU.apply(pre, kept.latent(self.threshold), self.config.bandwidth)  # type: ignore[no-untyped-call]
        return f

    def penalty(self, pre: Entries, f: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        config, strength = self.config, self.strength(step)
        if config.sparsity == "tanh":
            sizes = config.tanh_scale * f * kept.latent(step.norms)
            tanh = strength * kept.member_sums(sizes.tanh(), step.weights)
            return tanh + self._revival(pre, kept, step) if config.revive_coefficient else tanh
        above: Tensor = Heaviside.apply(pre, kept.latent(self.threshold), config.bandwidth)  # type: ignore[no-untyped-call]
        counts = kept.member_sums(above, step.weights)
        if config.sparsity == "step":
            return strength * counts
        assert config.target_l0 is not None
        n = step.weights.sum(1)
        return strength * n * (counts / n / config.target_l0 - 1).square()

    def _revival(self, pre: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        """λ_P Σ ReLU(θ − pre) ‖W_dec,i‖ over all entries: the sum of θ − pre, less what it is at those above θ."""
        excess = (pre - kept.latent(self.threshold)).relu()
        all_entries = kept.shape[1] * self.threshold - step.column_sums()
        above = kept.member_sums(excess, latents=step.norms)
        return self.config.revive_coefficient * ((all_entries * step.norms).sum(1) + above)

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        return [(self.threshold, self.config.threshold_rate)]

    @torch.no_grad()
    def after_update(self) -> None:
        self.threshold.clamp_(min=self.least)

    def activation(self, member: int, norms: Float[Tensor, " F"]) -> used.Activation:
        return used.JumpReLU(self.threshold[member].detach().clone())

    @torch.no_grad()
    def begin(self, b_enc: Float[Tensor, "S F"], sizes: Float[Tensor, "S F"]) -> None:
        if self.config.start_threshold is None:
            self.threshold.copy_(self.starts[:, None] * sizes)

    @torch.no_grad()
    def begin_again(self, member: int, new: NewLatents) -> Float[Tensor, " c"]:
        size = new.sizes if self.config.start_threshold is None else new.share
        self.threshold[member, new.which] = self.starts[member] * size
        return new.b_enc

    @torch.no_grad()
    def begin_with(self, member: int, start: Start) -> None:
        """Thresholds of zero (those of what was ReLU) stay, and the codes with them; with "tanh" they begin at the least
        that it has. Raises ConfigError for an activation that no thresholds can stand for."""
        threshold = need_thresholds(start, self.config.architecture)
        self.threshold[member] = torch.where(threshold > 0, threshold, self.least)


class JumpReLU(torch.autograd.Function):
    """z·1[z > θ], with the estimator above."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        excess = z - threshold
        return where_positive(z, excess, out=excess)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        excess = z - threshold
        by_threshold = _where_near(grad, excess, ctx.bandwidth).sum_to_size(threshold.shape)
        return where_positive(grad, excess, out=excess), by_threshold * (-threshold / ctx.bandwidth), None


class Heaviside(torch.autograd.Function):
    """1[z > θ], whose only gradient is the estimator's, by θ."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return fires(z - threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        by_threshold = _where_near(grad, z - threshold, ctx.bandwidth).sum_to_size(threshold.shape)
        return None, by_threshold * (-1.0 / ctx.bandwidth), None


def _where_near(numbers: Entries, excess: Entries, bandwidth: float) -> Entries:
    """The numbers times K((z − θ)/ε), in one pass: it is the backward of a clamp."""
    chosen: Tensor = torch.ops.aten.hardtanh_backward(numbers, excess, -bandwidth / 2, bandwidth / 2)
    return chosen
