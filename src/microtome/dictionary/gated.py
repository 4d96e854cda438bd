"""Gated dictionaries (Rajamanoharan et al. 2024, arXiv 2404.16014, §3.2, eq. 8).

    π = (x − b_dec) W_enc + b_gate       f = 1[π > 0] ⊙ ReLU(e^r ⊙ (π − b_gate) + b_mag)
    L = ‖x − x̂‖² + λ Σ ReLU(π) ‖W_dec,i‖ + ‖x − x̂_frozen(ReLU(π))‖²

The step function passes no gradient, so the gate learns from the last two terms; in both the decoder is a constant.
(In the paper its rows have unit norm. Where norms are free, the penalty would shrink the rows, and the frozen
reconstruction could not hold them: π then costs little, and gates stay open.) The dictionary's b_enc is b_gate.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.dictionary import activation as used
from microtome.dictionary.config import GatedConfig
from microtome.dictionary.fine_tuning import Start, need_thresholds
from microtome.dictionary.kept import Entries, Kept, fires
from microtome.dictionary.rules import NewLatents, ReLURule, Step


class GatedRule(ReLURule):
    """The magnitudes' scale `r_mag` and bias `b_mag`, `[S, F]`."""

    def __init__(self, configs: list[GatedConfig]) -> None:
        super().__init__(list(configs))
        self.start = configs[0].start_threshold
        shape = (len(configs), configs[0].d_sae)
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def values(self, pre: Entries, kept: Kept, step: Step) -> Entries:
        scale = self.r_mag.exp()
        magnitude = pre * kept.latent(scale) + kept.latent(self.b_mag - scale * step.b_enc)
        return magnitude.relu() * fires(pre)

    def penalty(self, pre: Entries, f: Entries, kept: Kept, step: Step) -> Float[Tensor, " S"]:
        return super().penalty(pre, f, kept, replace(step, norms=step.norms.detach()))

    def frozen_codes(self, pre: Entries, kept: Kept, step: Step) -> Entries:
        return pre.relu()

    def activation(self, member: int, norms: Float[Tensor, " F"]) -> used.Activation:
        return used.Gated(self.r_mag[member].detach().clone(), self.b_mag[member].detach().clone())

    @torch.no_grad()
    def begin(self, b_enc: Float[Tensor, "S F"], sizes: Float[Tensor, "S F"]) -> None:
        self.b_mag.copy_(b_enc)  # the start moves the gate alone
        b_enc.sub_(self.start * sizes)

    @torch.no_grad()
    def begin_again(self, member: int, new: NewLatents) -> Float[Tensor, " c"]:
        self.r_mag[member, new.which] = 0.0
        self.b_mag[member, new.which] = new.b_enc
        return new.b_enc - self.start * new.sizes

    @torch.no_grad()
    def begin_with(self, member: int, start: Start) -> None:
        """Thresholds become gates, and the codes stay. Raises ConfigError where there are none."""
        if isinstance(start.activation, used.Gated):
            self.r_mag[member], self.b_mag[member] = start.activation.r_mag, start.activation.b_mag
            return
        threshold = need_thresholds(start, self.config.architecture)
        self.r_mag[member] = 0.0
        self.b_mag[member] = start.b_enc
        start.b_enc.sub_(threshold)
