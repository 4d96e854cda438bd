"""sparsify (EleutherAI): a folder named after its module, with `cfg.json` and `sae.safetensors`; `config.json` beside it.

W_dec is [F, d], W_skip is [d, d] and used as x W_skipᵀ. A transcoder (`transcode`) reads the module's input and does not
take b_dec from it. Of several seeds each has a folder `seed0` … inside its module's. Read from sparsify 1.3.3.
"""

import re
from pathlib import Path
from typing import Any

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import GroupMax, TopK
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.hooks import into_module, of_module
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import whole

CFG, WEIGHTS, RUN, NAME = "cfg.json", "sae.safetensors", "config.json", "sparsify"
_NORM_BEHIND = re.compile(r"gemma-?[23]|olmo-?[23]", re.IGNORECASE)


def detect(folder: Path) -> bool:
    """Both files of the format."""
    return (folder / CFG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, hints: Hints) -> Reading:
    """An autoencoder or a transcoder, with or without a skip path."""
    cfg = read_json(folder / CFG)
    d_in, d_sae, k = _sizes(folder, cfg)
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax") or cfg.get("signed"):
        got = "signed codes" if cfg.get("signed") else f"activation {activation!r}"
        raise ArtifactError(f"The dictionary at {folder} is of a kind that cannot be read", got=got, expected="topk")
    file = TensorFile(folder / WEIGHTS, read_safetensors(folder / WEIGHTS), CFG)
    transcode = bool(cfg.get("transcode"))
    notes = []
    module = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    origin = _origin(module, transcode)
    if UNKNOWN in (*origin.inputs, *origin.outputs) and hints.hook_name is None:
        notes.append(f"the folder's name, {module.name!r}, is no module of a model: give hook_name")
    name = origin.outputs[0].rpartition(".")[2]
    if _NORM_BEHIND.search(hints.model_name or origin.model_name) and name in ("hook_mlp_out", "hook_attn_out"):
        notes.append(
            f"its output is the module's own, before the norm that this model has behind it; {name} is after it"
        )
    skip = file.take("W_skip", d_in, d_in) if cfg.get("skip_connection") else None
    file.refuse("W_skip")
    made = build(
        folder,
        hints.applied(origin),
        TopK(k) if activation == "topk" else GroupMax(k),
        Weights(
            W_enc=file.take("encoder.weight", d_sae, d_in).T,
            W_dec=file.take("W_dec", d_sae, d_in),
            b_enc=file.take("encoder.bias", d_sae),
            b_dec=file.take("b_dec", d_in),
            W_skip=None if skip is None else skip.T,
        ),
        center=not transcode,
    )
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks=f"{CFG} and {WEIGHTS}", detect=detect, read=read)


def _sizes(folder: Path, cfg: dict[str, Any]) -> tuple[int, int, int]:
    """d_in, the latents (`num_latents`, or where that is 0 d_in · expansion_factor), and k."""
    file = folder / CFG
    d_in, k = whole(file, cfg, "d_in"), whole(file, cfg, "k")
    if cfg.get("num_latents"):
        return d_in, whole(file, cfg, "num_latents"), k
    return d_in, d_in * whole(file, cfg, "expansion_factor"), k


def _origin(folder: Path, transcode: bool) -> Origin:
    file = next(
        (each / RUN for each in folder.parents[:2] if (each / RUN).is_file()), None
    )  # the best ones lie in best/
    run = read_json(file) if file else {}
    point = of_module(folder.name)
    context = run.get("ctx_len")
    return Origin(
        model_name=str(run.get("model") or UNKNOWN),
        inputs=(into_module(folder.name),) if transcode else (point,),
        outputs=(point if point != UNKNOWN else f"{UNKNOWN} output",) if transcode else (),
        context=context if isinstance(context, int) else None,
        dataset=run.get("dataset") if isinstance(run.get("dataset"), str) else None,
    )
