"""llamascopium (OpenMOSS; before, lm_saes): `config.json` with `sae_type`, and `sae_weights.safetensors` or `.pt`.

W_E [d, F], b_E, W_D [F, d], b_D, `activation_function.log_jumprelu_threshold`, and the mean norms of the activations,
`dataset_average_activation_norm.<point>`. b_D is not taken from the input. With `sparsity_include_decoder_norm` the gate looks
at pre · ‖W_D,i‖. A crosscoder's tensors have a leading axis of points; a cross-layer transcoder's `W_D.j` is what
layers 0 to j write to layer j. Read from llamascopium 2.0.0b34.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import Activation, GroupTopK, JumpReLU, ReLU, TopK
from microtome.dictionary.dictionary import Dictionary, InputNorm, Origin
from microtome.dictionary.formats.hooks import hub_model
from microtome.dictionary.formats.reading import (
    UNKNOWN,
    AnyDictionary,
    Format,
    Hints,
    Reading,
    Weights,
    build,
    build_cross_layer,
    fold_selection_norms,
    leftover,
)
from microtome.dictionary.formats.tensors import TensorFile, only_tensors, read_pickle, read_safetensors
from microtome.dictionary.formats.values import text, whole

CONFIG, MODEL, NAME = "config.json", "lm_config.json", "llamascopium"
# In the order in which its own loader looks for them.
_PLACES = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
WEIGHTS = tuple(f"{place}.{suffix}" for place in _PLACES for suffix in ("safetensors", "pt"))
_THRESHOLD, _NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."


@dataclass(frozen=True)
class _Source:
    """What the three readers share."""

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    origin: Origin
    notes: list[str]

    @property
    def has_bias(self) -> bool:
        return bool(self.config.get("use_decoder_bias", True))

    @property
    def by_norm(self) -> bool:
        return bool(self.config.get("sparsity_include_decoder_norm", True))


def detect(folder: Path) -> bool:
    """A config that says its `sae_type`."""
    return (folder / CONFIG).is_file() and "sae_type" in read_json(folder / CONFIG)


def read(folder: Path, hints: Hints) -> Reading:
    """An autoencoder or transcoder ("sae"), a crosscoder, or a cross-layer transcoder ("clt")."""
    config = read_json(folder / CONFIG)
    readers = {"sae": _sae, "crosscoder": _crosscoder, "clt": _cross_layer}
    kind = config.get("sae_type")
    if not isinstance(kind, str) or kind not in readers or config.get("use_glu_encoder"):
        got = "use_glu_encoder true" if config.get("use_glu_encoder") else f"sae_type {kind!r}"
        raise _refused(folder, got, " or ".join(readers))
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise _no_weights(folder)
    if weights.suffix == ".pt":
        values = read_pickle(weights)
        tensors = only_tensors(values["sae"] if isinstance(values.get("sae"), dict) else values)
    else:
        tensors = read_safetensors(weights)
    reads, writes = _points(config)
    origin = hints.applied(_origin(folder, config, reads, writes))
    source = _Source(folder, config, TensorFile(weights, tensors, CONFIG), reads, writes, origin, [])
    made = readers[kind](source)
    source.file.skip(*(name for name in tensors if name.startswith(_NORM)))
    source.file.refuse("activation_function.", "W_E_glu", "b_E_glu", *(() if source.has_bias else ("b_D",)))
    return Reading(dictionary=made, format=NAME, notes=(*dict.fromkeys(source.notes), *leftover(source.file.left)))


FORMAT = Format(name=NAME, looks=f"{CONFIG} with sae_type, and {WEIGHTS[0]}", detect=detect, read=read)


# ---- autoencoders and transcoders ---------------------------------------------------------------------------------------


def _sae(source: _Source) -> AnyDictionary:
    file = source.file
    d_in, d_sae = file.shape("W_E", 2)
    _check_width(source, d_in, d_sae)
    if len(source.reads) != 1 or len(source.writes) != 1:
        raise file.misfit("one point", f"{len(source.reads)} hook_point_in, {len(source.writes)} hook_point_out")
    W_dec = file.take("W_D", d_sae, d_in)
    made = build(
        source.folder,
        source.origin,
        _activation(source, W_dec.norm(dim=1), (d_sae,)),
        Weights(
            W_enc=file.take("W_E", d_in, d_sae),
            W_dec=W_dec,
            b_enc=file.take("b_E", d_sae),
            b_dec=file.take("b_D", d_in) if source.has_bias else None,
        ),
        center=False,
        input_norm=_token_norm(source),
    )
    _fold_selection(source, made)
    read, written = (_scale(source, point, d_in) for point in (*source.reads, *source.writes))
    made.fold_scales(torch.full((d_in,), read), torch.full((d_in,), written))
    return made


def _fold_selection(source: _Source, made: Dictionary) -> None:
    if isinstance(made.activation, TopK | GroupTopK) and source.by_norm:
        fold_selection_norms(made)
        source.notes.append("latents are chosen by pre · ‖W_D‖: the decoder norms were folded, each row has norm one")


def _token_norm(source: _Source) -> InputNorm:
    """Activations scaled one by one; every other way is folded or refused by `_scale`."""
    if source.config.get("norm_activation") != "token-wise":
        return "none"
    if source.origin.inputs != source.origin.outputs or len(source.origin.inputs) > 1:
        raise _refused(source.folder, "norm_activation 'token-wise' for several points", "dataset-wise or inference")
    return "constant_norm_rescale"


def _scale(source: _Source, point: str, d_model: int) -> float:
    """√d over the mean norm at a point, where activations were scaled by it in training."""
    way = source.config.get("norm_activation", "dataset-wise")
    if way in ("inference", "token-wise"):
        return 1.0
    if way != "dataset-wise":
        raise _refused(source.folder, f"norm_activation {way!r}", "dataset-wise, token-wise or inference")
    norm = source.file.take_if_there(f"{_NORM}{point}")
    if norm is None or norm <= 0:
        got = None if norm is None else norm.item()
        raise ArtifactError(f"{source.file.file} lacks the mean norm of {point}", got=got, expected=f"{_NORM}{point}")
    scale = float(d_model**0.5 / norm.item())
    source.notes.append(f"{point} was scaled by {scale:.6g} in training; folded into the weights")
    return scale


def _activation(source: _Source, norms: Tensor, shape: tuple[int, ...]) -> Activation:
    """ReLU, TopK or JumpReLU for the latents of `norms`; of JumpReLU the threshold of pre itself, not of pre · norm."""
    name = source.config.get("act_fn", "relu")
    if name == "relu":
        return ReLU()
    if name == "jumprelu":
        threshold = source.file.take(_THRESHOLD, *shape).exp().broadcast_to(norms.shape)
        if not source.by_norm:
            return JumpReLU(threshold.flatten().clone())
        # A latent that writes nothing is never above its threshold.
        never = torch.finfo(threshold.dtype).max
        return JumpReLU((threshold / norms).where(norms > 0, never).flatten())
    if name == "topk":
        return TopK(whole(source.folder / CONFIG, source.config, "top_k"))
    why = f"act_fn {name!r}"
    if name in ("batchtopk", "batchlayertopk"):
        why += ", whose codes depend on the batch: convert it to jumprelu in llamascopium"
    raise _refused(source.folder, why, "relu, jumprelu or topk")


# ---- several points -----------------------------------------------------------------------------------------------------


def _crosscoder(source: _Source) -> Dictionary:
    """Points × d inputs. Each point has its own gate (pre · its own decoder norm): where these differ, there is a latent for
    each point and feature, number point · F + feature, that reads all points and writes its own."""
    file = source.file
    heads, d_model, width = file.shape("W_E", 3)
    _check_width(source, d_model, width)
    if len(source.origin.inputs) != heads:
        raise file.misfit(f"{heads} points in W_E", f"{len(source.origin.inputs)} hook_points")
    W_enc = file.take("W_E", heads, d_model, width).flatten(0, 1)
    W_dec = file.take("W_D", heads, width, d_model)
    b_enc = file.take("b_E", heads, width).sum(0)
    shape = tuple(file.tensors[_THRESHOLD].shape) if _THRESHOLD in file else (width,)
    norms = W_dec.norm(dim=2)
    activation = _activation(source, norms, shape)
    if isinstance(activation, ReLU) or (norms == norms[:1]).all():
        decoder = W_dec.transpose(0, 1).flatten(1)
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold.detach().view(heads, width)[0].clone())
    else:
        if isinstance(activation, TopK):
            activation = GroupTopK(heads * activation.k, heads)
        decoder = torch.cat(
            [torch.cat([row if h == g else 0 * row for g in range(heads)], 1) for h, row in enumerate(W_dec)]
        )
        W_enc, b_enc = W_enc.repeat(1, heads), b_enc.repeat(heads)
        source.notes.append(
            f"the gates differ between the points: {heads} × {width} latents, one for each point and feature"
        )
    made = build(
        source.folder,
        source.origin,
        activation,
        Weights(
            W_enc=W_enc,
            W_dec=decoder,
            b_enc=b_enc,
            b_dec=file.take("b_D", heads, d_model).flatten(),
        ),
        center=False,
        input_norm=_token_norm(source),
    )
    _fold_selection(source, made)
    scales = torch.tensor([_scale(source, point, d_model) for point in source.reads])
    made.fold_scales(scales.repeat_interleave(d_model), scales.repeat_interleave(d_model))
    return made


def _cross_layer(source: _Source) -> AnyDictionary:
    file = source.file
    layers, d_model, width = file.shape("W_E", 3)
    _check_width(source, d_model, width)
    to_layer = [file.take(f"W_D.{j}", j + 1, width, d_model) for j in range(layers)]
    weights = {
        "encoder": file.take("W_E", layers, d_model, width).transpose(1, 2),
        "b_enc": file.take("b_E", layers, width),
        "b_dec": torch.zeros(layers, d_model),
    }
    if source.has_bias:
        weights["b_dec"] = torch.stack([file.take(f"b_D.{j}", d_model) for j in range(layers)])
    for layer in range(layers):
        weights[f"W_dec.{layer}"] = torch.stack([to_layer[j][layer] for j in range(layer, layers)], 1)
    if _token_norm(source) != "none":
        raise _refused(source.folder, "norm_activation 'token-wise'", "dataset-wise or inference")
    made = build_cross_layer(source.folder, source.origin, _cross_activation(source, weights, layers, width), weights)
    if source.by_norm and any(isinstance(each, TopK) for each in made.activations):
        silent = torch.stack([rows.flatten(1).norm(dim=1) for rows in made.W_dec]) == 0
        made.fold_decoder_norms()
        with torch.no_grad():  # a latent that writes nothing is never chosen there
            made.encoder[silent], made.b_enc[silent] = 0, 0
        source.notes.append("latents are chosen by pre · ‖W_D‖: the norms of all rows of a latent together were folded")
    read, written = (
        torch.tensor([_scale(source, point, d_model) for point in points]) for points in (source.reads, source.writes)
    )
    made.fold_scales(read, written)
    return made


def _cross_activation(
    source: _Source, weights: dict[str, Tensor], layers: int, width: int
) -> Activation | list[Activation]:
    norms = torch.stack([weights[f"W_dec.{layer}"].flatten(1).norm(dim=1) for layer in range(layers)])
    name = source.config.get("act_fn", "relu")
    if name not in ("topk", "layertopk"):
        return _activation(source, norms, (layers, width))
    k = whole(source.folder / CONFIG, source.config, "top_k")
    return TopK(k) if name == "layertopk" else [TopK(k) for _ in range(layers)]


# ---- its config -----------------------------------------------------------------------------------------------------------


def _no_weights(folder: Path) -> ArtifactError:
    """Says of a `.dcp` what it is: pickles are read with `weights_only` here, and its `.metadata` is one of classes."""
    distributed = next((place for place in _PLACES if (folder / f"{place}.dcp").exists()), None)
    if distributed is None:
        return ArtifactError(f"{folder} has no weights", got="none", expected=" or ".join(WEIGHTS))
    return ArtifactError(
        f"The weights at {folder} are a distributed checkpoint, which is not read here: its list of tensors is a pickle of "
        "Python objects",
        got=f"{distributed}.dcp (torch.distributed.checkpoint)",
        expected=" or ".join(WEIGHTS),
        fix="Where you trust it, write one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{distributed}.dcp {distributed}.pt",
    )


def _points(config: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is read and what is written, in each kind's own words."""
    reads = _listed(config.get("hook_point_in") or config.get("hook_points_in") or config.get("hook_points") or UNKNOWN)
    return reads, _listed(config.get("hook_point_out") or config.get("hook_points_out") or reads)


def _origin(folder: Path, config: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]) -> Origin:
    model = read_json(folder / MODEL) if (folder / MODEL).is_file() else config
    name = hub_model(text(model, "model_name") or UNKNOWN)
    return Origin(model_name=name, inputs=reads, outputs=writes, prepend_bos=bool(model.get("prepend_bos", True)))


def _listed(value: Any) -> tuple[str, ...]:
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else (str(value),)


def _check_width(source: _Source, d_model: int, d_sae: int) -> None:
    said, factor = source.config.get("d_model", d_model), source.config.get("expansion_factor", d_sae / d_model)
    if not all(isinstance(value, int | float) and value > 0 for value in (said, factor)):
        raise source.file.misfit(f"d_model {said!r}, expansion_factor {factor!r}", "positive numbers")
    if said != d_model or abs(said * factor - d_sae) >= 1:  # there int(d_model · expansion_factor)
        raise source.file.misfit(f"W_E of {d_sae} latents on {d_model}", f"{said * factor:g} latents on {said}")


def _refused(folder: Path, got: str, expected: str) -> ArtifactError:
    return ArtifactError(f"The dictionary at {folder} is of a kind that cannot be read", got=got, expected=expected)
