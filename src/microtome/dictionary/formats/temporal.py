"""Temporal dictionaries, as SAELens saves them and as their authors released them.

SAELens's cfg.json and safetensors are read by `saelens.py`, which leaves the rest to `build_temporal`. The release has for
each layer a folder with `conf.yaml` and `latest_ckpt.safetensors`, where W_dec, W_enc and b_dec are called D, E and b. The
encoder's product is divided by 4 d_in; where `tied_weights` says so W_enc is W_decᵀ, and b_dec is in the output only if it is
taken from the input. Source: SAELens 6.54, `temporal_sae.py` and its loader of huggingface.co/canrager/temporalSAEs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.common.errors import ArtifactError
from microtome.dictionary.activation import ReLU, TopK
from microtome.dictionary.dictionary import InputNorm, Origin
from microtome.dictionary.formats.reading import UNKNOWN, Format, Hints, Reading, Weights, build, leftover
from microtome.dictionary.formats.tensors import TensorFile, read_safetensors
from microtome.dictionary.formats.values import damaged, flag, is_number, is_whole, read_yaml, table, text, whole
from microtome.dictionary.temporal import CodeAttention, TemporalDictionary

NAME, CONF, WEIGHTS = "temporal", "conf.yaml", "latest_ckpt.safetensors"
_OURS = {"D": "W_dec", "E": "W_enc", "b": "b_dec"}
_DEFAULTS = {
    "n_heads": 8,
    "n_attn_layers": 1,
    "bottleneck_factor": 64,
    "sae_diff_type": "topk",
    "tied_weights": True,
    "activation_normalization_factor": 1.0,
}
_LARGEST = 1e30


@dataclass(frozen=True, kw_only=True)
class TemporalCfg:
    """What a config says of a temporal dictionary alone; `k` None is a ReLU."""

    n_heads: int
    n_layers: int
    bottleneck: int
    k: int | None
    tied: bool
    factor: float
    """What the activations are multiplied by, where their normalisation is `constant_scalar_rescale`."""


def read_saelens(file: Path, said: Mapping[str, Any]) -> TemporalCfg:
    """The keys of SAELens's cfg.json, with its defaults for those that are not there. A TopK without k is a ReLU there."""
    cfg = {**_DEFAULTS, **said}
    if cfg["sae_diff_type"] == "topk" and cfg.get("kval_topk") is None:
        cfg["sae_diff_type"] = "relu"
    return read_temporal(file, cfg, "activation_normalization_factor")


def read_temporal(file: Path, cfg: Mapping[str, Any], factor: str) -> TemporalCfg:
    """The keys of a temporal dictionary, with that of its scale. Raises ArtifactError where one is not there or cannot be."""
    kind = cfg.get("sae_diff_type")
    if kind not in ("relu", "topk"):
        raise ArtifactError(
            f"The temporal dictionary of {file} is of a kind that cannot be read",
            got=f"sae_diff_type {kind!r}",
            expected="relu or topk",
        )
    return TemporalCfg(
        n_heads=whole(file, cfg, "n_heads"),
        n_layers=whole(file, cfg, "n_attn_layers"),
        bottleneck=whole(file, cfg, "bottleneck_factor"),
        k=whole(file, cfg, "kval_topk") if kind == "topk" else None,
        tied=flag(file, cfg, "tied_weights"),
        factor=_positive(file, cfg, factor),
    )


def _positive(file: Path, cfg: Mapping[str, Any], key: str) -> float:
    value = cfg.get(key)
    if not is_number(value) or not 0 < value < _LARGEST:
        raise damaged(file, key, value, "a positive number")
    return float(value)


def build_temporal(  # noqa: PLR0913 – what a config says beside the keys of this kind alone
    where: Path,
    origin: Origin,
    file: TensorFile,
    cfg: TemporalCfg,
    *,
    d_in: int,
    d_sae: int,
    center: bool,
    scale: float = 1.0,
    input_norm: InputNorm = "none",
) -> TemporalDictionary:
    """The dictionary of tensors called as SAELens calls them, for activations that were multiplied by `scale` in training
    and are not in use. Raises ArtifactError for tensors that do not fit."""
    if d_sae % (cfg.n_heads * cfg.bottleneck):
        raise ArtifactError(
            f"The attention of the dictionary at {where} cannot be",
            got=f"d_sae {d_sae}, {cfg.n_heads} heads, bottleneck_factor {cfg.bottleneck}",
            expected="d_sae a multiple of their product",
        )
    W_dec, b_dec = file.take("W_dec", d_sae, d_in), file.take("b_dec", d_in)
    W_enc = W_dec.T if cfg.tied else file.take("W_enc", d_in, d_sae)
    novel = build(
        where,
        origin,
        ReLU() if cfg.k is None else TopK(cfg.k),
        Weights(
            W_enc=W_enc,
            W_dec=W_dec / scale,
            b_dec=b_dec / scale if center or not cfg.tied else None,
        ),
        center=center,
        input_norm=input_norm,
    )
    layers = [_attention(file, f"attn_layers.{i}.", cfg, d_sae) for i in range(cfg.n_layers)]
    made = TemporalDictionary(novel, layers, scale=scale)
    made.path = where
    return made


