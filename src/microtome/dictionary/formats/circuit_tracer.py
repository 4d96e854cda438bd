"""Transcoders as circuit-tracer saves and `mwhanna/qwen3-*-transcoders` publishes them: a `layer_N.safetensors` for each layer.

`W_enc` [F, d], `W_dec` [F, d], `b_enc`, `b_dec`, for JumpReLU `activation_function.threshold` [F], and with a skip path
`W_skip` [d, d], of which x W_skipᵀ is added. `config.yaml` beside them names the model and the points of a block, and where
it has a list `transcoders`, as in `mntss/gemma-scope-transcoders`, each layer's file, wherever that is. Read from circuit-tracer
0.5.0 (`single_layer_transcoder.py`, `hf_utils.py`). Its models are not folded (`fold_ln=False`): `mlp.hook_in` is behind the
norm's weight and `ln2.hook_normalized` before it (`utils/tl_nnsight_mapping.py`). The releases for Qwen 3 read the first; the
largest of them has no config, and SAELens takes its points to be the others'.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import Activation, JumpReLU, ReLU
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.hooks import hub_model, in_block
from microtome.dictionary.formats.mntss import CONFIG, CONFIG_KEYS
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover, only_file
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import damaged, read_yaml, texts_of

NAME = "circuit_tracer"
FILE = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_QWEN3 = re.compile(r"qwen3-([\d.]+)b-transcoders")
_QWEN3_POINTS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def detect(path: Path) -> bool:
    """The file of one layer, or a folder with just one."""
    return only_file(path, FILE) is not None


def read(path: Path, hints: Hints) -> Reading:
    """The transcoder of one layer."""
    weights = only_file(path, FILE)
    assert weights is not None
    layer = FILE.fullmatch(weights.name)
    assert layer is not None
    file = TensorFile(weights, read_safetensors(weights), "the format")
    d_sae, d_model = file.shape("W_enc", 2)
    skip = file.take_if_there("W_skip", d_model, d_model)
    activation = _activation(file, d_sae)
    file.refuse("log_threshold", "threshold", "activation_function")
    origin, notes = _origin(weights.parent, layer[1])
    made = build(
        path,
        hints.applied(origin),
        activation,
        Weights(
            W_enc=file.take("W_enc", d_sae, d_model).T,
            W_dec=file.take("W_dec", d_sae, d_model),
            b_enc=file.take("b_enc", d_sae),
            b_dec=file.take("b_dec", d_model),
            W_skip=None if skip is None else skip.T,
        ),
        center=False,
    )
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks="layer_N.safetensors and config.yaml", detect=detect, read=read)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A transcoder that `config.yaml` names: `hf://owner/repo/file`, or a path."""

    name: str
    hints: Hints


def listed(folder: Path) -> list[Listed]:
    """The transcoders of layers 0, 1, … that the folder's `config.yaml` names, in whatever format each is; none where it
    names none. Raises ArtifactError where they cannot be opened one by one."""
    file = folder / CONFIG
    config = read_yaml(file)
    said, names = texts_of(file, config, *CONFIG_KEYS, "model_kind"), config.get("transcoders") or []
    if not isinstance(names, list):
        raise damaged(file, "transcoders", names, "a list")
    if not names:
        return []
    if said.get("model_kind", "transcoder_set") != "transcoder_set":
        raise ArtifactError(
            f"{file} names the files of a dictionary that reads several layers",
            got=f"model_kind {said['model_kind']}",
            fix=f"Open the folder of its files, {str(names[0]).rpartition('/')[0]}, with load_cross_layer_transcoder",
        )
    odd = next(
        (name for name in names if not isinstance(name, str) or not (name.startswith("hf://") or _there(folder, name))),
        None,
    )
    if odd is not None:
        raise ArtifactError(
            f"{file} names a transcoder that cannot be opened",
            got=odd,
            expected="a list of hf://owner/repo/file, or of files on this disk",
            fix="Open the files one by one with load_dictionary, and put them together with DictionarySet",
        )
    reads, writes = said.get("feature_input_hook"), said.get("feature_output_hook")
    return [
        Listed(
            name=name if name.startswith("hf://") else str(_there(folder, name)),
            hints=Hints(
                model_name=hub_model(said["model_name"]) if "model_name" in said else None,
                hook_name=in_block(layer, reads) if reads else None,
                hook_name_out=in_block(layer, writes) if writes else None,
            ),
        )
        for layer, name in enumerate(names)
    ]


def _there(folder: Path, name: str) -> Path | None:
    """The file of this name, beside the config or from where we are."""
    try:
        return next((path for path in (folder / name, Path(name)) if path.exists()), None)
    except OSError:  # no name of a file
        return None


def _activation(file: TensorFile, d_sae: int) -> Activation:
    threshold = file.take_if_there(_THRESHOLD, d_sae)
    if threshold is None:
        return ReLU()
    if bool((threshold < 0).any()):
        raise ArtifactError(
            f"The dictionary at {file.file} is of a kind that cannot be read: its codes could be below zero",
            got=f"{_THRESHOLD} down to {float(threshold.min()):.3g}",
            expected="thresholds of zero or above",
        )
    return JumpReLU(threshold)


def _origin(folder: Path, layer: str) -> tuple[Origin, list[str]]:
    """From config.yaml, which is kept beside the layers."""
    said = texts_of(folder / CONFIG, read_yaml(folder / CONFIG), *CONFIG_KEYS)
    notes = []
    release = None if said else _QWEN3.search(folder.as_posix())
    if release:
        said = {"model_name": f"Qwen/Qwen3-{release[1]}B", **_QWEN3_POINTS}
        notes.append(f"{CONFIG} is not there: model and points are taken to be those of the other releases for Qwen 3")
    reads, writes = said.get("feature_input_hook"), said.get("feature_output_hook")
    if reads is None or writes is None:
        missing = "does not name both hook points" if said else "is not there"
        notes.append(f"{CONFIG} {missing}: give hook_name, hook_name_out and model_name")
    origin = Origin(
        model_name=hub_model(said.get("model_name", UNKNOWN)),
        inputs=(in_block(layer, reads) if reads else UNKNOWN,),
        outputs=(in_block(layer, writes) if writes else f"{UNKNOWN} output",),
    )
    return origin, notes
