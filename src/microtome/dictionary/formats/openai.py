"""OpenAI's GPT-2 autoencoders: one `.pt` with the state dict, which is read with `weights_only`.

`pre_bias, encoder.weight [F, d], latent_bias, decoder.weight [d, F]`, the activation's class by name, and its k. The input is
layer-normalised exactly when the activation is TopK, as in their `Autoencoder.from_state_dict`. The file names neither
model nor point; their storage does: `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`. Source: Gao et al. 2024, arXiv
2406.04093, and `model.py`, `paths.py` and the README of github.com/openai/sparse_autoencoder.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import Activation, ReLU, TopK
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, only_tensors, read_pickle
from microtome.dictionary.formats.values import is_whole

NAME = "openai"
_OTHERS = re.compile(
    r"ae(_\d+)?\.pt|layer\d+\.sae\.pt|sae_weights\.pt|trainer_state\.pt|(lr_scheduler|optimizer|rank)_\d+(_state)?\.pt|state\.pt"
)
_PLACE = re.compile(r"gpt2-small/(\w+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt$")
_POINTS = {  # of the README of their repository
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
_FIGURES = "metrics.json"  # what `microtome evaluate` leaves: metrics.json, 8.pt-metrics.json
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def detect(path: Path) -> bool:
    """A `.pt` file that is no other format's, or a folder with just one and no config."""
    return _file(path) is not None


def read(path: Path, hints: Hints) -> Reading:
    """An autoencoder of any of their versions."""
    weights = _file(path)
    assert weights is not None
    values = read_pickle(weights)
    file = TensorFile(weights, only_tensors(values), "the format")
    d_sae, d_in = file.shape("encoder.weight", 2)
    W_enc = file.take("encoder.weight", d_sae, d_in).T
    W_dec, tied = _decoder(file, W_enc)
    activation = _activation(weights, values)
    file.skip(*_STATISTICS)
    norm = isinstance(activation, TopK)
    notes = ["the input is layer-normalised"] if norm else []
    notes += ["encoder and decoder are tied"] if tied else []
    origin = _origin(weights)
    if hints.hook_name is None and origin.inputs == (UNKNOWN,):
        notes.append("the file does not name the hook point: give hook_name and model_name")
    made = build(
        path,
        hints.applied(origin),
        activation,
        Weights(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=file.take("latent_bias", d_sae),
            b_dec=file.take("pre_bias", d_in),
        ),
        center=True,
        input_norm="layer_norm" if norm else "none",
    )
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(
    name=NAME, looks="one .pt with pre_bias, encoder.weight, latent_bias, decoder.weight", detect=detect, read=read
)


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".pt" and not _OTHERS.fullmatch(path.name) else None
    files = [file for file in path.glob("*.pt") if not _OTHERS.fullmatch(file.name)]
    configs = [file for file in path.glob("*.json") if not file.name.endswith(_FIGURES)]
    return files[0] if len(files) == 1 and not configs else None


def _decoder(file: TensorFile, W_enc: Tensor) -> tuple[Tensor, bool]:
    """W_dec [F, d], and whether it is the encoder's: then the file has the encoder's weight a second time."""
    d_in, d_sae = W_enc.shape
    if "decoder.linear.weight" not in file:
        return file.take("decoder.weight", d_in, d_sae).T, False
    twin = file.take("decoder.linear.weight", d_sae, d_in)
    if not torch.equal(twin, W_enc.T):
        raise file.misfit("a tied decoder that differs from the encoder", "decoder.linear.weight as encoder.weight")
    return twin, True


def _origin(file: Path) -> Origin:
    """From the place in their storage."""
    match = _PLACE.search(file.as_posix())
    if not match or match[1] not in _POINTS:
        return Origin(model_name=UNKNOWN, inputs=(UNKNOWN,), context=64)
    return Origin(model_name="gpt2", inputs=(f"blocks.{match[2]}.{_POINTS[match[1]]}",), context=64)


def _activation(file: Path, values: dict[str, Any]) -> Activation:
    name, said = values.get("activation", "ReLU"), values.get("activation_state_dict")
    state = dict(said) if isinstance(said, dict) else {}
    if name == "ReLU":
        return ReLU()
    if name == "TopK" and state.get("postact_fn") == "ReLU" and is_whole(state.get("k")):
        return TopK(state["k"])
    raise ArtifactError(
        f"The dictionary at {file} is of a kind that cannot be read",
        got=f"activation {name!r} with {state or said}",
        expected="ReLU, or TopK with a positive integer k and ReLU after it",
    )
