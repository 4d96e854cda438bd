"""Llama Scope as it was first published: `hyperparams.json` and `checkpoints/final.safetensors`, one JumpReLU threshold.

The weights are those of training, on activations scaled to mean norm √d at the input and at the output, each by its own
factor; both are folded. The threshold is in the units of the unscaled pre-activations, as SAELens's reader takes it. Source:
He et al. 2024, arXiv 2410.20526.
"""

from pathlib import Path
from typing import Any

import torch

from microtome.common.artifacts import read_json
from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import Activation, JumpReLU, ReLU, TopK
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import is_number, is_whole

CONFIG, NAME = "hyperparams.json", "llama_scope"
WEIGHTS = ("checkpoints/final.safetensors", "final.safetensors")


def detect(folder: Path) -> bool:
    """A folder with `hyperparams.json`."""
    return (folder / CONFIG).is_file()


def read(folder: Path, hints: Hints) -> Reading:
    """An autoencoder or a transcoder, on the model's own activations."""
    config = read_json(folder / CONFIG)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    file = TensorFile(weights, read_safetensors(weights), CONFIG)
    d_sae, d_in = file.shape("encoder.weight", 2)
    if (config.get("d_model", d_in), config.get("d_sae", d_sae)) != (d_in, d_sae):
        raise file.misfit(
            f"encoder.weight {(d_sae, d_in)}", f"{config.get('d_sae')} latents of size {config.get('d_model')}"
        )
    reads = str(config.get("hook_point_in") or UNKNOWN)
    writes = str(config.get("hook_point_out") or reads)
    scales = _scales(folder, config, d_in)
    made = build(
        folder,
        hints.applied(Origin(model_name=UNKNOWN, inputs=(reads,), outputs=(writes,), context=1024)),
        _activation(folder, config, d_sae, scales[0]),
        Weights(
            W_enc=file.take("encoder.weight", d_sae, d_in).T,
            W_dec=file.take("decoder.weight", d_in, d_sae).T,
            b_enc=file.take("encoder.bias", d_sae),
            b_dec=file.take_if_there("decoder.bias", d_in),
        ),
        center=bool(config.get("apply_decoder_bias_to_pre_encoder")) and reads == writes,
    )
    made.fold_scales(torch.full((d_in,), scales[0]), torch.full((d_in,), scales[1]))
    notes = (f"activations were scaled by {scales[0]:.6g} in training; folded into the weights",)
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks=f"{CONFIG} and {WEIGHTS[0]}", detect=detect, read=read)


def _scales(folder: Path, config: dict[str, Any], d_in: int) -> tuple[float, float]:
    norms = config.get("dataset_average_activation_norm")
    if config.get("norm_activation", "dataset-wise") == "inference":
        return 1.0, 1.0
    found = [norms.get(side) for side in ("in", "out")] if isinstance(norms, dict) else [None]
    if not all(is_number(norm) and norm > 0 for norm in found):
        raise ArtifactError(
            f"{folder / CONFIG} is damaged",
            got=f"dataset_average_activation_norm {norms!r}",
            expected="a positive norm for in and for out",
        )
    return d_in**0.5 / found[0], d_in**0.5 / found[1]


def _activation(folder: Path, config: dict[str, Any], d_sae: int, scale: float) -> Activation:
    name, threshold = config.get("act_fn", "jumprelu"), config.get("jump_relu_threshold")
    if name == "jumprelu" and is_number(threshold):
        return JumpReLU(torch.full((d_sae,), float(threshold) * scale))
    if name == "relu":
        return ReLU()
    if name == "topk" and is_whole(config.get("top_k")):
        return TopK(config["top_k"])
    raise ArtifactError(
        f"The dictionary at {folder} is of a kind that cannot be read",
        got=f"act_fn {name!r}, jump_relu_threshold {threshold!r}, top_k {config.get('top_k')!r}",
        expected="jumprelu with a threshold, relu, or topk with a positive integer top_k",
    )
