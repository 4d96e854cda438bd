"""Qwen Scope: a `layerN.sae.pt` for each layer, a TopK autoencoder of the stream behind that block.

`W_enc` [F, d], `W_dec` [d, F], `b_enc`, `b_dec`; b_dec is not taken from the input. Neither model nor k are in the file: the
repository's name has both (`Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`), so a folder of that name is looked for in the path.
Source: the model cards at huggingface.co/collections/Qwen/qwen-scope, and SAELens 6.54's reader of them.
"""

import re
from pathlib import Path

from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import TopK
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.formats.reading import Format, Hints, Reading, Weights, build, leftover, only_file
from microtome.dictionary.formats.tensors import TensorFile, only_tensors, read_pickle

NAME = "qwen_scope"
FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPO = re.compile(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)$")
_THOUSAND = 1024


def detect(path: Path) -> bool:
    """The file of one layer, or a folder with just one."""
    return only_file(path, FILE) is not None


def read(path: Path, hints: Hints) -> Reading:
    """The autoencoder of one layer."""
    weights = only_file(path, FILE)
    assert weights is not None
    model, width, k = _repository(weights)
    layer = FILE.fullmatch(weights.name)
    assert layer is not None
    file = TensorFile(weights, only_tensors(read_pickle(weights)), "the format")
    d_sae, d_in = file.shape("W_enc", 2)
    made = build(
        path,
        hints.applied(Origin(model_name=model, inputs=(f"blocks.{layer[1]}.hook_resid_post",))),
        TopK(k),
        Weights(
            W_enc=file.take("W_enc", d_sae, d_in).T,
            W_dec=file.take("W_dec", d_in, d_sae).T,
            b_enc=file.take("b_enc", d_sae),
            b_dec=file.take("b_dec", d_in),
        ),
        center=False,
    )
    notes = [f"k {k} is from the name of its folder"]
    if d_sae != width:
        notes.append(f"that name says {width:,} latents, and there are {d_sae:,}: is it the right one?")
    return Reading(dictionary=made, format=NAME, notes=(*notes, *leftover(file.left)))


FORMAT = Format(name=NAME, looks="layerN.sae.pt in a folder called SAE-Res-…-W32K-L0_50", detect=detect, read=read)


def _repository(file: Path) -> tuple[str, int, int]:
    """The model, the number of latents and k, from the nearest folder above that is called as the repository is."""
    for folder in file.absolute().parents:
        match = _REPO.search(folder.name)
        if match and int(match[3]) > 0:
            return f"Qwen/{match[1]}", int(match[2]) * _THOUSAND, int(match[3])
    raise ArtifactError(
        f"The dictionary at {file} does not say its k, which only the name of its repository has",
        got=file.absolute().parent.name,
        expected="a folder called as the repository, SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 say",
        fix="Put the file into a folder of its repository's name",
    )
