"""The start of a fine-tuning: how a dictionary of one architecture becomes the beginning of another.

An activation that compares each latent with a number of its own (ReLU, JumpReLU, Gated) is some JumpReLU, exactly
(`Activation.as_thresholds`). From that, each architecture takes what it can hold:

| from             | to JumpReLU, Gated        | to ReLU, p-anneal              | to TopK, BatchTopK, Matryoshka |
|------------------|---------------------------|--------------------------------|--------------------------------|
| ReLU             | the same codes            | the same codes                 | the k largest                  |
| JumpReLU, BatchTopK | the same codes         | the same, and those below θ    | the k largest                  |
| Gated            | the same codes            | the same, and those below θ    | the k largest                  |
| TopK             | one θ that gives its L0   | the same, and all others above 0 | the k largest: the same for its k |

Codes below zero (AbsTopK), those of a matching pursuit and those of a temporal dictionary none of them can have: such
dictionaries are refused.

ReLU could fire for the same latents alone if their biases were lower by θ, but then each is too small by θ. On the built-in
model's layer 15 (d_sae 1,152, held-out text without sinks), a BatchTopK dictionary with L0 50 and FVU 0.289 begins so with
FVU 0.422, and with biases as they are with L0 169 and FVU 0.241; the penalty then takes out what is not worth its price.

With JumpReLU's sparsity "tanh" a threshold of zero has no gradient, so there it begins at 0.01 of the bandwidth, and codes
below that are left out.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.common.errors import ConfigError
from microtome.dictionary.activation import Activation, JumpReLU
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary
from microtome.dictionary.selection import kth_largest
from microtome.dictionary.temporal import TemporalDictionary

L0_ROWS = 2048  # so many are enough to find an L0


@dataclass(frozen=True)
class Start:
    """What a member of a stack begins with: a dictionary's activation and weights, which its rule may change, and the norms
    of its decoder rows."""

    activation: Activation
    encoder: Float[Tensor, "F d_in"]
    b_enc: Float[Tensor, " F"]
    norms: Float[Tensor, " F"]


def checked(start: Dictionary | CrossLayerTranscoder | TemporalDictionary) -> Dictionary | CrossLayerTranscoder:
    """The dictionary itself. Raises ConfigError for one whose codes no architecture that is trained can have: signed ones,
    those of a matching pursuit, and those that depend on the tokens before."""
    if isinstance(start, TemporalDictionary):
        raise ConfigError(
            "The dictionary to fine-tune has codes that depend on the tokens before, and a training shuffles tokens",
            got=start.architecture,
            fix="Name another dictionary",
        )
    for each in start.modules():
        if isinstance(each, Activation) and (each.signed or not each.at_once):
            split = each.signed and isinstance(start, Dictionary)
            raise ConfigError(
                "The dictionary to fine-tune has codes as no architecture here that is trained",
                got=each.name,
                expected="codes that are a function of the pre-activations and never below zero",
                fix="Split its signs (microtome convert --split-signs)" if split else "Name another dictionary",
            )
    return start


@torch.no_grad()
def with_thresholds(
    start: Dictionary | CrossLayerTranscoder, x: Float[Tensor, "n d_in"]
) -> Dictionary | CrossLayerTranscoder:
    """A dictionary whose activation chooses among the latents of a row (TopK), with one threshold instead (for each layer):
    that above which as many latents are on these rows, unscaled, as before. Others stay as they are, and so do those of
    another `d_in`, which the training refuses."""
    if x.shape[1] != start.d_in:
        return start
    pre = start.pre_activations(x)
    if isinstance(start, Dictionary):
        if start.activation.as_thresholds(start.b_enc) is not None:
            return start
        start = copy.deepcopy(start)
        start.activation = _jumprelu(start.activation, pre, start.b_enc)
        return start
    parts = len(start.activations)
    given = zip(start.activations, pre.chunk(parts, 1), start.b_enc.flatten().chunk(parts), strict=True)
    each = [(activation, part, bias) for activation, part, bias in given if isinstance(activation, Activation)]
    if all(activation.as_thresholds(bias) is not None for activation, _, bias in each):
        return start
    start = copy.deepcopy(start)
    start.activations = nn.ModuleList([_jumprelu(*one) for one in each])
    return start


def _jumprelu(activation: Activation, pre: Float[Tensor, "n F"], bias: Float[Tensor, " F"]) -> JumpReLU:
    """The one threshold above which as many of these are as fire."""
    firing = int((activation.codes(pre, bias).values > 0).sum())
    edge = kth_largest(pre.flatten(), firing + 1).clamp_min(0) if 0 < firing < pre.numel() else pre.new_zeros(())
    return JumpReLU(edge.expand(pre.shape[1]).clone())


def take_thresholds(start: Start) -> Float[Tensor, " F"] | None:
    """Make these weights, in place, those of the JumpReLU that a dictionary with this activation is, and return its
    thresholds; None (and nothing changes) where it is none."""
    found = start.activation.as_thresholds(start.b_enc)
    if found is None:
        return None
    start.encoder.mul_(found.scale[:, None])
    start.b_enc.copy_(found.bias)
    return found.threshold


def need_thresholds(start: Start, architecture: str) -> Float[Tensor, " F"]:
    """The same for an architecture that cannot begin otherwise. Raises ConfigError for one that was not given thresholds."""
    found = take_thresholds(start)
    if found is None:
        raise ConfigError(
            f"The dictionary to fine-tune as {architecture} has an activation without thresholds",
            got=start.activation.name,
            expected="relu, jumprelu or gated",
            fix="Give it thresholds (with_thresholds)",
        )
    return found
