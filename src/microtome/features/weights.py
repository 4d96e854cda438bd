"""What a dictionary's weights alone say of each latent: the logits it moves directly, its nearest latents, its norms.

Direct effect: a latent of activation 1 adds a vector d to the residual stream (`LatentWeights.direction`). Past the final
norm's learned scale w (and, for LayerNorm, its centring) this moves the logits by (d ∘ w) @ W_U, up to the norm's division,
which depends on the token and is left out; the mean over the vocabulary is taken off, since softmax does not see it.
Both tables are computed a few latents at a time: latents × vocabulary is never in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from microtome.common.errors import ConfigError
from microtome.dictionary import CrossLayerTranscoder, Dictionary, DictionarySet, SparseDictionary, TemporalDictionary
from microtome.dictionary.activation import Activation
from microtome.features.config import IndexConfig
from microtome.features.write import WeightFacts
from microtome.model import HookedModel, HookName

_CELLS = 1 << 25
_VOCABULARY_SLICE = 1 << 15
_STREAM = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_ADDED = ("hook_attn_out", "hook_mlp_out")

Table = tuple[Int32[np.ndarray, "d_sae n"], Float32[np.ndarray, "d_sae n"]]
"""The columns chosen of each row, and their values."""


@dataclass(frozen=True)
class LatentWeights:
    """The weights of every latent of a dictionary, of whatever class.

    `direction` is what a latent of activation 1 adds to the residual stream before the unembedding, if nothing behind its
    outputs answers to it: what it writes at several points *of* the stream (a crosscoder's, also a causal one's) is the
    same thing seen at several depths, so the deepest one counts; what it writes *into* the stream behind that (attention
    and MLP outputs) adds up. Of width 0 where an output is of another width, or none of several is of either kind.

    `row` is what nearest latents are found by: the decoder row, and for a cross-layer transcoder, whose rows for all layers
    would be many gigabytes, the direction, or, without one, the row of the last output. `spaces` counts the latents whose
    rows lie in one space: all, but for a set with outputs outside the stream those of each member.
    """

    encoder_norm: Float[Tensor, " d_sae"]
    decoder_norm: Float[Tensor, " d_sae"]
    bias: Float[Tensor, " d_sae"]
    direction: Float[Tensor, "d_sae d"]
    row: Float[Tensor, "d_sae d_row"]
    spaces: tuple[int, ...]

    @classmethod
    def of(cls, sae: SparseDictionary) -> "LatentWeights":
        """Raises ConfigError for a set whose outputs are of several widths."""
        if isinstance(sae, DictionarySet):
            return cls._of_set(sae)
        if isinstance(sae, CrossLayerTranscoder):
            rows = [each.detach().float() for each in sae.W_dec]
            counted = _counted(sae.origin.outputs)
            # Layer l has no rows for the outputs before its own.
            chosen = [[i - layer for i in counted or [len(rows) - 1] if i >= layer] for layer in range(len(rows))]
            written = torch.cat([each[:, own].sum(1) for each, own in zip(rows, chosen, strict=True)])
            return cls(
                encoder_norm=sae.encoder.float().norm(dim=2).flatten(),
                decoder_norm=torch.cat([each.flatten(1).norm(dim=1) for each in rows]),
                bias=sae.b_enc.float().flatten(),
                direction=written if counted else written[:, :0],
                row=written,
                spaces=(sae.d_sae,),
            )
        if isinstance(sae, TemporalDictionary):
            return cls.of(sae.novel)
        assert isinstance(sae, Dictionary)
        W_dec = sae.W_dec.float()
        return cls(
            encoder_norm=sae.encoder.float().norm(dim=1),
            decoder_norm=sae.point_norms().float().sum(1),
            bias=sae.b_enc.float(),
            direction=_direction(W_dec, sae),
            row=W_dec,
            spaces=(sae.d_sae,),
        )

    @classmethod
    def _of_set(cls, sae: DictionarySet) -> "LatentWeights":
        check_widths(sae)
        inside = all(_inside(name) for name in sae.origin.outputs)
        parts = [cls.of(member) for member in sae.dictionaries]
        return cls(
            encoder_norm=torch.cat([part.encoder_norm for part in parts]),
            decoder_norm=torch.cat([part.decoder_norm for part in parts]),
            bias=torch.cat([part.bias for part in parts]),
            direction=torch.cat([part.direction if inside else part.direction[:, :0] for part in parts]),
            row=torch.cat([part.row for part in parts]),
            spaces=(sae.d_sae,) if inside else tuple(member.d_sae for member in sae.dictionaries),
        )


def check_widths(sae: SparseDictionary) -> None:
    """Raise ConfigError for a set whose outputs are of several widths."""
    if isinstance(sae, DictionarySet) and len(set(sae.out_widths)) > 1:
        raise ConfigError(
            "The dictionaries of this set have outputs of several widths, which share no space",
            got=", ".join(map(str, sae.out_widths)),
            fix="Index them one by one",
        )


def check_signs(sae: nn.Module) -> None:
    """Raise ConfigError for latents that fire in two directions: bands, histograms and top examples are of one."""
    signed = [each.name for each in sae.modules() if isinstance(each, Activation) and each.signed]
    if signed:
        raise ConfigError(
            "An index holds codes above zero, and this dictionary has some below",
            got=f"activation {signed[0]}",
            fix="Give each latent's two directions a latent of their own: split_signs, or microtome convert --split-signs",
        )


def _inside(name: str) -> bool:
    """Whether the activations at a point are vectors of the residual stream's width."""
    return HookName.parse(name).axes == ("batch", "pos", "d_model")


