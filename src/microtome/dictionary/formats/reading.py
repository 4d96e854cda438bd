"""What every format's reader is given and gives back, and how it makes a Dictionary from tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary.activation import Activation
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary, InputNorm, Origin
from microtome.dictionary.formats.tensors import finite
from microtome.dictionary.temporal import TemporalDictionary

AnyDictionary = Dictionary | CrossLayerTranscoder | TemporalDictionary
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the caller knows and the files may not say. Each is used in place of what the files say."""

    model_name: str | None = None
    hook_name: str | None = None
    """The point that is read."""
    hook_name_out: str | None = None
    """The point that is written, of a transcoder."""
    norm_scaling_factor: float | None = None
    """√d over the mean norm of the activations, where the files say that they were scaled and not by how much."""
    centered: bool = False
    """Whether it was trained on a model whose residual stream has mean zero (`center_writing_weights`)."""

    def applied(self, origin: Origin) -> Origin:
        """The origin with what the hints know better."""
        inputs, outputs = origin.inputs, origin.outputs
        if self.hook_name is not None:
            if len(inputs) > 1:
                raise ConfigError("A hook_name can be given only to a dictionary of one point", got=", ".join(inputs))
            inputs, outputs = (self.hook_name,), (self.hook_name,) if outputs == inputs else outputs
        if self.hook_name_out is not None:
            outputs = (self.hook_name_out,)
        return replace(origin, model_name=self.model_name or origin.model_name, inputs=inputs, outputs=outputs)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A dictionary as it was read: the format's name, and what a user should know about it."""

    dictionary: AnyDictionary
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A dictionary's tensors; a bias that is not there is zero."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"] | None = None
    b_dec: Float[Tensor, " d_out"] | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format: how it is called and looks, whether a folder (or file) has it, and its reader."""

    name: str
    looks: str
    detect: Callable[[Path], bool]
    read: Callable[[Path, Hints], Reading]


def build(
    where: Path,
    origin: Origin,
    activation: Activation,
    weights: Weights,
    *,
    center: bool,
    input_norm: InputNorm = "none",
) -> Dictionary:
    """A Dictionary of these weights.

    Raises ArtifactError when they do not fit each other, hold NaN, or the activation does not fit them.
    """
    (d_in, d_sae), d_out = weights.W_enc.shape, weights.W_dec.shape[1]
    if d_in != d_out and origin.inputs == origin.outputs and UNKNOWN not in origin.inputs:
        raise ArtifactError(
            f"The weights at {where} do not fit each other",
            got=f"{d_in} inputs, {d_out} outputs",
            expected="an autoencoder's",
            fix="Of a transcoder give hook_name_out as well",
        )
    if input_norm != "none" and (origin.inputs != origin.outputs or len(origin.inputs) > 1):
        raise ArtifactError(
            f"The dictionary at {where} normalises its input in a way that only an autoencoder of one point can",
            got=input_norm,
        )
    try:
        made = Dictionary(
            d_in,
            d_sae,
            activation,
            origin=origin,
            d_out=d_out,
            center=center,
            skip=weights.W_skip is not None,
            input_norm=input_norm,
        )
    except ConfigError as error:
        raise ArtifactError(f"The dictionary at {where} cannot be: {error}") from error
    given: dict[str, Tensor | None] = {
        "encoder": weights.W_enc.T,
        "W_dec": weights.W_dec,
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
    }
    given["W_skip"] = weights.W_skip
    with torch.no_grad():
        for name, tensor in given.items():
            if tensor is not None:
                place = made.get_parameter(name)
                if place.shape != tensor.shape:
                    raise ArtifactError(
                        f"The weights at {where} do not fit each other",
                        got=f"{name} {tuple(tensor.shape)}",
                        expected=tuple(place.shape),
                    )
                place.copy_(tensor)
    check_activation(where, activation, d_sae)
    made.path = where
    return made


def build_cross_layer(
    folder: Path, origin: Origin, activation: Activation | list[Activation], weights: dict[str, Tensor]
) -> CrossLayerTranscoder:
    """A CrossLayerTranscoder of tensors called as its parameters are: encoder, b_enc, b_dec, W_dec.0, W_dec.1 …, and W_skip
    where it has a skip path."""
    layers, width, d_model = weights["encoder"].shape
    if len(origin.inputs) != layers:
        raise ArtifactError(
            f"The weights at {folder} do not fit the hook points", got=f"{layers} layers", expected=len(origin.inputs)
        )
    made = CrossLayerTranscoder(d_model, width, activation, origin=origin, skip="W_skip" in weights)
    for each in made.activations:
        assert isinstance(each, Activation)
        check_activation(folder, each, made.d_sae // len(made.activations))
    missing, unknown = made.load_state_dict(weights, strict=False)
    wrong = [name for name in (*missing, *unknown) if not name.startswith("activations.")]
    assert not wrong, wrong
    made.path = folder
    return made


def check_activation(where: Path, activation: Activation, d_sae: int) -> None:
    """Raise ArtifactError when an activation's own numbers are not one finite number a latent."""
    for name, tensor in activation.named_parameters():
        if tensor.shape != (d_sae,):
            raise ArtifactError(
                f"The weights at {where} do not fit each other",
                got=f"{name} {tuple(tensor.shape)}",
                expected=(d_sae,),
            )
        finite(name, tensor, where)


