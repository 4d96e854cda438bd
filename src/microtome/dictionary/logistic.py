"""Logistic regression with L2, for probes: several yes-or-no tasks on the same rows at once, by L-BFGS in double precision.

Minimises Σ over rows of the cross-entropy + ½ l2 ‖w‖², on features with mean 0 and standard deviation 1 (over the rows
of the fit), and gives weights for the features as they came. The bias is free.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from microtome.common.errors import InputError


@dataclass(frozen=True)
class Probes:
    """One linear probe for each task: says yes where x · weight + bias > 0."""

    weight: Float[Tensor, "d task"]
    bias: Float[Tensor, " task"]

    def says(self, x: Float[Tensor, "n d"]) -> Bool[Tensor, "n task"]:
        """What each probe says of each row."""
        return x.double() @ self.weight + self.bias > 0

    def right(self, x: Float[Tensor, "n d"], labels: Bool[Tensor, "n task"]) -> Float[Tensor, "n task"]:
        """1 where a probe is right, else 0."""
        return (self.says(x) == labels).double()


def fit_probes(
    x: Float[Tensor, "n d"],
    labels: Bool[Tensor, "n task"],
    *,
    l2: float = 1.0,
    balanced: bool = False,
    steps: int = 200,
) -> Probes:
    """Fit them all; `balanced` gives both classes of a task the same weight in sum. Raises InputError for a task of one
    class."""
    yes = labels.sum(0)
    if ((yes == 0) | (yes == len(labels))).any():
        raise InputError(
            "A probe needs examples of both classes", got=f"{yes.tolist()} of {len(labels)}", fix="Use more texts"
        )
    x64 = x.detach().double()
    mean, std = x64.mean(0), x64.std(0, correction=0)
    scale = torch.where(std > 1e-12 * mean.abs().clamp_min(1), 1 / std, 0.0)
    features, target = (x64 - mean) * scale, labels.double()
    weight = torch.zeros(x.shape[1], labels.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)
    share = yes.double() / len(labels)
    weights = torch.where(labels, 0.5 / share, 0.5 / (1 - share)) if balanced else None
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = features @ weight + bias
        entropy = functional.binary_cross_entropy_with_logits(logits, target, weights, reduction="sum")
        total: Tensor = entropy + 0.5 * l2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    raw = weight.detach() * scale[:, None]
    return Probes(raw, bias.detach() - mean @ raw)
