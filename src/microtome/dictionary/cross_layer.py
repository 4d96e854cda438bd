"""`CrossLayerTranscoder`: latents that read one layer and write that layer and all later ones.

    f^l = activation(x^l W_enc^l + b_enc^l)        ŷ^j = Σ_{l ≤ j} f^l W_dec^{l→j} + b_dec^j + x^j W_skip^j

(Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub/2025/attribution-graphs/methods.html.) x and y are the
activations of all L points one behind the other; latent i of layer l has the number l · width + i. W_skip is a linear path
beside the latents, from each layer's input to its own output, which some have (circuit-tracer saves such ones).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.config import require
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.activation import Activation
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.dictionary import Origin, digits_of


class CrossLayerTranscoder(nn.Module):
    """L = len(origin.inputs) layers of `width` latents each, on activations of size `d_model`.

    `encoder` [L, width, d_model] holds each W_enc^l transposed; `W_dec[l]` [width, L − l, d_model] is what layer l's latents
    write to layers l, l+1, …; `activation` is one for all L · width latents, or one a layer; `W_skip` [L, d_model, d_model]
    is there with `skip`.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        activation: Activation | Sequence[Activation],
        *,
        origin: Origin,
        skip: bool = False,
    ) -> None:
        super().__init__()
        layers = len(origin.inputs)
        require(
            len(origin.outputs) == layers,
            "A cross-layer transcoder writes as many points as it reads",
            got=f"{layers} inputs, {len(origin.outputs)} outputs",
        )
        activations = [activation] if isinstance(activation, Activation) else list(activation)
        require(
            len(activations) in (1, layers)
            and (layers == 1 or isinstance(activation, Activation) or len(activations) > 1),
            "A cross-layer transcoder has one activation for all latents or one a layer",
            got=len(activations),
            expected=f"1 or {layers}",
        )
        require(
            all(each.at_once for each in activations),
            "A cross-layer transcoder has codes of pre-activations",
            got=", ".join(each.name for each in activations),
        )
        self.n_layers, self.d_model, self.width = layers, d_model, width
        self.d_in = self.d_out = layers * d_model
        self.d_sae = layers * width
        for each in activations:
            each.check(self.d_sae // len(activations))
        self.origin, self.path = origin, Path()
        self.activations = nn.ModuleList(activations)
        self.encoder = nn.Parameter(torch.zeros(layers, width, d_model))
        self.W_dec = nn.ParameterList([torch.zeros(width, layers - layer, d_model) for layer in range(layers)])
        self.b_enc = nn.Parameter(torch.zeros(layers, width))
        self.b_dec = nn.Parameter(torch.zeros(layers, d_model))
        self.W_skip = nn.Parameter(torch.zeros(layers, d_model, d_model)) if skip else None

    # ---- what it is ---------------------------------------------------------------------------------------------------

    architecture = "cross_layer_transcoder"
    is_transcoder = True

    @property
    def k(self) -> int | None:
        """How many latents are kept on each row in all layers, where the activations fix that."""
        ks = [getattr(each, "k", None) for each in self.activations]
        return sum(k for k in ks if k is not None) if None not in ks else None

    @property
    def model_name(self) -> str:
        return self.origin.model_name

    @property
    def hook_name(self) -> str:
        """Raises ConfigError unless it reads only one point."""
        if self.n_layers > 1:
            raise ConfigError(
                "This needs a dictionary of one hook point",
                got=f"a cross-layer transcoder of {self.n_layers} points",
            )
        return self.origin.inputs[0]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the weights: equal weights in one dtype have equal fingerprints."""
        return digits_of(dict(self.named_parameters()))

    # ---- use ----------------------------------------------------------------------------------------------------------

    def pre_activations(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """x^l W_enc^l + b_enc^l of all layers, in the weights' dtype."""
        layers = x.to(self.b_dec.dtype).unflatten(1, (self.n_layers, self.d_model))
        return (torch.einsum("nld,lfd->nlf", layers, self.encoder) + self.b_enc).flatten(1)

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """The codes of each row over all L · width latents."""
        pre, bias = self.pre_activations(x), self.b_enc.flatten()
        if len(self.activations) == 1:
            return self._codes(0, pre, bias)
        parts = [
            self._codes(layer, pre[:, rows], bias[rows]) for layer, rows in enumerate(map(self._slice, self._layers()))
        ]
        indices = torch.cat([part.indices + layer * self.width for layer, part in enumerate(parts)], 1)
        return SparseCodes(indices, torch.cat([part.values for part in parts], 1), self.d_sae)

    def decode(self, codes: SparseCodes, x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_out"]:
        """The prediction for all layers: each latent's decoder rows for its own and all later layers, plus b_dec. Only a
        skip path needs `x`. Raises InputError where it is not given, and for codes of another dictionary."""
        if codes.d_sae != self.d_sae:
            raise InputError("These codes are of another dictionary", got=f"{codes.d_sae} latents", expected=self.d_sae)
        n = len(codes.values)
        total = self.b_dec.flatten().repeat(n, 1)
        source = torch.where(codes.values == 0, -1, codes.indices // self.width)
        for layer in self._layers():
            rows, places = (source == layer).nonzero(as_tuple=True)
            latents = codes.indices[rows, places] - layer * self.width
            starts = functional.pad(torch.bincount(rows, minlength=n).cumsum(0), (1, 0))[:n]
            weight = self.W_dec[layer].flatten(1)
            values = codes.values[rows, places]
            written = functional.embedding_bag(latents, weight, starts, per_sample_weights=values, mode="sum")
            total[:, layer * self.d_model :] += written
        if self.W_skip is None:
            return total
        inputs = self._needed(x).unflatten(1, (self.n_layers, self.d_model))
        return total + torch.einsum("nld,ldo->nlo", inputs, self.W_skip).flatten(1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The prediction for activations of any leading shape, in their own dtype."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows), rows).to(x.dtype).view(*x.shape[:-1], self.d_out)

    @torch.no_grad()
    def fold_scales(self, inputs: Float[Tensor, " layers"], outputs: Float[Tensor, " layers"]) -> None:
        """Make one that was trained on `inputs[l] · x^l` and `outputs[l] · y^l` work on x and y themselves. The codes stay."""
        self.encoder.mul_(inputs[:, None, None])
        self.b_dec.div_(outputs[:, None])
        if self.W_skip is not None:
            self.W_skip.mul_((inputs / outputs)[:, None, None])
        for layer in self._layers():
            self.W_dec[layer].div_(outputs[layer:, None])

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Give every latent's decoder rows, those for all layers together, unit norm; its codes grow by what they had. Rows
        of zeros stay."""
        norms = torch.stack([rows.flatten(1).norm(dim=1) for rows in self.W_dec])
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        self.encoder.mul_(norms[..., None])
        self.b_enc.mul_(norms)
        for rows, of_layer in zip(self.W_dec, norms, strict=True):
            rows.div_(of_layer[:, None, None])
        for activation, factor in zip(self._activations, norms.flatten().chunk(len(self.activations)), strict=True):
            activation.scale_(factor)

    # ---- layer by layer -----------------------------------------------------------------------------------------------

    @property
    def by_layer(self) -> bool:
        """Whether a layer's codes depend on its own input alone; not where one TopK chooses among the latents of all."""
        return self.n_layers == 1 or len(self.activations) > 1 or self.k is None

    def layer_latents(self) -> list[slice]:
        """The latents that read each layer."""
        return [self._slice(layer) for layer in self._layers()]

    def sources(self, layer: int) -> range:
        """The layers whose latents write to this one."""
        return range(layer + 1)

    def encode_layer(self, layer: int, x: Float[Tensor, "n d_model"]) -> SparseCodes:
        """The codes of one layer over its own `width` latents. Raises ConfigError unless `by_layer`."""
        require(
            self.by_layer,
            "The layers of this cross-layer transcoder cannot be encoded one by one",
            got=f"one choice of {self.k} latents among those of {self.n_layers} layers",
        )
        bias = self.b_enc[layer]
        pre = functional.linear(x.to(bias.dtype), self.encoder[layer], bias)
        return self._activation_of(layer).codes(pre, bias)

    def decode_layer(
        self, layer: int, codes: Sequence[SparseCodes], x: Float[Tensor, "n d_model"] | None = None
    ) -> Float[Tensor, "n d_model"]:
        """The prediction for one layer from the codes of its `sources`."""
        written = [
            each.times(self.W_dec[source][:, layer - source])
            for source, each in zip(self.sources(layer), codes, strict=True)
        ]
        out = torch.stack(written).sum(0) + self.b_dec[layer]
        return out if self.W_skip is None else out + self._needed(x) @ self.W_skip[layer]

    def layer_activations(self) -> list[Activation]:
        """An activation for each layer. One that chooses among the latents of all layers (TopK) chooses in each."""
        return [self._activation_of(layer) for layer in self._layers()]

    def _activation_of(self, layer: int) -> Activation:
        one_each = len(self._activations) == self.n_layers
        return self._activations[layer] if one_each else self._activations[0].of_latents(self._slice(layer))

    def _needed(self, x: Float[Tensor, "n d"] | None) -> Float[Tensor, "n d"]:
        if x is None:
            raise InputError("A dictionary with a skip path decodes only beside its input", fix="Pass x as well")
        return x.to(self.b_dec.dtype)

    @property
    def _activations(self) -> list[Activation]:
        return [each for each in self.activations if isinstance(each, Activation)]

    def _layers(self) -> range:
        return range(self.n_layers)

    def _slice(self, layer: int) -> slice:
        return slice(layer * self.width, (layer + 1) * self.width)

    def _codes(self, which: int, pre: Float[Tensor, "n f"], bias: Float[Tensor, " f"]) -> SparseCodes:
        return self._activations[which].codes(pre, bias)
