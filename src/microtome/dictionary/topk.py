"""The TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093) with its auxiliary loss for dead latents.

    pre = (x − b_dec) W_enc + b_enc          f = ReLU(TopK_k(pre))          x̂ = f W_dec + b_dec
    L   = Σ‖x − x̂‖² / Σ‖x − x̄‖²  +  α · Σ‖e − ê‖² / Σ‖e − ē‖²              (§2.3, A.2)

with e = x − x̂ (a constant) and ê = W_decᵀ TopK_{k_aux}(pre of dead latents), without b_dec. Rows of W_dec have unit
norm. Gradients are written out instead of traced: only the product with the encoder is dense (see `codes.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.config import require
from microtome.common.device import generator
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.products import CodeTranspose, decode, latent_sums, sampled_products
from microtome.dictionary.selection import top_k

# Up to this many dead latents for each one kept, the auxiliary loss is quicker with dense products.
_DENSE_CANDIDATES = 3


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """A TopK autoencoder to train.

    `aux_k` is the number of dead latents that the auxiliary loss uses per row (None: half of d_in); `dead_after` the
    number of tokens without a firing after which a latent counts as dead; `aux_coefficient` is α.
    """

    architecture: ClassVar[str] = "topk"

    d_sae: int
    k: int
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32
    dead_after: int = 1_000_000
    outlier_cap: float = 3.0

    def __post_init__(self) -> None:
        require(self.d_sae > 0, "d_sae must be positive", got=self.d_sae)
        require(0 < self.k <= self.d_sae, "k must be between 1 and d_sae", got=f"k {self.k}, d_sae {self.d_sae}")
        require(self.aux_k is None or 0 < self.aux_k <= self.d_sae, "aux_k must be between 1 and d_sae", got=self.aux_k)
        require(self.aux_coefficient >= 0, "aux_coefficient must not be negative", got=self.aux_coefficient)
        require(self.outlier_cap > 0, "outlier_cap must be positive", got=self.outlier_cap)
        require(self.dead_after > 0, "dead_after must be positive", got=self.dead_after)


@dataclass(frozen=True)
class StepReport:
    """What one training step saw: the losses (0-dimensional tensors) and which latents fired."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]


