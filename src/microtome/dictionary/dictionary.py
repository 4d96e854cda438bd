"""`Dictionary`: a trained dictionary, whatever made it.

    pre = (N(x) − b_dec) W_enc + b_enc        f = activation(pre)        ŷ = N⁻¹(f W_dec + b_dec) + x W_skip

An autoencoder has y = x. A *transcoder* reads x at one hook point and predicts y at another; a *crosscoder* reads and
writes several points at once: its x and y are their activations one behind the other. b_dec is taken from the input only
where `center` says so, N is the input's normalisation (nearly always none), W_skip a skip transcoder's linear path.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.config import require
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.activation import Activation
from microtome.dictionary.codes import SparseCodes

InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]
_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a dictionary belongs: the model, the hook points that it reads and (`outputs`, if others) writes, and the
    text. `widths` are the sizes of the outputs, which a dictionary of several points of unequal sizes needs."""

    model_name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    context: int | None = None
    prepend_bos: bool = True
    dataset: str | None = None
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.inputs) > 0, "A dictionary reads at least one hook point", got=self.inputs)
        if not self.outputs:
            object.__setattr__(self, "outputs", self.inputs)
        require(
            len(self.widths) in (0, len(self.outputs)),
            "There is a width for each output",
            got=f"{len(self.widths)} widths, {len(self.outputs)} outputs",
        )

    @classmethod
    def at(cls, model_name: str, hook_name: str, *, context: int | None = None, dataset: str | None = None) -> "Origin":
        """Of an autoencoder on one hook point."""
        return cls(model_name=model_name, inputs=(hook_name,), context=context, dataset=dataset)


@dataclass(frozen=True)
class Scales:
    """What `N` took from each row, and what gives it back: x = N(x) · std + mean."""

    std: Float[Tensor, "n 1"]
    mean: Float[Tensor, "n 1"]


