"""`MatchingPursuit`: codes that are found one after the other, each from what the ones before it left.

At each step the latent with the largest product with the rest fires, by that product, and its decoder row times it is
taken from the rest (Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries"; in autoencoders Costa et
al. 2025, arXiv 2506.03093). When to stop is SAELens's rule (6.54, `matching_pursuit_sae.py`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microtome.common.config import require
from microtome.common.errors import ConfigError
from microtome.dictionary.activation import Activation
from microtome.dictionary.codes import SparseCodes


class MatchingPursuit(Activation):
    """At most `max_iterations` steps for a row. It stops before where nothing positive is found; with
    `stop_on_duplicate_support` after a step that found a latent again (whose code grew by it); and, if
    `residual_threshold` is above zero, when the norm of the rest is below that."""

    name, at_once = "matching_pursuit", False

    def __init__(
        self, max_iterations: int, residual_threshold: float = 1e-2, *, stop_on_duplicate_support: bool = True
    ) -> None:
        super().__init__()
        require(max_iterations > 0, "max_iterations must be positive", got=max_iterations)
        self.max_iterations, self.residual_threshold = max_iterations, residual_threshold
        self.stop_on_duplicate_support = stop_on_duplicate_support

    def encode(
        self,
        x: Float[Tensor, "n d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
    ) -> SparseCodes:
        f = x.new_zeros(len(x), len(encoder))
        rest, row = x, torch.arange(len(x), device=x.device)  # of the rows that go on
        for _ in range(self.max_iterations):
            best, latent = functional.linear(rest, encoder, bias).max(1)
            value = best.relu()
            again = f[row, latent] != 0
            f = f.index_put((row, latent), value, accumulate=True)
            rest = rest - value[:, None] * W_dec[latent]
            going = value != 0
            if self.stop_on_duplicate_support:
                going &= ~again
            if self.residual_threshold > 0:
                going &= rest.norm(dim=1) >= self.residual_threshold
            rest, row = rest[going], row[going]
            if len(row) == 0:
                break
        return SparseCodes.of_dense(f)

    def codes(self, pre: Float[Tensor, "n d_sae"], bias: Float[Tensor, " d_sae"]) -> SparseCodes:
        """Raises ConfigError: the pre-activations alone do not say what a step leaves."""
        raise ConfigError("The codes of a matching pursuit are no function of its pre-activations", fix="Use encode")

    def scale_(self, c: Float[Tensor, "..."]) -> None:
        """One factor for all latents is that of the input, and the rest's. A factor for each is that of decoder norms,
        which leave the input as it is."""
        if c.ndim == 0:
            self.residual_threshold *= float(c)