class TopKSAE(nn.Module):
    """A dictionary of `d_sae` latents for activations of size `d_in`, of which `k` fire on each.

    `encoder` holds W_enc transposed, `[d_sae, d_in]`, so that a latent's weights lie together; `W_enc` is a view of it.
    """

    architecture: ClassVar[str] = "topk"

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @classmethod
    def initialised(cls, d_in: int, config: TopKConfig, *, center: Float[Tensor, " d_in"], seed: int) -> "TopKSAE":
        """Random unit decoder rows, the encoder their transpose, and the decoder bias at the data's `center`."""
        sae = cls(d_in, config.d_sae, config.k)
        with torch.no_grad():
            rows = torch.randn(config.d_sae, d_in, generator=generator(seed, "decoder"))
            sae.W_dec.copy_(functional.normalize(rows, dim=1))
            sae.encoder.copy_(sae.W_dec)
            sae.b_dec.copy_(center)
        return sae

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the field's name
        return self.encoder.T

    # ---- use --------------------------------------------------------------------------------------------------------

    def pre_activations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """(x − b_dec) W_enc + b_enc, in the weights' dtype."""
        return functional.linear(x.to(self.b_dec.dtype) - self.b_dec, self.encoder, self.b_enc)

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """The k largest pre-activations of each row, those below zero set to zero."""
        pre = self.pre_activations(x)
        indices = top_k(pre, self.k)
        return SparseCodes(indices, pre.gather(1, indices).relu(), self.d_sae)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "n d_in"]:
        """f W_dec + b_dec."""
        return decode(codes.indices, codes.values, self.W_dec) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of activations of any leading shape, in their own dtype."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows)).to(x.dtype).view_as(x)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make a dictionary of x that was trained on factor·x work on x itself. The decoder's rows keep their norm."""
        self.b_enc.div_(factor)
        self.b_dec.div_(factor)

    # ---- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def training_step(
        self,
        x: Float[Tensor, "n d_in"],
        config: TopKConfig,
        *,
        variance: float,
        dead: Bool[Tensor, " d_sae"] | None,
        select_dtype: torch.dtype,
    ) -> StepReport:
        """Put the gradients of the loss into `.grad`. `variance` is the data's mean ‖x − x̄‖², `dead` marks dead
        latents.

        Latents are selected with a product in `select_dtype`; their values and all else are exact in the weights'
        dtype.
        """
        centred = x - self.b_dec
        pre = functional.linear(centred.to(select_dtype), self.encoder.to(select_dtype), self.b_enc.to(select_dtype))
        indices = top_k(pre, self.k)
        values = self._exact(indices, centred)
        reconstruction = decode(indices, values, self.W_dec) + self.b_dec
        residual = reconstruction - x
        per_unit = 1.0 / (len(x) * variance)
        limit = config.outlier_cap**2 * variance
        weights = (limit / centred.square().sum(1, keepdim=True)).clamp_max(1.0)
        fvu = (weights * residual.square()).sum() * per_unit

        grad_out = residual * weights * (2 * per_unit)
        self.zero_grad()
        self._backward(indices, values, centred, grad_out)
        self._accumulate(b_dec=grad_out.sum(0))
        aux = x.new_zeros(())
        if dead is not None and config.aux_coefficient > 0:
            aux = config.aux_coefficient * self._aux_step(-residual, weights, pre, centred, dead, config)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=x.device)
        fired[indices[values > 0]] = True
        return StepReport(fvu + aux, fvu, aux, fired)

    def _exact(self, indices: Int[Tensor, "n k"], centred: Float[Tensor, "n d_in"]) -> Float[Tensor, "n k"]:
        return (sampled_products(indices, centred, self.encoder) + self.b_enc[indices]).relu()

    def _aux_step(
        self,
        error: Float[Tensor, "n d_in"],
        weights: Float[Tensor, "n 1"],
        pre: Float[Tensor, "n d_sae"],
        centred: Float[Tensor, "n d_in"],
        dead: Bool[Tensor, " d_sae"],
        config: TopKConfig,
    ) -> Float[Tensor, ""]:
        """The auxiliary loss before α, its gradients (times α) added to `.grad`."""
        candidates = dead.nonzero().squeeze(1)
        k = min(config.aux_k or self.d_in // 2, len(candidates))
        kept = top_k(pre[:, candidates], k)
        mean_error = (weights * error).sum(0) / weights.sum()
        scale = 1.0 / (weights * (error - mean_error).square()).sum().clamp_min(1e-12)
        row_scale = weights * (2 * config.aux_coefficient * scale)
        if len(candidates) <= _DENSE_CANDIDATES * k:
            difference = self._aux_dense(error, centred, candidates, kept, row_scale)
            return (weights * difference.square()).sum() * scale
        indices = candidates[kept]
        values = self._exact(indices, centred)
        difference = decode(indices, values, self.W_dec) - error
        self._backward(indices, values, centred, difference * row_scale)
        return (weights * difference.square()).sum() * scale

    def _aux_dense(
        self,
        error: Float[Tensor, "n d_in"],
        centred: Float[Tensor, "n d_in"],
        candidates: Int[Tensor, " c"],
        kept: Int[Tensor, "n k"],
        row_scale: Float[Tensor, "n 1"],
    ) -> Float[Tensor, "n d_in"]:
        """ê − e and its gradients, by dense products over the dead latents: quicker while most are kept on each row."""
        encoder, W_dec = self.encoder[candidates], self.W_dec[candidates]
        codes = functional.linear(centred, encoder, self.b_enc[candidates]).relu()
        codes *= torch.zeros_like(codes).scatter_(1, kept, 1.0)
        difference = codes @ W_dec - error
        grad_out = difference * row_scale
        grad_codes = (grad_out @ W_dec.T) * (codes > 0)
        grad_b_enc = grad_codes.sum(0)
        self._accumulate(candidates, W_dec=codes.T @ grad_out, encoder=grad_codes.T @ centred, b_enc=grad_b_enc)
        self._accumulate(b_dec=-(grad_b_enc @ encoder))
        return difference

    def _backward(
        self,
        indices: Int[Tensor, "n k"],
        values: Float[Tensor, "n k"],
        centred: Float[Tensor, "n d_in"],
        grad_out: Float[Tensor, "n d_in"],
    ) -> None:
        """Add what reaches the weights through these codes, given the gradient of the loss by their decoding."""
        transpose = CodeTranspose(indices, self.d_sae)
        grad_values = sampled_products(indices, grad_out, self.W_dec) * (values > 0)
        grad_b_enc = latent_sums(indices, grad_values, self.d_sae)
        self._accumulate(
            W_dec=transpose.times(values, grad_out),
            encoder=transpose.times(grad_values, centred),
            b_enc=grad_b_enc,
            b_dec=-(grad_b_enc @ self.encoder),
        )

    def _accumulate(self, rows: Int[Tensor, " c"] | None = None, **gradients: Tensor) -> None:
        """Add gradients to the `.grad` of the parameters so named; given `rows`, to those rows of it."""
        for name, gradient in gradients.items():
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = gradient
            elif rows is None:
                parameter.grad += gradient
            else:
                parameter.grad.index_add_(0, rows, gradient)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the decoder's rows at unit norm."""
        functional.normalize(self.W_dec, dim=1, out=self.W_dec)