def _attention(file: TensorFile, start: str, cfg: TemporalCfg, d_sae: int) -> CodeAttention:
    made = CodeAttention(d_sae, cfg.n_heads, d_sae // cfg.bottleneck)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(file.take(f"{start}{name}", *parameter.shape))
    return made


# ---- writing ----------------------------------------------------------------------------------------------------------------


def cfg_of_temporal(made: TemporalDictionary) -> dict[str, Any]:
    """The keys of SAELens's cfg.json that are of this kind alone."""
    attention = made.layers[0]
    return {
        "architecture": made.architecture,
        "n_heads": attention.n_heads,
        "n_attn_layers": len(made.layers),
        "bottleneck_factor": made.d_sae // attention.d_attn,
        "sae_diff_type": "relu" if made.k is None else "topk",
        "kval_topk": made.k,
        "tied_weights": False,
        "normalize_activations": made.input_norm if made.scale == 1 else "constant_scalar_rescale",
        "activation_normalization_factor": made.scale,
    }


def tensors_of_temporal(made: TemporalDictionary) -> dict[str, Tensor]:
    """The tensors beside it, with the scale taken out of the weights."""
    tensors = {
        "W_enc": made.novel.W_enc,
        "W_dec": made.W_dec * made.scale,
        "b_dec": made.b_dec * made.scale,
    }
    return tensors | {f"attn_layers.{name}": tensor for name, tensor in made.attention.named_parameters()}


# ---- the release --------------------------------------------------------------------------------------------------------------


def detect(folder: Path) -> bool:
    """Both files of the release."""
    return (folder / CONF).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, hints: Hints) -> Reading:
    """A dictionary as its authors released it."""
    conf = folder / CONF
    said = read_yaml(conf)
    sae, llm, data = (table(conf, said, key) for key in ("sae", "llm", "data"))
    if hints.norm_scaling_factor is not None:
        sae["scaling_factor"] = hints.norm_scaling_factor
    cfg, d_in = read_temporal(conf, sae, "scaling_factor"), whole(conf, llm, "dimin")
    if d_in > _LARGEST:
        raise damaged(conf, "dimin", d_in, "the width of a model")
    d_sae, context = int(d_in * _positive(conf, sae, "exp_factor")), data.get("context_length")
    if not 0 < d_sae < _LARGEST:
        raise damaged(conf, "exp_factor", sae["exp_factor"], "a number that gives d_sae")
    origin = Origin(
        model_name=text(llm, "model_hf_name") or UNKNOWN,
        inputs=(_hook(folder),),
        context=context if is_whole(context) else None,
        dataset=text(data, "hf_name"),
    )
    tensors = {_OURS.get(name, name): tensor for name, tensor in read_safetensors(folder / WEIGHTS).items()}
    file = TensorFile(folder / WEIGHTS, tensors, CONF)
    made = build_temporal(
        folder,
        hints.applied(origin),
        file,
        cfg,
        d_in=d_in,
        d_sae=d_sae,
        center=True,
        scale=cfg.factor,
    )
    if cfg.tied:
        file.skip("W_enc")
    return Reading(dictionary=made, format=NAME, notes=(*notes_of(made), *leftover(file.left)))


def notes_of(made: TemporalDictionary, *, scaled: bool = True) -> list[str]:
    """What a user should know; with `scaled` the scale, unless something else has said it."""
    notes = ["temporal: its codes depend on the tokens before, BOS among them, so it reads whole sequences"]
    if scaled and made.scale != 1:
        notes.append(f"trained on activations times {made.scale:.6g}: the scale is part of it")
    return notes


def _hook(folder: Path) -> str:
    """The stream behind the block that the nearest folder called `layer_N` names."""
    for each in (folder.absolute(), *folder.absolute().parents):
        match = re.fullmatch(r"layer_(\d+)", each.name)
        if match:
            return f"blocks.{match[1]}.hook_resid_post"
    return UNKNOWN


FORMAT = Format(name=NAME, looks=f"{CONF} and {WEIGHTS} of a temporal dictionary", detect=detect, read=read)
