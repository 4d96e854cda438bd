"""`Stack`: S dictionaries of one shape in training, as parameters with a leading axis of members.

    pre = (x − b_dec) W_enc + b_enc       f = rule(pre)       ŷ = f W_dec + b_dec (+ x W_skip)
    L   = [Σ w ‖y − ŷ‖² + penalty] / (n · variance)  +  α · Σ w ‖e − ê‖² / Σ w ‖e − ē‖²

The members see the same rows (or, given `[S, n, d]`, each its own) and differ in seed and in numbers such as λ. What
makes an architecture is in its `Rule`; what latents write in a `Decoder`, through which members can also be the layers of
one cross-layer transcoder; what is done for dead latents in `revival.py`. The division by the data's `variance` changes
no ratio: λ keeps the meaning that it has beside a summed squared error.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.device import generator
from microtome.common.errors import ConfigError
from microtome.dictionary.config import DictionaryConfig
from microtome.dictionary.decoders import Decoder, OwnDecoder
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.fine_tuning import Start
from microtome.dictionary.kept import Entries, Kept
from microtome.dictionary.revival import DeadLatents
from microtome.dictionary.rules import Rule, Step
from microtome.dictionary.selection import PreActivations

# Of every member, or (s = 1) of all together.
Inputs = Float[Tensor, "s n d_in"]
Targets = Float[Tensor, "s n d_out"]
_FREE_NORM, _NEARLY_ZERO = 0.1, 0.01


@dataclass(frozen=True)
class StepReport:
    """What a step saw, for each member: its loss, FVU, auxiliary loss and L0, and which latents fired."""

    loss: Float[Tensor, " S"]
    fvu: Float[Tensor, " S"]
    aux: Float[Tensor, " S"]
    l0: Float[Tensor, " S"]
    fired: Bool[Tensor, "S F"]


@dataclass(frozen=True)
class _Piece:
    """What a step saw of some rows: of each member the loss, the squared error and how often each latent fired, and ŷ − y."""

    loss: Float[Tensor, " S"]
    squared: Float[Tensor, " S"]
    counts: Float[Tensor, "S F"]
    residual: Float[Tensor, "S _ d_out"]


@dataclass(frozen=True)
class DataStatistics:
    """What the first rows say of the data, in scaled units: a centre of x and of y, and the mean ‖y − ȳ‖² (of each
    member's rows, where they differ)."""

    x_center: Float[Tensor, "S d_in"]
    y_center: Float[Tensor, "S d_out"]
    variance: float | Float[Tensor, " S"]


class Stack(nn.Module):
    """Weights `encoder` `[S, F, d_in]`, `W_dec` `[S, F, d_out]`, `b_enc` `[S, F]`, `b_dec` `[S, d_out]`, and where
    there is a skip path `W_skip` `[S, d_in, d_out]`. Another `decoder` stands in the place of an `OwnDecoder`."""

    def __init__(
        self,
        configs: list[DictionaryConfig],
        rule: Rule,  # type: ignore[type-arg]
        d_in: int,
        d_out: int,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        members, self.config = len(configs), configs[0]
        self.rule, d_sae = rule, self.config.d_sae
        self.d_in, self.d_out, self.d_sae = d_in, d_out, d_sae
        self.decoder = OwnDecoder(members, d_sae, (d_out,)) if decoder is None else decoder
        self._encoder = None if self.config.tied else nn.Parameter(torch.zeros(members, d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(members, d_sae))
        self.b_dec = nn.Parameter(torch.zeros(members, d_out))
        self.W_skip = nn.Parameter(torch.zeros(members, d_in, d_out)) if self.config.skip else None

    @property
    def encoder(self) -> Float[Tensor, "S F d_in"]:
        return self.W_dec if self._encoder is None else self._encoder

    @property
    def W_dec(self) -> nn.Parameter:  # noqa: N802 - the field's name
        """The decoder rows `[S, F, d_out]` of members that are dictionaries of their own."""
        assert isinstance(self.decoder, OwnDecoder)
        return self.decoder.W_dec

    def __len__(self) -> int:
        return len(self.b_enc)

    # ---- begin --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, data: DataStatistics, seeds: list[int]) -> None:
        """Random decoder rows and the encoder their transpose (or random rows as long, if the config says so); for a
        transcoder random encoder rows and, instead of a decoder of zeros (Paulo et al. 2025, arXiv 2501.18823), one that is
        nearly that: where norms are free TopK selects by them, and rows of zeros would all be alike. Biases so that the mean
        input has pre-activations of zero, less what the rule begins with."""
        rows = self._directions(seeds, "decoder")
        if self.config.is_transcoder:
            self.encoder.copy_(rows)
            self.decoder.draw(seeds, 1.0 if self.config.unit_norms else _NEARLY_ZERO)
        else:
            unit = self.config.unit_norms
            self.W_dec.copy_(rows)
            self.W_dec.mul_((1.0 if unit else _FREE_NORM) / self.decoder.norms()[..., None])
            # With unit norms a code is, from the start, how far its input goes along its row.
            self.encoder.copy_(self.W_dec / self.W_dec.square().sum(2, keepdim=True) if unit else self.W_dec)
            if self.config.encoder_start == "random":
                self.encoder.copy_(self._directions(seeds, "encoder") * self.encoder.norm(dim=2, keepdim=True))
        if self.config.b_dec_start != "zero":
            self.b_dec.copy_(data.y_center)
        if not self.config.centered:
            self.b_enc.copy_(-(self.encoder @ data.x_center[..., None]).squeeze(-1))
        self.rule.begin(self.b_enc, self.encoder.norm(dim=2))

    def _directions(self, seeds: list[int], name: str) -> Float[Tensor, "S F d_in"]:
        rows = torch.stack([torch.randn(self.d_sae, self.d_in, generator=generator(s, name)) for s in seeds])
        return functional.normalize(rows, dim=2).to(self.b_enc.device)

    # ---- a step -------------------------------------------------------------------------------------------------------

    def step(
        self,
        x: Inputs,
        y: Targets,
        *,
        variance: float | Float[Tensor, " S"],
        fraction: float = 0.0,
        dead: Bool[Tensor, "S F"] | None = None,
        select_dtype: torch.dtype = torch.float32,
    ) -> StepReport:
        """Put the gradients of the loss into `.grad`. `x` and `y` are `[1, n, d]` for rows that all members share,
        `variance` is the data's mean ‖y − ȳ‖² (one number, or each member's), `dead` marks dead latents, `fraction` is
        the share of the run behind.

        Latents are selected with a product in `select_dtype`; with sparse products the values of those kept are exact, with
        dense ones (`kept.py`) all is in that dtype.
        """
        spreads = torch.as_tensor(variance, dtype=torch.float32, device=y.device).expand(len(self))
        unit = 1.0 / (y.shape[1] * spreads.mean())
        pre = self.pre_activations(x, select_dtype)
        weights = self._row_weights(y, spreads)
        norms = self.norms()
        gathered = norms.detach().requires_grad_(norms.requires_grad)  # its gradient, over the pieces
        step = Step(fraction, weights, gathered, self.b_enc, partial(self._column_sums, x))
        dead = dead if self.config.revival in ("aux", "ghost") else None
        for_dead = pre.whole if dead is not None else x.new_empty(len(self), 0, 0)
        kept = self.rule.keep(pre, step)
        del pre
        self.zero_grad()  # not before: the pre-activations would lie where the next gradients are to lie
        pieces = [
            self._piece(x[:, rows], y[:, rows], part, step.of(rows, partial(self._column_sums, x[:, rows])), unit)
            for rows, part in self.rule.pieces(kept)
        ]
        if gathered.grad is not None:
            norms.backward(gathered.grad)
        loss, squared = torch.stack([torch.stack([p.loss, p.squared]) for p in pieces]).sum(0)
        counts = torch.stack([piece.counts for piece in pieces]).sum(0)
        aux = torch.zeros_like(loss)
        if dead is not None:
            errors = -torch.cat([piece.residual for piece in pieces], 1)
            aux = torch.stack([self._revival(s, x, errors, weights, for_dead[s], dead[s]) for s in range(len(self))])
            if aux.requires_grad:
                aux.sum().backward()
        fvu = squared / (y.shape[1] * spreads)
        return StepReport(loss + aux.detach(), fvu, aux.detach(), counts.sum(1) / y.shape[1], counts > 0)

    def _piece(self, x: Inputs, y: Targets, kept: Kept, step: Step, unit: Float[Tensor, ""]) -> "_Piece":
        """Add the gradients of the loss of some rows to `.grad`."""
        b_dec = self.b_dec if self.config.centered else None
        kept_pre = kept.pre_activations(x, b_dec, self.encoder, self.b_enc)
        f = self.rule.values(kept_pre, kept, step)
        base = self._base(x, y)
        squared, whole, residual = self._errors(base, f, kept, step.weights)
        frozen = self.rule.frozen_codes(kept_pre, kept, step)
        loss = (squared + self.rule.penalty(kept_pre, f if frozen is None else frozen, kept, step)) * unit
        if frozen is not None:
            frozen_residual = self.decoder.decode(frozen, kept, frozen=True) + base.detach()
            loss = loss + _weighted_squares(frozen_residual, step.weights) * unit
        del base, kept_pre, frozen  # what no gradient needs is free from here on
        loss.sum().backward()
        self.rule.observe(f.detach(), kept, step)
        return _Piece(loss.detach(), whole, kept.firings(f.detach()), residual)

    @torch.no_grad()
    def pre_activations(self, x: Inputs, dtype: torch.dtype) -> PreActivations:
        """(x − b_dec) W_enc + b_enc in the dtype of the selection."""
        centred = x - self.b_dec[:, None] if self.config.centered else x.expand(len(self), -1, -1)
        return PreActivations(centred, self.encoder, self.b_enc, dtype)

    def _base(self, x: Inputs, y: Targets) -> Float[Tensor, "S n d_out"]:
        """The residual before any latent writes."""
        empty = self.b_dec[:, None] - y
        return empty if self.W_skip is None else empty + x @ self.W_skip

    def _errors(
        self, base: Float[Tensor, "S n d_out"], f: Entries, kept: Kept, weights: Float[Tensor, "S n"]
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"], Float[Tensor, "S n d_out"]]:
        """The weighted squared error, as a mean over the rule's parts and (without gradient) of the whole, and the residual
        ŷ − y of the whole."""
        residual, errors = base, []
        for values, part in self.rule.parts(f, kept):
            residual = residual + self.decoder.decode(values, part)
            errors.append(_weighted_squares(residual, weights))
        return torch.stack(errors).mean(0), errors[-1].detach(), residual.detach()

    def _revival(
        self,
        member: int,
        x: Inputs,
        errors: Float[Tensor, "S n d_out"],
        weights: Float[Tensor, "S n"],
        pre: Float[Tensor, "n F"],
        dead: Bool[Tensor, " F"],
    ) -> Float[Tensor, ""]:
        """The loss of a member's dead latents, zero where it has none."""
        candidates = dead.nonzero().squeeze(1)
        if len(candidates) == 0:
            return errors.new_zeros(())
        latents = DeadLatents(
            candidates=candidates,
            encoder=self.encoder[member],
            W_dec=self.decoder.rows(member),
            b_enc=self.b_enc[member],
            b_dec=self.b_dec[member] if self.config.centered else None,
            x=x[member % len(x)],
            error=self.decoder.span(errors, member),
            weights=self.decoder.row_weights(weights, member)[:, None],
        )
        if self.config.revival == "ghost":
            return self.config.aux_coefficient * latents.ghost()
        return self.config.aux_coefficient * latents.aux(pre, self.config.aux_k or max(1, self.d_out // 2))

    @torch.no_grad()
    def _row_weights(self, y: Targets, spreads: Float[Tensor, " S"]) -> Float[Tensor, "S n"]:
        cap = self.config.outlier_cap
        if cap is None:
            return y.new_ones(len(self), y.shape[1])
        squared = (self.b_dec[:, None] - y).norm(dim=2).square()
        weights: Tensor = (cap**2 * spreads[:, None] / squared).clamp_max(1.0)
        return weights

    def norms(self) -> Float[Tensor, "S F"]:
        """The norm of each latent's decoder row: one, where it is kept there."""
        if self.config.unit_norms:
            return self.b_enc.new_ones(self.b_enc.shape)
        return self.decoder.norms()

    def latent_parameters(self) -> list[nn.Parameter]:
        """All but the decoder's that hold something for each latent, `[S, F]` or `[S, F, …]`."""
        encoder = [] if self._encoder is None else [self._encoder]
        return [*encoder, self.b_enc, *self.rule.parameters()]

    def _column_sums(self, x: Inputs) -> Float[Tensor, "S F"]:
        centred = x - self.b_dec[:, None] if self.config.centered else x.expand(len(self), -1, -1)
        return (self.encoder @ centred.sum(1)[..., None]).squeeze(-1) + x.shape[1] * self.b_enc

    # ---- between steps --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_update(self) -> None:
        """Shorten gradients that are longer than `clip_norm`; where norms are unit, take out of the decoder's gradient
        what would only change a row's length (Bricken et al. 2023)."""
        if self.config.unit_norms:
            self.decoder.take_out_growth()
        if self.config.clip_norm is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            squares = [g.flatten(1).norm(dim=1).square() for g in gradients]
            norm = (torch.stack(squares).sum(0) if self.decoder.separate else torch.cat(squares).sum().view(1)).sqrt()
            factor = (self.config.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
            for g in gradients:
                g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring decoder rows back to unit norm, where they are kept there, and the rule's parameters to where they may
        be."""
        if self.config.unit_norms:
            self.decoder.normalise()
        self.rule.after_update()

    # ---- end ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(
        self,
        member: int,
        origin: Origin,
        in_scales: Float[Tensor, " d_in"] | None = None,
        out_scales: Float[Tensor, " d_out"] | None = None,
    ) -> Dictionary:
        """A member as a dictionary of unscaled activations, given the factors that training applied."""
        norms = self.norms()[member].detach()
        sae = Dictionary(
            self.d_in,
            self.d_sae,
            self.rule.activation(member, norms),
            origin=origin,
            d_out=self.d_out,
            center=self.config.centered,
            skip=self.W_skip is not None,
        ).to(self.W_dec.device)
        sae.encoder.copy_(self.encoder[member])
        for name in ("W_dec", "b_enc", "b_dec", *(["W_skip"] if self.W_skip is not None else [])):
            sae.get_parameter(name).copy_(self.get_parameter(name)[member])
        if not self.config.unit_norms:
            sae.fold_decoder_norms()
        if in_scales is not None and out_scales is not None:
            sae.fold_scales(in_scales, out_scales)
        return sae.requires_grad_(False)

    @torch.no_grad()
    def begin_with(
        self, member: int, sae: Dictionary, in_scales: Float[Tensor, " d_in"], out_scales: Float[Tensor, " d_out"]
    ) -> None:
        """Begin with the weights of a dictionary of unscaled activations (fine-tuning), the inverse of `export`.

        Raises ConfigError when its sizes, or what it takes from its input, are others.
        """
        sizes = (self.d_in, self.d_sae, self.d_out, self.config.centered, self.W_skip is not None)
        found = (sae.d_in, sae.d_sae, sae.d_out, sae.center, sae.W_skip is not None)
        if sizes != found or sae.input_norm != "none":
            raise ConfigError(
                "The dictionary to fine-tune is of another kind than its config",
                got=f"(d_in, d_sae, d_out, center, skip) = {found}, input norm {sae.input_norm}",
                expected=f"{sizes}, input norm none",
            )
        start = copy.deepcopy(sae).to(self.W_dec.device, torch.float32)
        start.fold_scales(1 / in_scales, 1 / out_scales)
        if self.config.unit_norms:  # in scaled units: a crosscoder's points have scales of their own
            start.fold_decoder_norms()
        self.W_dec[member] = start.W_dec
        self.rule.begin_with(member, Start(start.activation, start.encoder, start.b_enc, self.norms()[member]))
        if self.config.tied and not torch.allclose(start.encoder, start.W_dec, rtol=1e-3, atol=1e-5):
            raise ConfigError(
                "A tied dictionary cannot begin with one whose encoder is not the transpose of its decoder",
                fix="Leave out tied, or name a dictionary that was trained with it",
            )
        self.encoder[member] = start.encoder
        for name in ("b_enc", "b_dec", *(["W_skip"] if self.W_skip is not None else [])):
            self.get_parameter(name)[member] = start.get_parameter(name)

    @torch.no_grad()
    def residual(self, x: Inputs, y: Targets) -> Float[Tensor, "S n d_out"]:
        """ŷ − y at the end of the run, for scaled rows that are selected from in fp32."""
        weights = y.new_ones(len(self), y.shape[1])
        step = Step(1.0, weights, self.norms(), self.b_enc, partial(self._column_sums, x))
        kept = self.rule.keep(self.pre_activations(x, torch.float32), step)
        b_dec, pieces = self.b_dec if self.config.centered else None, []
        for rows, part in self.rule.pieces(kept):
            pre = part.pre_activations(x[:, rows], b_dec, self.encoder, self.b_enc)
            f = self.rule.values(pre, part, step)
            pieces.append(self._errors(self._base(x[:, rows], y[:, rows]), f, part, weights[:, rows])[2])
        return torch.cat(pieces, 1)


def _weighted_squares(residual: Float[Tensor, "S n d_out"], weights: Float[Tensor, "S n"]) -> Float[Tensor, " S"]:
    """Σ w ‖residual‖² of each member."""
    return (weights * residual.square().sum(2)).sum(1)
