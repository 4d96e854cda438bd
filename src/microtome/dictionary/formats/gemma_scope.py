"""Gemma Scope: `params.npz` in `layer_L/width_W/average_l0_N`, JumpReLU without taking b_dec from the input.

The file says neither model nor point; both are read from the path, which on the hub is
`google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`. Autoencoders of `att` read the heads' outputs one behind
the other. Transcoders read `ln2.hook_normalized` and write `hook_mlp_out`: the norm's weight was folded into the MLP first, so
they read what the norm gives before its weight. Source: Lieberum et al. 2024, arXiv 2408.05147, appendix "Language model technical
details", and the model card of `google/gemma-scope-2b-pt-transcoders`.
"""

import re
from pathlib import Path

from microtome.dictionary.activation import JumpReLU
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, read_npz

WEIGHTS, NAME = "params.npz", "gemma_scope"
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d+)")
_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec"}


def detect(folder: Path) -> bool:
    """A folder with `params.npz`."""
    return (folder / WEIGHTS).is_file()


def read(folder: Path, hints: Hints) -> Reading:
    """An autoencoder or a transcoder."""
    tensors = {_NAMES.get(name, name): tensor for name, tensor in read_npz(folder / WEIGHTS).items()}
    file = TensorFile(folder / WEIGHTS, tensors, "the format")
    d_in, d_sae = file.shape("W_enc", 2)
    d_out = file.shape("W_dec", 2)[1]
    W_enc, W_dec = file.take("W_enc", d_in, d_sae), file.take("W_dec", d_sae, d_out)
    notes = []
    origin = _origin(folder)
    embedding = origin.inputs == ("hook_embed",)
    if embedding:  # trained on embeddings times √d, as Gemma's first block reads them
        W_enc, W_dec = W_enc / d_in**0.5, W_dec * d_in**0.5
        notes.append("of the embedding: √d_model was folded into the weights")
    if origin.inputs[0] == UNKNOWN and hints.hook_name is None:
        notes.append("the path does not name the release and the layer: give hook_name and model_name")
    made = build(
        folder,
        hints.applied(origin),
        JumpReLU(file.take("threshold", d_sae)),
        Weights(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=file.take("b_enc", d_sae),
            b_dec=file.take("b_dec", d_out),
        ),
        center=False,
    )
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks=f"{WEIGHTS} with W_enc, W_dec, b_enc, b_dec, threshold", detect=detect, read=read)


def _origin(folder: Path) -> Origin:
    path = folder.as_posix()
    release, layer = _REPOSITORY.search(path), _LAYER.search(path)
    model = UNKNOWN
    if release:
        model = f"google/gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
    if release and release[3] == "res" and "embedding" in path:
        return Origin(model_name=model, inputs=("hook_embed",), context=1024)
    if not release or not layer:
        return Origin(model_name=model, inputs=(UNKNOWN,))
    if release[3] == "transcoders":
        points = (f"blocks.{layer[1]}.ln2.hook_normalized",), (f"blocks.{layer[1]}.hook_mlp_out",)
        return Origin(model_name=model, inputs=points[0], outputs=points[1], context=1024)
    return Origin(model_name=model, inputs=(f"blocks.{layer[1]}.{_POINTS[release[3]]}",), context=1024)
