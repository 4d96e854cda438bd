"""The activation functions of dictionaries: from pre-activations to codes.

Each is a small module that holds its own numbers. `MatchingPursuit` alone needs more than the pre-activations
(`pursuit.py`). All are homogeneous in a latent's scale: `scale_(c)` changes the
numbers so that `c · pre` gives `c · f`, which is what folds input scales and decoder norms into the weights.

| module     | f                                                         | source                                   |
|------------|-----------------------------------------------------------|------------------------------------------|
| `ReLU`     | ReLU(pre)                                                 | Bricken et al. 2023                      |
| `TopK`     | ReLU of the k largest                                     | Gao et al. 2024, arXiv 2406.04093, §2.3  |
| `AbsTopK`  | the k of largest absolute value, with their signs         | AbsTopK, ICLR 2026, arXiv 2510.00404     |
| `GroupTopK`| ReLU of the k / G largest of each of G groups of neighbours | llamascopium's crosscoders             |
| `GroupMax` | ReLU of the largest of each of k groups of neighbours     | sparsify                                 |
| `JumpReLU` | pre · 1[pre > θ] · 1[pre > 0]                             | Rajamanoharan et al. 2024, 2407.14435    |
| `Gated`    | 1[π > 0] · ReLU(e^r ⊙ (π − b_gate) + b_mag), π = pre      | Rajamanoharan et al. 2024, 2404.16014    |
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.config import require
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.selection import top_k


class Thresholds(NamedTuple):
    """f = z · 1[z > threshold] with z = scale · (pre − old bias) + bias: how an activation is written as JumpReLU, for a
    dictionary whose encoder rows grow by `scale` and whose b_enc becomes `bias`."""

    scale: Float[Tensor, " d_sae"]
    bias: Float[Tensor, " d_sae"]
    threshold: Float[Tensor, " d_sae"]


class Activation(nn.Module, ABC):
    """From pre-activations to codes. `bias` is the dictionary's b_enc, which `Gated` needs (there it is b_gate)."""

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    """Whether codes can be below zero."""
    at_once: ClassVar[bool] = True
    """Whether the codes are a function of the pre-activations."""

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
    ) -> SparseCodes:
        """The codes of inputs from which b_dec is taken already where it has to be."""
        return self.codes(functional.linear(x, encoder, bias), bias)

    @abstractmethod
    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        """The codes of each row."""

    def check(self, d_sae: int) -> None:
        """Raise ConfigError where the activation cannot serve so many latents."""

    def as_thresholds(self, bias: Float[Tensor, " d_sae"]) -> "Thresholds | None":
        """The same codes as those of a JumpReLU, or None where no thresholds say which latents fire."""
        return None

    def scale_(self, c: Float[Tensor, "..."]) -> None:
        """Fit the module's numbers to pre-activations that are `c` times as large: a factor for all latents, or one for
        each."""

    def of_latents(self, latents: slice) -> "Activation":
        """The same with the numbers of some of its latents alone. A TopK of these keeps k as it is."""
        part = copy.deepcopy(self)
        for name, numbers in self.named_parameters():
            setattr(part, name, nn.Parameter(numbers[latents].detach().clone()))
        return part


class ReLU(Activation):
    """f = ReLU(pre)."""

    name = "relu"

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        return SparseCodes.of_dense(pre.relu())

    def as_thresholds(self, bias: Float[Tensor, " d_sae"]) -> Thresholds:
        """Zero."""
        return Thresholds(torch.ones_like(bias), bias, torch.zeros_like(bias))


class TopK(Activation):
    """The k largest pre-activations of each row, those below zero set to zero."""

    name = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        require(k > 0, "k must be positive", got=k)
        self.k = k

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        indices = top_k(pre, self.k)
        return SparseCodes(indices, pre.gather(1, indices).relu(), pre.shape[1])

    def check(self, d_sae: int) -> None:
        require(self.k <= d_sae, "k must be at most d_sae", got=f"k {self.k}, d_sae {d_sae}")


class AbsTopK(TopK):
    """The k pre-activations of largest absolute value of each row, with their signs: a latent fires in two directions."""

    name, signed = "abstopk", True

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        indices = top_k(pre.abs(), self.k)
        return SparseCodes(indices, pre.gather(1, indices), pre.shape[1])


class GroupTopK(Activation):
    """The k / groups largest pre-activations of each of `groups` runs of neighbouring latents, those below zero set to zero."""

    name = "grouptopk"

    def __init__(self, k: int, groups: int) -> None:
        super().__init__()
        require(
            groups > 0 and k > 0 and k % groups == 0, "Each group keeps equally many", got=f"k {k}, {groups} groups"
        )
        self.k, self.groups = k, groups

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        n, d_sae = pre.shape
        width = d_sae // self.groups
        each = self.k // self.groups
        within = top_k(pre.reshape(n * self.groups, width), each).view(n, self.groups, each)
        starts = torch.arange(self.groups, device=pre.device)[:, None] * width
        indices = (within + starts).flatten(1)
        return SparseCodes(indices, pre.gather(1, indices).relu(), d_sae)

    def check(self, d_sae: int) -> None:
        got = f"{d_sae} latents in {self.groups} groups"
        require(d_sae % self.groups == 0, "The groups must be equally large", got=got)
        require(self.k <= d_sae, "k must be at most d_sae", got=f"k {self.k}, d_sae {d_sae}")


class GroupMax(Activation):
    """The largest of each of k groups of neighbouring latents, if positive."""

    name = "groupmax"

    def __init__(self, k: int) -> None:
        super().__init__()
        require(k > 0, "k must be positive", got=k)
        self.k = k

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        values, within = pre.unflatten(1, (self.k, -1)).max(2)
        starts = torch.arange(self.k, device=pre.device) * (pre.shape[1] // self.k)
        return SparseCodes(starts + within, values.relu(), pre.shape[1])

    def check(self, d_sae: int) -> None:
        require(d_sae % self.k == 0, "The groups must be equally large", got=f"{d_sae} latents in {self.k} groups")


class JumpReLU(Activation):
    """f = pre where pre is above its latent's threshold (and above zero)."""

    name = "jumprelu"

    def __init__(self, threshold: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.threshold = nn.Parameter(threshold)

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        return SparseCodes.of_dense(pre * ((pre > self.threshold) & (pre > 0)))

    def as_thresholds(self, bias: Float[Tensor, " d_sae"]) -> Thresholds:
        """Its own, where they are positive."""
        return Thresholds(torch.ones_like(bias), bias, self.threshold.clamp_min(0))

    def scale_(self, c: Float[Tensor, "..."]) -> None:
        self.threshold.mul_(c)


class Gated(Activation):
    """The gate pre > 0 says which latents fire; a scaled and shifted copy of the same product says how strongly."""

    name = "gated"

    def __init__(self, r_mag: Float[Tensor, " d_sae"], b_mag: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.r_mag, self.b_mag = nn.Parameter(r_mag), nn.Parameter(b_mag)

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        magnitude = (self.r_mag.exp() * (pre - bias) + self.b_mag).relu()
        return SparseCodes.of_dense(magnitude * (pre > 0))

    def as_thresholds(self, bias: Float[Tensor, " d_sae"]) -> Thresholds:
        """The magnitude where the gate opens, as gate and magnitude are one product (2404.16014, §3.2)."""
        scale = self.r_mag.exp()
        return Thresholds(scale, self.b_mag, (self.b_mag - scale * bias).clamp_min(0))

    def scale_(self, c: Float[Tensor, "..."]) -> None:
        self.b_mag.mul_(c)