@torch.no_grad()
def fold_selection_norms(made: Dictionary) -> None:
    """For libraries that choose latents by pre · ‖W_dec,i‖: decoder rows of norm one, codes grown by the norm.

    A latent whose decoder row is zero is never chosen there, so its encoder becomes zero.
    """
    silent = made.W_dec.norm(dim=1) == 0
    made.fold_decoder_norms()
    made.encoder[silent] = 0
    made.b_enc[silent] = 0


@torch.no_grad()
def fold_centering(made: Dictionary) -> None:
    """Make a dictionary that was trained on activations less their mean over d_in work on the activations as they are.

    (P x − b_dec) W_enc with P = I − 11ᵀ/d is what it computes; P goes into W_enc, what it does to b_dec into b_enc. The
    output stays the centred one: LayerNorm takes no notice of the difference.
    """
    before = made.encoder @ made.b_dec if made.center else torch.zeros_like(made.b_enc)
    made.encoder.sub_(made.encoder.mean(1, keepdim=True))
    after = made.encoder @ made.b_dec if made.center else before
    _shift(made, after - before)


@torch.no_grad()
def fold_whitening(
    made: Dictionary,
    mean: Float[Tensor, " d_in"],
    matrix: Float[Tensor, "d_in d_in"],
    inverse: Float[Tensor, "d_in d_in"],
) -> None:
    """Make an autoencoder that was trained on z = (x − mean) M, and gave x̂ = ẑ M⁻¹ + mean, work on x itself."""
    made.encoder.copy_(made.encoder @ matrix.T)
    if not made.center:  # else the new b_dec takes the mean away
        _shift(made, -(made.encoder @ mean))
    made.W_dec.copy_(made.W_dec @ inverse)
    made.b_dec.copy_(made.b_dec @ inverse + mean)


def _shift(made: Dictionary, shift: Float[Tensor, " d_sae"]) -> None:
    """Add to every bias of the encoder: the magnitude path of a gated dictionary has one of its own beside the shared product."""
    made.b_enc.add_(shift)
    b_mag = getattr(made.activation, "b_mag", None)
    if b_mag is not None:
        b_mag.add_(shift * made.activation.get_parameter("r_mag").exp())


def only_file(path: Path, name: re.Pattern[str]) -> Path | None:
    """The file itself when it is called so, or the only one in a folder; else None."""
    if path.is_file():
        return path if name.fullmatch(path.name) else None
    found = [each for each in path.iterdir() if name.fullmatch(each.name)] if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def leftover(names: list[str]) -> tuple[str, ...]:
    """A note about tensors that no part of the format explains."""
    return (f"tensors that were not used: {', '.join(names)}",) if names else ()