def digits_of(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """Sixteen hex digits of `about`, and of these tensors, their names and dtypes' bits, in the order of the names."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Dictionary(nn.Module):
    """A dictionary of `d_sae` latents from activations of size `d_in` to ones of size `d_out`.

    `encoder` holds W_enc transposed, `[d_sae, d_in]`, so that a latent's weights lie together; `W_enc` is a view of it.
    `name` is the architecture as the field calls it ("topk", "jumprelu", "gated", "transcoder" …).
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        origin: Origin,
        d_out: int | None = None,
        center: bool = True,
        skip: bool = False,
        input_norm: InputNorm = "none",
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        require(not center or d_in == d_out, "Only an autoencoder can take b_dec from its input", got=(d_in, d_out))
        require(
            activation.at_once or d_in == d_out,
            "A matching pursuit takes what it found from its input, so it reads and writes equally much",
            got=f"d_in {d_in}, d_out {d_out}",
        )
        require(input_norm in get_args(InputNorm), "Unknown input_norm", got=input_norm, expected=get_args(InputNorm))
        activation.check(d_sae)
        require(
            not origin.widths or sum(origin.widths) == d_out, "The widths add up to d_out", got=(origin.widths, d_out)
        )
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out
        self.activation, self.center, self.input_norm = activation, center, input_norm
        self.origin, self.path = origin, Path()  # whoever opens it from a folder says which
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out)) if skip else None

    # ---- what it is ---------------------------------------------------------------------------------------------------

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the field's name
        return self.encoder.T

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes other hook points than it reads."""
        return self.origin.inputs != self.origin.outputs

    @property
    def architecture(self) -> str:
        """As SAELens calls it: the activation's name, for transcoders with what they are."""
        if not self.is_transcoder:
            return "standard" if self.activation.name == "relu" else self.activation.name
        kind = "skip_transcoder" if self.W_skip is not None else "transcoder"
        return kind if self.activation.name == "relu" else f"{self.activation.name}_{kind}"

    @property
    def k(self) -> int | None:
        """How many latents are kept on each row, where the activation fixes that."""
        k = getattr(self.activation, "k", None)
        return k if isinstance(k, int) else None

    @property
    def model_name(self) -> str:
        return self.origin.model_name

    @property
    def hook_name(self) -> str:
        """The one hook point that it reads. Raises ConfigError for a crosscoder."""
        if len(self.origin.inputs) > 1:
            raise ConfigError(
                "This needs a dictionary of one hook point", got=f"a crosscoder of {', '.join(self.origin.inputs)}"
            )
        return self.origin.inputs[0]

    @property
    def output_widths(self) -> tuple[int, ...]:
        """The sizes of the points that it writes: equal ones, unless its origin says others.

        Raises ConfigError where they cannot be equal.
        """
        if self.origin.widths:
            return self.origin.widths
        points = len(self.origin.outputs)
        if self.d_out % points:
            raise ConfigError(
                "The widths of this dictionary's points are not known",
                got=f"d_out {self.d_out} for {points} points",
                fix="Give them to its Origin: widths=(…)",
            )
        return (self.d_out // points,) * points

    def point_norms(self) -> Float[Tensor, "d_sae points"]:
        """The norm of each latent's decoder row at each point."""
        return torch.stack([piece.norm(dim=1) for piece in self.W_dec.split(self.output_widths, dim=1)], 1)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the weights: equal weights in one dtype have equal fingerprints."""
        tensors: dict[str, Tensor] = {name.rpartition(".")[2]: each for name, each in self.named_parameters()}
        tensors["W_enc"] = tensors.pop("encoder").T
        return digits_of(tensors)

    # ---- use ----------------------------------------------------------------------------------------------------------

    def pre_activations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """(N(x) − b_dec) W_enc + b_enc, in the weights' dtype; of a matching pursuit those of its first step."""
        return functional.linear(self.inside(x), self.encoder, self.b_enc)

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """The codes of each row."""
        return self.activation.encode(self.inside(x), self.encoder, self.b_enc, self.W_dec)

    def decode(self, codes: SparseCodes, x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_out"]:
        """f W_dec + b_dec, and what of it depends on the input. Raises InputError when that is needed and not given."""
        return self.outside(codes.times(self.W_dec) + self.b_dec, x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction (or prediction) for activations of any leading shape, in their own dtype."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows), rows).to(x.dtype).view(*x.shape[:-1], self.d_out)

    def inside(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the encoder multiplies: N(x) − b_dec."""
        rows, _ = self._normalised(x.to(self.b_dec.dtype))
        return rows - self.b_dec if self.center else rows

    def outside(
        self, decoded: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """The output from f W_dec + b_dec: N⁻¹ of it, and the skip path. Raises InputError when x is needed and not given."""
        if self.W_skip is None and self.input_norm == "none":
            return decoded
        if x is None:
            what = "an input norm" if self.W_skip is None else "a skip path"
            raise InputError(f"A dictionary with {what} decodes only beside its input", fix="Pass x as well")
        x = x.to(self.b_dec.dtype)
        _, scales = self._normalised(x)
        if scales is not None:
            decoded = decoded * scales.std + scales.mean
        return decoded if self.W_skip is None else decoded + x @ self.W_skip

    def _normalised(self, x: Float[Tensor, "n d_in"]) -> tuple[Float[Tensor, "n d_in"], Scales | None]:
        if self.input_norm == "none":
            return x, None
        if self.input_norm == "layer_norm":  # as SAELens and OpenAI: the small number is in the way there alone
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            return (x - mean) / (std + _EPSILON), Scales(std, mean)
        std = x.norm(dim=1, keepdim=True) / self.d_in**0.5
        return x / std.clamp(min=torch.finfo(x.dtype).tiny), Scales(std, x.new_zeros(len(x), 1))

    # ---- the same dictionary in other units ----------------------------------------------------------------------------

    @torch.no_grad()
    def fold_scales(self, inputs: Float[Tensor, " d_in"], outputs: Float[Tensor, " d_out"]) -> None:
        """Make a dictionary that was trained on `inputs · x` and `outputs · y` work on x and y themselves.

        Where all scales are one number, the encoder and the decoder stay as they are.
        """
        mean = inputs.mean()
        self.encoder.mul_(inputs / mean)
        self.b_enc.div_(mean)
        self.activation.scale_(1 / mean)
        self.W_dec.mul_(mean / outputs)
        self.b_dec.div_(outputs)
        if self.W_skip is not None:
            self.W_skip.mul_(inputs[:, None] / outputs)

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Give every decoder row unit norm; its codes grow by what it had. Rows of zeros stay.

        The norm of a crosscoder's row is the sum of those at its points (Lindsey et al. 2024).
        """
        norms = self.point_norms().sum(1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.W_dec.div_(norms[:, None])
        self.encoder.mul_(norms[:, None])
        self.b_enc.mul_(norms)
        self.activation.scale_(norms)
