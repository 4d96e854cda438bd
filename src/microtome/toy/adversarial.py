"""Adversarial vulnerability of toy models: how much a small change of the input can raise the loss.

A feature that shares dimensions reads a little of many inputs, so small changes of all of them add up. The attacks are the
paper's: for each feature the direction to which its output is most sensitive; the one that does the most harm counts. (Steps
along the gradient find little where nearly all ReLUs are at zero.) Elhage et al. 2022, “Superposition and adversarial
examples”.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.config import require
from microtome.common.device import generator
from microtome.toy.features import Features
from microtome.toy.models import ToyModel


def attack_directions(model: ToyModel) -> Float[Tensor, "instance feature feature"]:
    """Unit input directions: row i raises the output i most for its length while its ReLU is open. It is row i of
    W_out W_in, (WᵀW)_i where the model is tied. Raises ConfigError for a hidden ReLU, where the direction depends on the input."""
    require(model.config.hidden == "linear", "The attack is known for a linear hidden layer", got=model.config.hidden)
    rows = (model.W_out @ model.W_in).detach()
    result: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return result


@dataclass(frozen=True, eq=False)
class Vulnerability:
    """Mean squared error summed over features, for each instance: of clean inputs, and of attacked ones."""

    clean: Float[Tensor, " instance"]
    attacked: Float[Tensor, " instance"]
    epsilon: Float[Tensor, " instance"]
    """The length of the attack."""

    @property
    def harm(self) -> Float[Tensor, " instance"]:
        """The rise of the error, in units of the attack's squared length: 1 for a model that returns its input."""
        return (self.attacked - self.clean) / self.epsilon.square()


@torch.no_grad()
def vulnerability(
    model: ToyModel, features: Features, *, share: float = 0.1, n_inputs: int = 500, seed: int = 0
) -> Vulnerability:
    """What the most harmful attack of length `share` · mean‖x‖ does to each of `n_inputs` inputs; the target is that of the
    clean input. Each direction is tried with both signs. Inputs in which nothing fires are not drawn again: they count."""
    require(share > 0 and n_inputs > 0, "share and n_inputs must be positive", got=(share, n_inputs))
    x = features.sample(n_inputs, generator(seed, "attacked inputs"))
    epsilon = share * x.norm(dim=-1).mean(dim=-1)
    clean = _error(model, x, x)
    worst = clean.clone()
    directions = attack_directions(model) * epsilon[:, None, None]
    for step in directions.unbind(dim=1):
        for sign in (1.0, -1.0):
            worst = torch.maximum(worst, _error(model, x + sign * step[:, None], x))
    return Vulnerability(clean.mean(dim=-1), worst.mean(dim=-1), epsilon)


def _error(model: ToyModel, given: Tensor, meant: Tensor) -> Float[Tensor, "instance batch"]:
    result: Tensor = (model(given) - model.target(meant)).square().sum(dim=-1)
    return result
