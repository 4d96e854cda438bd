"""Gemma Scope 2: `config.json` and `params.safetensors`, JumpReLU without taking b_dec from the input.

w_enc [d, F], b_enc, threshold [F], w_dec [F, d], b_dec, and for transcoders with `affine_connection` also
`affine_skip_connection` A [d, d], which adds x A. A folder is `layer_L_width_W_l0_S` inside the folder of its site (resid_post,
mlp_out, attn_out, transcoder, each also with `_all`).

Weakly causal crosscoders and cross-layer transcoders have a file for each layer, `params_layer_0.safetensors` …, whose w_dec
[F, layers, d] says what its latents write to each layer. Both are causal: nothing is written to a layer before. They become
a CrossLayerTranscoder; weights that are not causal become a Dictionary of all layers at once.

Source: McDougall et al. 2025, "Gemma Scope 2 - Technical Paper", 2.6 and 3.1; read from SAELens 6.54.12 and circuit-tracer 0.5.0.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import JumpReLU
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.reading import (
    UNKNOWN,
    AnyDictionary,
    Format,
    Hints,
    Reading,
    Weights,
    build,
    build_cross_layer,
    leftover,
)
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors

CONFIG, WEIGHTS, LAYER, NAME = "config.json", "params.safetensors", "params_layer_{}.safetensors", "gemma_scope_2"
KINDS = ("sae", "transcoder", "crosscoder", "clt")
_SKIP = "affine_skip_connection"
_MODULE = re.compile(r"^(?:model\.)?(?:language_model\.)?layers\.(\d+|\{[\d,\s]+\}|\{all\})\.(.+)$")
# Points of Hugging Face's Gemma 3, as its config names them.
_POINTS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
_IN, _OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
# What each site reads, where a folder has no config: as SAELens takes it from the path.
_SITES = {"resid_post": "output", "attn_out": "self_attn.o_proj.input", "mlp_out": _OUT, "transcoder": _IN, "clt": _IN}
_REPOSITORY = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)")


def detect(folder: Path) -> bool:
    """A folder with the weights of one layer, or of several."""
    return (folder / WEIGHTS).is_file() or (folder / LAYER.format(0)).is_file()


def read(folder: Path, hints: Hints) -> Reading:
    """An autoencoder, a transcoder, a crosscoder, or a cross-layer transcoder."""
    notes: list[str] = []
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
    else:
        config = _guess(folder)
        notes.append(f"no {CONFIG}: what it is and reads was taken from the path")
    kind = config.get("type", "sae")
    if config.get("architecture") != "jump_relu" or kind not in KINDS:
        raise ArtifactError(
            f"The dictionary at {folder} is of a kind that cannot be read",
            got=f"architecture {config.get('architecture')!r}, type {kind!r}",
            expected=f"jump_relu, and {', '.join(KINDS)}",
        )
    several = (folder / LAYER.format(0)).is_file()
    if several != (kind in ("crosscoder", "clt")) or several == (folder / WEIGHTS).is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("params*.safetensors")))
        what = CONFIG if (folder / CONFIG).is_file() else "path, by which it is read without a config.json"
        raise ArtifactError(f"{folder} does not fit its {what}", got=f"{found} of the type {kind!r}")
    made = (_several if several else _single)(folder, config, hints, notes)
    return Reading(dictionary=made, format=NAME, notes=tuple(notes))


FORMAT = Format(
    name=NAME,
    looks=f"{CONFIG} and {WEIGHTS} or {LAYER.format(0)} with w_enc, w_dec, threshold",
    detect=detect,
    read=read,
)


def _single(folder: Path, config: dict[str, Any], hints: Hints, notes: list[str]) -> AnyDictionary:
    file = TensorFile(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), CONFIG)
    d_in, d_sae = file.shape("w_enc", 2)
    d_out = file.shape("w_dec", 2)[1]
    _check_width(file, config, d_sae)
    made = build(
        folder,
        hints.applied(_origin(folder, config, None, hints, notes)),
        JumpReLU(file.take("threshold", d_sae)),
        Weights(
            W_enc=file.take("w_enc", d_in, d_sae),
            W_dec=file.take("w_dec", d_sae, d_out),
            b_enc=file.take("b_enc", d_sae),
            b_dec=file.take("b_dec", d_out),
            W_skip=_skip(file, config, d_in, d_out),
        ),
        center=False,
    )
    notes.extend(leftover(file.left))
    return made


def _several(folder: Path, config: dict[str, Any], hints: Hints, notes: list[str]) -> AnyDictionary:
    layers = len(list(folder.glob(LAYER.format("*"))))
    files = [
        TensorFile(folder / LAYER.format(i), read_safetensors(folder / LAYER.format(i)), CONFIG) for i in range(layers)
    ]
    d_model, width = files[0].shape("w_enc", 2)
    _check_width(files[0], config, layers * width)
    origin = _origin(folder, config, layers, hints, notes)
    if len(origin.inputs) != layers:
        raise files[0].misfit(f"weights of {layers} layers", f"{len(origin.inputs)} layers")
    W_dec = [file.take("w_dec", width, layers, d_model) for file in files]
    skips = [_skip(file, config, d_model, d_model) for file in files]
    weights = {
        "encoder": torch.stack([file.take("w_enc", d_model, width).T for file in files]),
        "b_enc": torch.stack([file.take("b_enc", width) for file in files]),
        "b_dec": torch.stack([file.take("b_dec", d_model) for file in files]),
    }
    activation = JumpReLU(torch.cat([file.take("threshold", width) for file in files]))
    notes.extend(leftover(sorted({name for file in files for name in file.left})))
    given = [skip for skip in skips if skip is not None]
    if all(not rows[:, :layer].any() for layer, rows in enumerate(W_dec)):
        weights |= {f"W_dec.{layer}": rows[:, layer:] for layer, rows in enumerate(W_dec)}
        weights |= {"W_skip": torch.stack(given)} if given else {}
        return build_cross_layer(folder, hints.applied(origin), activation, weights)
    notes.append(
        f"latents write to earlier layers too: a dictionary of all {layers} layers at once, whose encoder is {layers} times as "
        "large as in the files, nearly all of it zeros"
    )
    return build(
        folder,
        hints.applied(origin),
        activation,
        Weights(
            W_enc=torch.block_diag(*(encoder.T for encoder in weights["encoder"])),
            W_dec=torch.cat([rows.flatten(1) for rows in W_dec]),
            b_enc=weights["b_enc"].flatten(),
            b_dec=weights["b_dec"].flatten(),
            W_skip=torch.block_diag(*given) if given else None,
        ),
        center=False,
    )


def _skip(file: TensorFile, config: dict[str, Any], d_in: int, d_out: int) -> Tensor | None:
    """The affine path, which is there exactly where the config says so."""
    if bool(config.get("affine_connection")) != (_SKIP in file):
        said = f"affine_connection {config.get('affine_connection')!r}"
        raise file.misfit(f"{'a' if _SKIP in file else 'no'} tensor {_SKIP}", said)
    return file.take_if_there(_SKIP, d_in, d_out)


def _check_width(file: TensorFile, config: dict[str, Any], latents: int) -> None:
    """`width` counts the latents of all layers."""
    if config.get("width", latents) != latents:
        raise file.misfit(f"{latents} latents", f"width {config['width']!r}")


# ---- where it belongs -------------------------------------------------------------------------------------------------------


def _origin(folder: Path, config: dict[str, Any], layers: int | None, hints: Hints, notes: list[str]) -> Origin:
    said, across = config.get("hf_hook_point_out"), config.get("type") in ("transcoder", "clt")
    model = _model(folder, config)
    reads = _points(config.get("hf_hook_point_in"), layers)
    writes = _points(said, layers) if said is not None or across else reads
    if not reads or len(reads) != len(writes):
        reads = (UNKNOWN,) * (layers or 1)
        writes = tuple(f"{UNKNOWN} output" for _ in reads) if across else reads
        notes.extend(_unknown(model, layers, across, hints))
    return Origin(model_name=model, inputs=reads, outputs=writes, context=1024)


def _unknown(model: str, layers: int | None, across: bool, hints: Hints) -> tuple[str, ...]:
    """A note about what neither the files nor the hints say; hints name the points of one layer alone."""
    known = {
        "hook_name": hints.hook_name is not None,
        "hook_name_out": hints.hook_name_out is not None or not across,
        "model_name": hints.model_name is not None or model != UNKNOWN,
    }
    missing = [name for name, said in known.items() if not said]
    what = "set `.origin`" if layers else f"give {' and '.join(missing)}"
    return (f"where it belongs is not known: {what}",) if missing else ()


def _points(said: object, layers: int | None) -> tuple[str, ...]:
    """`model.layers.{5,9}.output` → `blocks.5.hook_resid_post`, `blocks.9.hook_resid_post`; none for a name of another form."""
    match = _MODULE.match(str(said))
    if not match or match[2] not in _POINTS:
        return ()
    numbers = list(range(layers or 0)) if match[1] == "{all}" else [int(n) for n in re.findall(r"\d+", match[1])]
    return tuple(f"blocks.{number}.{_POINTS[match[2]]}" for number in numbers)


def _model(folder: Path, config: dict[str, Any]) -> str:
    """The hub's id; the smallest model's has no -pt there."""
    release = _REPOSITORY.search(folder.as_posix())
    said = config.get("model_name") or (f"gemma-3-{release[1]}-{release[2]}" if release else None)
    if not isinstance(said, str):
        return UNKNOWN
    name = said.replace("-v3", "-3").replace("270m-pt", "270m")
    return name if "/" in name else f"google/{name}"


def _guess(folder: Path) -> dict[str, Any]:
    """What the path says: its site, its layers, and `_affine` at its end."""
    sites = [part.removesuffix("_all") for part in folder.parts]
    kind = next((part for part in reversed(sites) if part in (*_SITES, "crosscoder")), "")
    numbers = re.search(r"layer_(\d+(?:_\d+)*)", folder.name)
    where = "{all}" if kind == "clt" else "{" + numbers[1].replace("_", ",") + "}" if numbers else UNKNOWN
    point = f"model.layers.{where}."
    config: dict[str, Any] = {"architecture": "jump_relu", "affine_connection": folder.name.endswith("_affine")}
    config["type"] = kind if kind in KINDS else "sae"
    config["hf_hook_point_in"] = point + _SITES.get(kind, "output" if kind == "crosscoder" else UNKNOWN)
    config["hf_hook_point_out"] = point + _OUT if kind in ("transcoder", "clt") else config["hf_hook_point_in"]
    return config
