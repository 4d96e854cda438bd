"""Cross-layer transcoders as circuit-tracer saves and `mntss/clt-*` publishes them: a pair of files for each layer.

`W_enc_l.safetensors` holds W_enc_l [F, d], b_enc_l [F], b_dec_l [d], for JumpReLU threshold_l [F] and, where there is a
skip path, W_skip_l [d, d], which is added as x W_skip_l; `W_dec_l.safetensors` holds W_dec_l [F, L − l, d]. `config.yaml`
names the model and the points of a block. Read from circuit-tracer 0.5.0 and, for the skip path, its later sources
(`cross_layer_transcoder.py`: `to_safetensors`, `compute_reconstruction`).
"""

from pathlib import Path

import torch
from torch import Tensor

from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import JumpReLU, ReLU
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.hooks import hub_model, in_block
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, build_cross_layer, leftover
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import read_yaml, texts_of

CONFIG, NAME = "config.yaml", "clt"
CONFIG_KEYS = ("model_name", "feature_input_hook", "feature_output_hook")
READS, WRITES = "hook_resid_mid", "hook_mlp_out"  # circuit-tracer's defaults


def detect(folder: Path) -> bool:
    """The pair of the first layer."""
    return all((folder / f"{name}_0.safetensors").is_file() for name in ("W_enc", "W_dec"))


def read(folder: Path, hints: Hints) -> Reading:
    """A CrossLayerTranscoder of as many layers as there are files."""
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    files = [
        TensorFile(
            folder / f"W_enc_{layer}.safetensors",
            {
                **read_safetensors(folder / f"W_enc_{layer}.safetensors"),
                **read_safetensors(folder / f"W_dec_{layer}.safetensors"),
            },
            "the other layers",
        )
        for layer in range(layers)
    ]
    width, d_model = files[0].shape("W_enc_0", 2)
    thresholds = _of_all(folder, "thresholds", [f.take_if_there(f"threshold_{i}", width) for i, f in enumerate(files)])
    skips = _of_all(
        folder, "skip paths", [f.take_if_there(f"W_skip_{i}", d_model, d_model) for i, f in enumerate(files)]
    )
    weights = {
        "encoder": _stack(files, "W_enc", width, d_model),
        "b_enc": _stack(files, "b_enc", width),
        "b_dec": _stack(files, "b_dec", d_model),
    }
    for layer, file in enumerate(files):
        weights[f"W_dec.{layer}"] = file.take(f"W_dec_{layer}", width, layers - layer, d_model)
    if skips:
        weights["W_skip"] = torch.stack(skips)
    said = texts_of(folder / CONFIG, read_yaml(folder / CONFIG), *CONFIG_KEYS)
    missing = f"{CONFIG} does not name both points" if (folder / CONFIG).is_file() else f"no {CONFIG}"
    known = {"feature_input_hook", "feature_output_hook"} <= said.keys()
    notes = [] if known else [f"{missing}: the points that are not named are taken to be {READS} and {WRITES}"]
    reads = hints.hook_name or said.get("feature_input_hook", READS)
    writes = hints.hook_name_out or said.get("feature_output_hook", WRITES)
    origin = Origin(
        model_name=hints.model_name or hub_model(said.get("model_name", UNKNOWN)),
        inputs=tuple(in_block(i, reads) for i in range(layers)),
        outputs=tuple(in_block(i, writes) for i in range(layers)),
    )
    made = build_cross_layer(folder, origin, JumpReLU(torch.cat(thresholds)) if thresholds else ReLU(), weights)
    for file in files:
        file.refuse("W_skip", "threshold")
    left = leftover([name for file in files for name in file.left])
    return Reading(dictionary=made, format=NAME, notes=(*notes, *left))


FORMAT = Format(
    name=NAME, looks="W_enc_0.safetensors, W_dec_0.safetensors, … and config.yaml", detect=detect, read=read
)


def _stack(files: list[TensorFile], name: str, *shape: int) -> Tensor:
    return torch.stack([file.take(f"{name}_{layer}", *shape) for layer, file in enumerate(files)])


def _of_all(folder: Path, what: str, found: list[Tensor | None]) -> list[Tensor]:
    """What all layers have, or an empty list where none has it. Raises ArtifactError where only some have."""
    given = [each for each in found if each is not None]
    if 0 < len(given) < len(found):
        raise ArtifactError(
            f"Some layers at {folder} have {what} and others have none", got=f"{len(given)} of {len(found)} layers"
        )
    return given
