"""What a dictionary's weights alone say of each latent: the logits it moves directly, its nearest latents, its norms.

Direct effect: a latent of activation 1 adds its decoder row d to the residual stream. Past the final norm's learned
scale w (and, for LayerNorm, its centring) this moves the logits by (d ∘ w) @ W_U, up to the norm's division, which
depends on the token and is left out; the mean over the vocabulary is taken off, since softmax does not see it.
Both tables are computed a few latents at a time: latents × vocabulary is never in memory.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from microtome.dictionary import Dictionary
from microtome.features.config import IndexConfig
from microtome.features.write import WeightFacts
from microtome.model import HookedModel, HookName

_CELLS = 1 << 25
_VOCABULARY_SLICE = 1 << 15

Table = tuple[Int32[np.ndarray, "d_sae n"], Float32[np.ndarray, "d_sae n"]]
"""The columns chosen of each row, and their values."""


@torch.inference_mode()
def weight_facts(model: HookedModel, sae: Dictionary, config: IndexConfig) -> WeightFacts:
    """The facts of every latent of `sae`. The logit lists are empty for a hook point outside the residual stream's
    space.
    """
    (top_ids, top_values), (bottom_ids, bottom_values) = logit_effects(model, sae, config.logits)
    near_ids, near_cosines = nearest_latents(sae.W_dec, config.neighbours)
    return WeightFacts(
        top_logit_ids=top_ids,
        top_logit_values=top_values,
        bottom_logit_ids=bottom_ids,
        bottom_logit_values=bottom_values,
        neighbour_ids=near_ids,
        neighbour_cosines=near_cosines,
        encoder_norm=_numpy(sae.W_enc.float().norm(dim=0)),
        decoder_norm=_numpy(sae.W_dec.float().norm(dim=1)),
        bias=_numpy(sae.b_enc.float()),
    )


@torch.inference_mode()
def logit_effects(model: HookedModel, sae: Dictionary, n: int) -> tuple[Table, Table]:
    """The `n` tokens whose logits each latent raises most, and those it lowers most; strongest first."""
    if HookName.parse(sae.hook_name).axes[-1] != "d_model":
        empty = np.zeros((len(sae.W_dec), 0), np.int32)
        return (empty, empty.astype(np.float32)), (empty, empty.astype(np.float32))
    W_U = model.W_U
    directions = sae.W_dec.to(W_U.device, torch.float32)
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
def nearest_latents(W_dec: Float[Tensor, "d_sae d_in"], n: int) -> Table:
    """The `n` other latents whose decoder rows have the highest cosine with each latent's, nearest first."""
    unit = nn.functional.normalize(W_dec.float(), dim=1)
    n = min(n, len(unit) - 1)
    found = []
    first = 0
    for rows in _chunks(unit, len(unit)):
        cosines = rows @ unit.T
        own = torch.arange(len(rows), device=unit.device)
        cosines[own, own + first] = -2.0
        found.append(cosines.topk(n, dim=1))
        first += len(rows)
    return _table(found)


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
