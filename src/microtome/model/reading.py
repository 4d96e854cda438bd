"""Reading a model's input and output: likely next tokens, loss per token, and which tokens a direction stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from microtome.common.errors import InputError

Strings = Callable[[list[int]], list[str]]


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A token, its text, and what was asked of it: a probability with its logit, or a similarity."""

    token: int
    text: str
    score: float
    logit: float | None = None


def likeliest(logits: Float[Tensor, " d_vocab"], k: int, strings: Strings) -> list[ScoredToken]:
    """The k tokens of highest probability after these logits, with it (softmax in float32)."""
    probabilities = logits.float().softmax(-1)
    top = probabilities.topk(_in_range(k, len(logits)))
    ids = top.indices.tolist()
    return [
        ScoredToken(token=i, text=text, score=float(p), logit=float(logits[i]))
        for i, text, p in zip(ids, _each(strings, ids), top.values, strict=True)
    ]


def nearest(
    direction: Float[Tensor, " width"],
    vectors: Float[Tensor, "d_vocab d_model"],
    k: int,
    strings: Strings,
    by: Literal["cosine", "dot"],
) -> list[ScoredToken]:
    """The k tokens whose vectors are nearest to a direction."""
    if direction.shape != vectors.shape[1:]:
        raise InputError(
            "The direction is not of the residual stream", got=list(direction.shape), expected=[vectors.shape[1]]
        )
    scores = vectors.float() @ direction.float().to(vectors.device)
    if by == "cosine":
        scores = scores / (vectors.float().norm(dim=1) * direction.float().norm()).clamp_min(1e-12)
    top = scores.topk(_in_range(k, len(vectors)))
    ids = top.indices.tolist()
    return [
        ScoredToken(token=i, text=text, score=float(score))
        for i, text, score in zip(ids, _each(strings, ids), top.values, strict=True)
    ]


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], mask: Tensor | None
) -> Float[Tensor, "batch later"]:
    """The cross-entropy in nats of each token but the first, given those before it; 0 where it is padding.

    In float32; entry i is about token i + 1.
    """
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    losses = -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return losses if mask is None else losses * (mask[:, 1:] & mask[:, :-1])


def _in_range(k: int, n: int) -> int:
    if not 1 <= k <= n:
        raise InputError("There are not so many tokens", got=k, expected=f"1 to {n}")
    return k


def _each(strings: Strings, ids: list[int]) -> list[str]:
    """Each token's text by itself: neighbours in such a list do not stand beside each other."""
    return [strings([i])[0] for i in ids]


def single_token(ids: list[int], text: str, strings: Strings) -> int:
    """The one token of a text. Raises InputError if it takes several."""
    if len(ids) != 1:
        raise InputError(
            f"{text!r} is not a single token", got=strings(ids), expected="a text of one token (mind the space)"
        )
    return ids[0]
