"""`TemporalDictionary`: codes of what is new at a token, given what attention over the codes before predicts of it.

    r = N(x) − b_dec
    for each layer of attention:
        z = ReLU(g r W_enc)      p = ReLU(attention of z_t to z_0 … z_{t−1})        r ← r − (proj. of r on p W_dec)
    f = activation(g r W_enc)    ŷ = N⁻¹(f W_dec + (N(x) − b_dec − r) + b_dec)        g = scale / 4 d_in

(Lubana et al. 2025, "Priors in Time", arXiv 2511.01836; the details, as g, the 1e-6 beside the norm and the zeros that the
first token attends to, are those of SAELens 6.54, `temporal_sae.py`.) Only f is sparse and has a meaning; the predicted part
is dense and is not shown as features.

So codes depend on the tokens before, and are no function of one activation alone. All that looks back is in `in_context`:
it puts beside each activation what is predicted of it. `encode` and `decode` take such rows, each for itself, so that
whatever chooses, masks or shuffles rows can do so after it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.dictionary.activation import Activation, ReLU, TopK
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.dictionary import Dictionary, InputNorm, digits_of

_EPSILON = 1e-6  # beside a norm, in units of the activations that it was trained on
_TOKENS = 2048  # of so many at a time are there dense codes


class CodeAttention(nn.Module):
    """Causal attention from each token's dense codes to those of the tokens before; before the first there are zeros.

    Queries and keys have `d_attn` numbers for all heads together, values all d_sae; the parameters are called as in
    SAELens, and begin as zeros.
    """

    def __init__(self, d_sae: int, n_heads: int, d_attn: int) -> None:
        super().__init__()
        require(n_heads > 0 and d_attn > 0, "There is at least one head", got=f"{n_heads} heads, d_attn {d_attn}")
        require(
            d_sae % n_heads == 0 and d_attn % n_heads == 0,
            "All heads are equally large",
            got=f"{n_heads} heads, d_sae {d_sae}, d_attn {d_attn}",
        )
        self.n_heads, self.d_attn = n_heads, d_attn
        self.k_ctx, self.q_target = _zeros(d_sae, d_attn), _zeros(d_sae, d_attn)
        self.v_ctx, self.c_proj = _zeros(d_sae, d_sae), _zeros(d_sae, d_sae)

    def forward(self, z: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
        """What the codes before say of each token's."""
        before = functional.pad(z, (0, 0, 1, -1))
        parts = self.q_target(z), self.k_ctx(before), self.v_ctx(before)
        q, k, v = (part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        predicted: Tensor = self.c_proj(found.transpose(1, 2).flatten(2))
        return predicted


def _zeros(d_in: int, d_out: int) -> nn.Linear:
    made: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


class TemporalDictionary(nn.Module):
    """`novel` is the dictionary of what is new, an autoencoder with ReLU or TopK, whose encoder reads `gain` times that;
    `attention` the layers that predict the rest. `scale` is what the activations were multiplied by in training: W_dec and
    b_dec are divided by it already.

    d_in is the width of an activation; the rows of `encode` and `decode` have twice that: the activation, then what is
    predicted of it.
    """

    architecture = "temporal"
    is_transcoder = False

    def __init__(self, novel: Dictionary, attention: Sequence[CodeAttention], *, scale: float = 1.0) -> None:
        super().__init__()
        require(
            isinstance(novel.activation, ReLU | TopK) and not novel.activation.signed,
            "The new codes are those of a ReLU or a TopK",
            got=novel.activation.name,
        )
        require(
            not novel.is_transcoder and novel.W_skip is None and len(novel.origin.inputs) == 1,
            "A temporal dictionary is an autoencoder of one hook point",
            got=f"{', '.join(novel.origin.inputs)} to {', '.join(novel.origin.outputs)}",
        )
        sizes = sorted({(each.n_heads, each.d_attn, each.v_ctx.in_features) for each in attention})
        require(
            len(sizes) == 1 and sizes[0][2] == novel.d_sae and novel.d_sae % sizes[0][1] == 0,
            "The layers of attention are alike, and d_sae a multiple of their d_attn",
            got=f"d_sae {novel.d_sae}, heads, d_attn and d_sae of the layers {', '.join(map(str, sizes)) or 'none'}",
        )
        require(
            scale == 1 or (scale > 0 and novel.input_norm == "none"),
            "scale is positive, and 1 where the input is normalised",
            got=f"scale {scale}, input_norm {novel.input_norm}",
        )
        self.novel, self.attention, self.scale = novel, nn.ModuleList(attention), scale
        self.origin, self.path = novel.origin, Path()  # whoever opens it from a folder says which
        self.d_in, self.d_out, self.d_sae = novel.d_in, novel.d_out, novel.d_sae

    # ---- what it is ---------------------------------------------------------------------------------------------------

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:  # noqa: N802 - the field's name
        """What each latent adds to the output."""
        return self.novel.W_dec

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        return self.novel.b_dec

    @property
    def layers(self) -> list[CodeAttention]:
        """The layers of attention."""
        return [each for each in self.attention if isinstance(each, CodeAttention)]

    @property
    def activation(self) -> Activation:
        return self.novel.activation

    @property
    def gain(self) -> float:
        """What the encoder's inputs are multiplied by. It is no part of the weights: small dtypes could not hold them."""
        return self.scale / (4 * self.d_in)

    @property
    def center(self) -> bool:
        """Whether b_dec is taken from the input."""
        return self.novel.center

    @property
    def input_norm(self) -> InputNorm:
        return self.novel.input_norm

    @property
    def k(self) -> int | None:
        """How many new latents are kept on each token, where the activation fixes that."""
        return self.novel.k

    @property
    def model_name(self) -> str:
        return self.origin.model_name

    @property
    def hook_name(self) -> str:
        """The one hook point that it reads and writes."""
        return self.origin.inputs[0]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the weights, the scale and the heads: equal ones in one dtype have equal
        fingerprints."""
        about = f"{self.novel.fingerprint} {self.scale} {[each.n_heads for each in self.layers]}"
        return digits_of(dict(self.attention.named_parameters()), about)

    # ---- use ----------------------------------------------------------------------------------------------------------

    def in_context(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_row"]:
        """Rows for `encode` and `decode` from whole sequences, from their first token on: each activation, and behind it
        what is predicted of it, in units of N(x). Raises InputError for activations of another shape."""
        if x.ndim != 3 or x.shape[2] != self.d_in:
            raise InputError(
                "A temporal dictionary reads whole sequences", got=list(x.shape), expected=f"[batch, pos, {self.d_in}]"
            )
        x = x.to(self.b_dec.dtype)
        inside = self.novel.inside(x.flatten(0, 1)).view_as(x)
        at_once = max(1, _TOKENS // max(1, x.shape[1]))
        return torch.cat([x, torch.cat([self._predicted(part) for part in inside.split(at_once)])], -1)

    def _predicted(self, inside: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """What attention says of each token. Squares of norms leave small dtypes, so the projection is in float32 at least."""
        rest = inside
        for layer in self.layers:
            codes = layer(functional.linear(rest * self.gain, self.novel.encoder).relu()).relu()
            p = codes @ self.W_dec
            wide, whole = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (p, rest))
            norm = wide.norm(dim=-1, keepdim=True) + _EPSILON / self.scale
            rest = (whole - (wide * whole).sum(-1, keepdim=True) / norm.square() * wide).to(inside.dtype)
        return inside - rest

    def encode(self, rows: Float[Tensor, "n d_row"]) -> SparseCodes:
        """The codes of what is new in each row. Raises InputError for rows that are not of `in_context`."""
        x, predicted = self._split(rows)
        novel = self.novel
        rest = novel.inside(x) - predicted
        return novel.activation.encode(rest * self.gain, novel.encoder, novel.b_enc, novel.W_dec)

    def decode(self, codes: SparseCodes, rows: Float[Tensor, "n d_row"] | None = None) -> Float[Tensor, "n d_out"]:
        """f W_dec and what is predicted. Raises InputError where the rows are not given, or not of `in_context`."""
        if rows is None:
            raise InputError("A temporal dictionary decodes only beside its input", fix="Pass the rows as well")
        x, predicted = self._split(rows)
        return self.novel.outside(codes.times(self.W_dec) + predicted + self.b_dec, x)

    def forward(self, x: Float[Tensor, "*batch pos d_in"]) -> Float[Tensor, "*batch pos d_out"]:
        """The reconstruction of one sequence or several, in their own dtype."""
        rows = self.in_context(x.reshape(-1, *x.shape[-2:])).flatten(0, 1)
        return self.decode(self.encode(rows), rows).to(x.dtype).view(x.shape)

    def _split(self, rows: Float[Tensor, "n d_row"]) -> tuple[Tensor, Tensor]:
        """The activations, and what is predicted of them."""
        if rows.shape[1] != 2 * self.d_in:
            raise InputError(
                "The codes of a temporal dictionary depend on the tokens before",
                got=f"rows of width {rows.shape[1]}",
                expected=f"{2 * self.d_in}: the activation and what is predicted of it",
                fix="Give whole sequences to in_context, and its rows to encode",
            )
        x, predicted = rows.to(self.b_dec.dtype).split(self.d_in, 1)
        return x, predicted