def _counted(outputs: Sequence[str]) -> list[int]:
    """Which outputs make up what a latent adds to the stream: the deepest state of the stream, and what is added behind it.
    A single output inside the stream's space counts whatever it is."""
    if not all(map(_inside, outputs)):
        return []
    if len(outputs) == 1:
        return [0]
    names = [HookName.parse(name) for name in outputs]
    deepest = max((name for name in names if name.point in _STREAM), default=None)
    return [
        i
        for i, name in enumerate(names)
        if name == deepest or (name.point in _ADDED and (deepest is None or name > deepest))
    ]


def _direction(W_dec: Float[Tensor, "d_sae d_out"], sae: Dictionary) -> Float[Tensor, "d_sae d"]:
    """What each latent adds to the stream, of width 0 where that is nothing."""
    counted = _counted(sae.origin.outputs)
    pieces = W_dec.chunk(len(sae.origin.outputs), 1)
    return reduce(add, [pieces[i] for i in counted]) if counted else W_dec[:, :0]


@torch.inference_mode()
def weight_facts(model: HookedModel, sae: SparseDictionary, config: IndexConfig) -> WeightFacts:
    """The facts of every latent of `sae`. The logit lists are empty where it adds nothing to the residual stream."""
    weights = LatentWeights.of(sae)
    (top_ids, top_values), (bottom_ids, bottom_values) = logit_effects(model, weights.direction, config.logits)
    near_ids, near_cosines = nearest_latents(weights.row, config.neighbours, weights.spaces)
    return WeightFacts(
        top_logit_ids=top_ids,
        top_logit_values=top_values,
        bottom_logit_ids=bottom_ids,
        bottom_logit_values=bottom_values,
        neighbour_ids=near_ids,
        neighbour_cosines=near_cosines,
        encoder_norm=_numpy(weights.encoder_norm),
        decoder_norm=_numpy(weights.decoder_norm),
        bias=_numpy(weights.bias),
    )


@torch.inference_mode()
def logit_effects(model: HookedModel, directions: Float[Tensor, "d_sae d"], n: int) -> tuple[Table, Table]:
    """The `n` tokens whose logits each direction raises most, and those it lowers most; strongest first. Empty lists for
    directions of width 0."""
    if directions.shape[1] == 0:
        empty = np.zeros((len(directions), 0), np.int32)
        return (empty, empty.astype(np.float32)), (empty, empty.astype(np.float32))
    W_U = model.W_U
    directions = directions.to(W_U.device, torch.float32)
    norm = model.weights.ln_final
    directions = directions if norm is None else norm.linear(directions)
    n = min(n, W_U.shape[1])
    highest, lowest = [], []
    for rows in _chunks(directions, W_U.shape[1]):
        effects = torch.empty(len(rows), W_U.shape[1], device=W_U.device)
        for start in range(0, W_U.shape[1], _VOCABULARY_SLICE):
            piece = W_U[:, start : start + _VOCABULARY_SLICE]
            torch.matmul(rows, piece.float(), out=effects[:, start : start + piece.shape[1]])
        effects -= effects.mean(dim=1, keepdim=True)
        highest.append(effects.topk(n, dim=1))
        lowest.append(effects.topk(n, dim=1, largest=False))
    return _table(highest), _table(lowest)


@torch.inference_mode()
def nearest_latents(W_dec: Float[Tensor, "d_sae d_in"], n: int, spaces: Sequence[int] = ()) -> Table:
    """The `n` other latents whose decoder rows have the highest cosine with each latent's, nearest first. With `spaces` so
    many latents at a time are compared, and `n` is at most what the smallest of these has."""
    unit = nn.functional.normalize(W_dec.float(), dim=1)
    sizes = list(spaces) or [len(unit)]
    n = min(n, min(sizes) - 1)
    tables, start = [], 0
    for space in unit.split(sizes):
        found, first = [], 0
        for rows in _chunks(space, len(space)):
            cosines = rows @ space.T
            own = torch.arange(len(rows), device=unit.device)
            cosines[own, own + first] = -2.0
            found.append(cosines.topk(n, dim=1))
            first += len(rows)
        ids, values = _table(found)
        tables.append((ids + np.int32(start), values))
        start += len(space)
    return np.concatenate([ids for ids, _ in tables]), np.concatenate([values for _, values in tables])


def _chunks(rows: Float[Tensor, "row d"], width: int) -> Iterator[Float[Tensor, "some d"]]:
    """The rows, as many at a time as keep a table of `width` columns small."""
    step = max(_CELLS // width, 1)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _table(parts: list[torch.return_types.topk]) -> Table:
    ids: Int64[Tensor, "d_sae n"] = torch.cat([p.indices for p in parts])
    return ids.to("cpu", torch.int32).numpy(), _numpy(torch.cat([p.values for p in parts]))


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().to("cpu", torch.float32).numpy())
