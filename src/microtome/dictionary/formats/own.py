"""Microtome's own cfg for what SAELens cannot hold: crosscoders, cross-layer transcoders, GroupMax, TopK transcoders …

The two files are SAELens's; `architecture` begins with `microtome_`, which SAELens refuses by name, and the key `microtome`
says all that the tensors do not. They are called as the parameters of the classes are, W_enc as the field has it.
"""

from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from microtome.common.artifacts import read_json
from microtome.common.config import from_dict, to_dict
from microtome.common.errors import ArtifactError, ConfigError
from microtome.dictionary.activation import AbsTopK, Activation, Gated, GroupMax, GroupTopK, JumpReLU, ReLU, TopK
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary, InputNorm, Origin
from microtome.dictionary.formats.reading import (
    AnyDictionary,
    Format,
    Hints,
    Reading,
    Weights,
    build,
    build_cross_layer,
    leftover,
)
from microtome.dictionary.formats.saelens_cfg import CFG, read_pursuit
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import damaged, flag, table, whole
from microtome.dictionary.pursuit import MatchingPursuit

KEY, NAME, VERSION = "microtome", "microtome", 1
WEIGHTS = "sae_weights.safetensors"
_NUMBERS = ("k", "groups", "max_iterations", "residual_threshold", "stop_on_duplicate_support")
_TENSORS = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}


def detect(folder: Path) -> bool:
    """Both files, and the key that Microtome writes."""
    return (folder / CFG).is_file() and (folder / WEIGHTS).is_file() and KEY in read_json(folder / CFG)


def cfg_of(made: Dictionary | CrossLayerTranscoder) -> dict[str, Any]:
    """The cfg.json of any dictionary."""
    cross = isinstance(made, CrossLayerTranscoder)
    several = not cross and len(made.origin.inputs) > 1
    facts: dict[str, Any] = {
        "format": VERSION,
        "kind": "cross_layer_transcoder" if cross else "dictionary",
        "origin": to_dict(made.origin),
    }
    if isinstance(made, CrossLayerTranscoder):
        facts["activations"] = [_describe(each) for each in made.activations if isinstance(each, Activation)]
        facts["skip"] = made.W_skip is not None
    else:
        facts["activations"] = [_describe(made.activation)]
        facts |= {"center": made.center, "skip": made.W_skip is not None, "input_norm": made.input_norm}
    return {
        "architecture": f"microtome_{made.architecture}{'_crosscoder' if several else ''}",
        "d_in": made.d_in,
        "d_out": made.d_out,
        "d_sae": made.d_sae,
        "dtype": str(made.b_dec.dtype).removeprefix("torch."),
        KEY: facts,
    }


