"""One run of each kind of tiny model, with everything captured that a plain name asks for; made once for all tests."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.model import ActivationCache, HookedModel
from microtome.model.folding import Norm
from microtome.model.norms import affine

from .families import KINDS, make

TOKENS = torch.tensor([[0, 17, 45, 80, 301, 12, 33], [0, 9, 9, 250, 61, 7, 100]])
ALL = sorted(KINDS)


class Captured(NamedTuple):
    model: HookedModel
    logits: Float[Tensor, "batch pos d_vocab"]
    cache: ActivationCache


@cache
def captured(kind: str) -> Captured:
    """A model of this kind, and its run on `TOKENS`. Shared: tests change neither."""
    model = make(kind)
    logits, activations = model.run_with_cache(TOKENS)
    return Captured(model, logits, activations)


def read_by_heads(run: Captured, layer: int) -> Float[Tensor, "batch pos d_model"]:
    """What the heads read, after the norm's learned weights."""
    return _read(run, layer, run.model.weights.block(layer).attn_norm, "hook_resid_pre")


def read_by_mlp(run: Captured, layer: int) -> Float[Tensor, "batch pos d_model"]:
    """What the MLP reads, after the norm's learned weights."""
    if not run.model.spec.additive:  # OPT-350m: the normed sum itself
        block = run.model.hf.get_submodule(f"{run.model.spec.blocks}.{layer}")
        both = run.cache["resid_pre", layer] + run.cache["attn_out", layer]
        normed: Tensor = block.get_submodule("self_attn_layer_norm")(both)
        return normed
    return _read(run, layer, run.model.weights.block(layer).mlp_norm, "hook_resid_mid")


def _read(run: Captured, layer: int, norm: Norm | None, stream: str) -> Tensor:
    if norm is None:
        return run.cache[f"blocks.{layer}.{stream}"]
    return affine(norm.module, run.cache[f"blocks.{layer}.{norm.name}.hook_normalized"], norm.offset)


def behind(run: Captured, layer: int, norm: str, written: Tensor) -> Tensor:
    """What attention or MLP wrote, after the norm behind it, if there is one."""
    post = run.model.weights.block(layer).norm(norm)
    if post is None:
        return written
    scale = run.cache[f"blocks.{layer}.{norm}.hook_scale"]
    return affine(post.module, written / scale, post.offset)
