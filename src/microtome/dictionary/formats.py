"""Dictionaries on disk, in SAELens v6's format: `cfg.json` and `sae_weights.safetensors`, which SAELens opens as they
are.

Microtome adds its own `config.json` (how it was trained) and `provenance.json` beside them; a folder without those,
made by SAELens, is read all the same.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from microtome.common.artifacts import atomic_file, read_json, write_json
from microtome.common.assets import shipped_or
from microtome.common.device import parse_device, parse_dtype
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import TopK
from microtome.dictionary.dictionary import Dictionary, Origin

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT_VERSION = "6.0.0"  # the oldest SAELens whose reader takes this layout


def save_dictionary(sae: Dictionary, folder: Path) -> None:
    """Write both files of the format into an existing folder. Weights are written in their own dtype."""
    origin = sae.origin
    cfg: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _FORMAT_VERSION,
            "model_name": origin.model_name,
            "hook_name": sae.hook_name,
            "hook_head_index": None,
            "context_size": origin.context,
            "prepend_bos": origin.prepend_bos,
            "dataset_path": origin.dataset,
        },
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(sae).items()}
    with atomic_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_json(folder / CFG, cfg)


def _tensors(sae: Dictionary) -> dict[str, Tensor]:
    return {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}


def load_dictionary(path: str | Path, *, device: str = "cpu", dtype: str = "fp32") -> Dictionary:
    """Open the dictionary in the folder `path`; the name `"demo"` opens the one that ships with Microtome.

    Raises ArtifactError for a folder that holds none, is damaged, or holds an architecture that cannot be read here.
    """
    folder = shipped_or(path, "dictionary")
    if not (folder / CFG).is_file():
        raise ArtifactError(
            f"There is no dictionary at {folder}",
            got=f"a folder without {CFG}" if folder.is_dir() else "no such folder",
            expected=f"a folder with {CFG} and {WEIGHTS} (SAELens v6)",
        )
    cfg = read_json(folder / CFG)
    _check_cfg(folder, cfg)
    tensors = _read_weights(folder / WEIGHTS, cfg)
    metadata = cfg.get("metadata") or {}
    origin = Origin(
        model_name=str(metadata.get("model_name") or "unknown"),
        inputs=(str(metadata.get("hook_name") or "unknown"),),
        context=metadata.get("context_size"),
        prepend_bos=bool(metadata.get("prepend_bos", True)),
        dataset=metadata.get("dataset_path"),
    )
    sae = Dictionary(cfg["d_in"], cfg["d_sae"], TopK(cfg["k"]), origin=origin)
    sae.path = folder
    with torch.no_grad():
        sae.encoder.copy_(tensors["W_enc"].T)
        for name in ("W_dec", "b_enc", "b_dec"):
            sae.get_parameter(name).copy_(tensors[name])
    return sae.requires_grad_(False).to(device=parse_device(device), dtype=parse_dtype(dtype))


def _check_cfg(folder: Path, cfg: dict[str, Any]) -> None:
    wanted = {
        "architecture": ("topk",),
        "apply_b_dec_to_input": (True,),
        "normalize_activations": ("none", None),
        "reshape_activations": ("none", None),
        "rescale_acts_by_decoder_norm": (False, None),
    }
    for key, values in wanted.items():
        if cfg.get(key) not in values:
            raise ArtifactError(
                f"The dictionary at {folder} is of a kind that cannot be read yet",
                got=f"{key} {cfg.get(key)!r}",
                expected=values[0],
            )
    for key in ("d_in", "d_sae", "k"):
        if not isinstance(cfg.get(key), int):
            raise ArtifactError(f"{folder / CFG} is damaged", got=f"{key} {cfg.get(key)!r}", expected="an integer")


def _read_weights(file: Path, cfg: dict[str, Any]) -> dict[str, Tensor]:
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    if not file.is_file():
        raise ArtifactError(f"{file.parent} has no weights", expected=file.name)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise ArtifactError(f"{file} does not fit its {CFG}", got=f"{name} {found}", expected=f"{name} {shape}")
    return tensors
