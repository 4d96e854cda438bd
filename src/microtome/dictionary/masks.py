"""Masks that are learned: which latents, exchanged between two entities, carry an attribute and nothing else.

Differential binary masking (DBM; Huang et al. 2024, RAVEL, 2402.17700, §3 and appendix): a number m_i for each latent; while
it is learned latent i is exchanged by the share σ(m_i / T), and T falls, so that shares become 0 or 1; the mask is m > 0. The
loss is the cross-entropy of the wanted answer. It has several tasks (MDBM, as in SAEBench, 2503.09532): asked for the
attribute, the other entity's value is wanted; asked for another attribute, the entity's own. `sparsity` is a price for each
latent; with it a latent that changes nothing is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.common.config import require

Loss = Callable[[Float[Tensor, " d_sae"], torch.Generator], Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How a mask is learned: `steps` of Adam on `batch` exchanges for each task, T falling from `temperature`'s first to its
    second number by a constant factor. `alone` leaves the tasks of the other attributes out (DBM)."""

    steps: int = 40
    batch: int = 8
    lr: float = 0.1
    temperature: tuple[float, float] = (1.0, 0.01)
    sparsity: float = 1e-3
    alone: bool = False

    def __post_init__(self) -> None:
        require(self.steps >= 1, "A mask is learned in one step or more", got=self.steps)
        require(self.batch >= 1, "A step needs one exchange or more", got=self.batch)
        require(self.lr > 0, "The learning rate of a mask must be positive", got=self.lr)
        first, last = self.temperature
        require(first >= last > 0, "The temperature of a mask falls and stays positive", got=self.temperature)
        require(self.sparsity >= 0, "The price of a latent cannot be negative", got=self.sparsity)


def learn_mask(
    loss: Loss, d_sae: int, config: MaskConfig, *, seed: int = 0, after_step: Callable[[], None] = lambda: None
) -> Bool[Tensor, " d_sae"]:
    """The mask for which `loss` (of shares in 0 to 1, and of a source of random numbers for its batch) is small."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.zeros(d_sae, requires_grad=True)
    optimiser = torch.optim.Adam([m], lr=config.lr)
    first, last = config.temperature
    for step in range(config.steps):
        temperature = first * (last / first) ** (step / max(config.steps - 1, 1))
        with torch.enable_grad():
            share = torch.sigmoid(m / temperature)
            total = loss(share, generator) + config.sparsity * share.sum()
            optimiser.zero_grad()
            total.backward()
        optimiser.step()
        after_step()
    return m.detach() > 0