def tensors_of(made: Dictionary | CrossLayerTranscoder) -> dict[str, Tensor]:
    """Every parameter by name."""
    tensors: dict[str, Tensor] = dict(made.named_parameters())
    if isinstance(made, Dictionary):
        tensors["W_enc"] = tensors.pop("encoder").T
        return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def read(folder: Path, hints: Hints) -> Reading:
    """What `save_dictionary` wrote, exactly."""
    cfg = read_json(folder / CFG)
    facts = cfg[KEY]
    if not isinstance(facts, dict) or facts.get("format") != VERSION:
        got = facts.get("format") if isinstance(facts, dict) else facts
        raise ArtifactError(f"{folder / CFG} has another format version", got=got, expected=VERSION)
    file = TensorFile(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), CFG)
    try:
        origin = from_dict(Origin, table(folder / CFG, facts, "origin"))
        kinds = facts["activations"]
        if not isinstance(kinds, list) or not all(isinstance(kind, dict) for kind in kinds):
            raise damaged(folder / CFG, "activations", kinds, "a list of objects")
        first = kinds[0]
        made: AnyDictionary
        if facts["kind"] == "cross_layer_transcoder":
            skip = flag(folder / CFG, facts, "skip", missing=False)  # older ones could not have one
            made = _cross_layer(folder, file, origin, kinds, skip=skip)
        else:
            made = _dictionary(folder, file, origin, first, cfg, facts)
    except (LookupError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{folder / CFG} is damaged: {error}") from error
    file.refuse("threshold", "r_mag", "b_mag", "W_skip", "activations.")
    made.origin = hints.applied(origin)
    return Reading(dictionary=made, format=NAME, notes=leftover(file.left))


FORMAT = Format(
    name=NAME,
    looks=f"{CFG} with the key {KEY!r}, and {WEIGHTS}",
    detect=detect,
    read=read,
)


def _describe(activation: Activation) -> dict[str, Any]:
    numbers = {key: getattr(activation, key) for key in _NUMBERS if hasattr(activation, key)}
    return {"name": activation.name, **numbers}


def _activation(file: TensorFile, said: dict[str, Any], prefix: str, d_sae: int) -> Activation:
    name = said["name"]
    tensors = [file.take(f"{prefix}{tensor}", d_sae) for tensor in _TENSORS.get(name, ())]
    match name:
        case "relu":
            return ReLU()
        case "topk":
            return TopK(whole(file.file, said, "k"))
        case "abstopk":
            return AbsTopK(whole(file.file, said, "k"))
        case "grouptopk":
            return GroupTopK(whole(file.file, said, "k"), whole(file.file, said, "groups"))
        case "groupmax":
            return GroupMax(whole(file.file, said, "k"))
        case "jumprelu":
            return JumpReLU(*tensors)
        case "gated":
            return Gated(*tensors)
        case "matching_pursuit":
            return MatchingPursuit(**vars(read_pursuit(file.file, said, whole(file.file, said, "max_iterations"))))
    known = "relu, topk, abstopk, grouptopk, groupmax, jumprelu, gated or matching_pursuit"
    raise ConfigError("Unknown activation", got=name, expected=known)


def _dictionary(
    folder: Path,
    file: TensorFile,
    origin: Origin,
    activation: dict[str, Any],
    cfg: dict[str, Any],
    facts: dict[str, Any],
) -> Dictionary:
    d_in, d_out, d_sae = (whole(folder / CFG, cfg, key) for key in ("d_in", "d_out", "d_sae"))
    center, skip, norm = flag(folder / CFG, facts, "center"), flag(folder / CFG, facts, "skip"), facts["input_norm"]
    if norm not in get_args(InputNorm):
        raise damaged(folder / CFG, "input_norm", norm, f"one of {', '.join(get_args(InputNorm))}")
    return build(
        folder,
        origin,
        _activation(file, activation, "", d_sae),
        Weights(
            W_enc=file.take("W_enc", d_in, d_sae),
            W_dec=file.take("W_dec", d_sae, d_out),
            b_enc=file.take("b_enc", d_sae),
            b_dec=file.take("b_dec", d_out),
            W_skip=file.take("W_skip", d_in, d_out) if skip else None,
        ),
        center=center,
        input_norm=norm,
    )


def _cross_layer(
    folder: Path, file: TensorFile, origin: Origin, kinds: list[dict[str, Any]], *, skip: bool
) -> CrossLayerTranscoder:
    layers, width, d_model = file.shape("encoder", 3)
    latents = layers * width // len(kinds)
    activations = [_activation(file, said, f"activations.{i}.", latents) for i, said in enumerate(kinds)]
    weights = {"encoder": file.take("encoder", layers, width, d_model), "b_enc": file.take("b_enc", layers, width)}
    weights["b_dec"] = file.take("b_dec", layers, d_model)
    weights |= {f"W_dec.{i}": file.take(f"W_dec.{i}", width, layers - i, d_model) for i in range(layers)}
    if skip:
        weights["W_skip"] = file.take("W_skip", layers, d_model, d_model)
    return build_cross_layer(folder, origin, activations[0] if len(kinds) == 1 else activations, weights)
