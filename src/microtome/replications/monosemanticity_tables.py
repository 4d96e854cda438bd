"""What single latents respond to: how specific they are, in numbers for all of them, and in contexts for some.

Three proxies, the same for features and neurons. None of them is interpretability, which takes a reader
(`monosemanticity_blind.py`); each would be met by a latent for one token.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from microtome.common.device import generator
from microtome.dictionary import Dictionary
from microtome.model import HookedModel
from microtome.replications.monosemanticity_measures import Firings
from microtome.text.strings import TokenStrings

TOP = 20
"""How many of the strongest firings are looked at."""
_BEFORE, _BEHIND = 12, 4
_PER_INTERVAL = 3


# ---- proxies --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Specificity:
    """For each latent of `latents` (those with at least `TOP` firings):

    - `top_share`: of its `TOP` strongest firings, the share on the one token that is most frequent there;
    - `entropy`: in bits, of the tokens on which it fires, each weighted by the activation there;
    - `explained`: the largest share of its variance, over all tokens of the text, that knowing of one token whether it is there
      explains.
    """

    latents: Int[np.ndarray, " n"]
    top_share: Float[np.ndarray, " n"]
    entropy: Float[np.ndarray, " n"]
    explained: Float[np.ndarray, " n"]


def specificity(firings: Firings) -> Specificity:
    """The proxies of all latents with enough firings."""
    tokens = firings.tokens.reshape(-1).astype(np.int64)
    frequency = np.bincount(tokens)
    which = np.flatnonzero(firings.counts >= TOP)
    rows = [_specific(*firings.of(latent), tokens, frequency, firings.n_tokens) for latent in which.tolist()]
    shares, entropies, explained = np.array(rows).reshape(-1, 3).T
    return Specificity(latents=which, top_share=shares, entropy=entropies, explained=explained)


def _specific(
    places: np.ndarray, values: np.ndarray, tokens: np.ndarray, frequency: np.ndarray, n: int
) -> tuple[float, float, float]:
    here = tokens[places]
    found, which = np.unique(here, return_inverse=True)
    sums = np.bincount(which, weights=values)
    share = np.bincount(which[:TOP]).max() / TOP
    p = sums / sums.sum()
    entropy = -float((p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum())
    mean, square = values.sum() / n, float((values.astype(np.float64) ** 2).sum()) / n
    weight = frequency[found] / n
    between = weight * (sums / frequency[found] - mean) ** 2 / np.clip(1 - weight, 1e-12, None)
    return float(share), entropy, float(between.max() / (square - mean**2))


def chance_greater(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """The chance that a random member of `a` is greater than one of `b`, ties counted half (the area under the ROC curve)."""
    one, other = np.asarray(a, float), np.sort(np.asarray(b, float))
    if not len(one) or not len(other):
        return math.nan
    below, upto = np.searchsorted(other, one, "left"), np.searchsorted(other, one, "right")
    return float((below + upto).mean() / (2 * len(other)))


# ---- contexts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example:
    """One firing: the token, what stands before and behind it, and the activation."""

    before: str
    token: str
    behind: str
    activation: float

    @property
    def markdown(self) -> str:
        return f"{_code(self.before)} **{_code(self.token)}** {_code(self.behind)}"


class Contexts:
    """Firings as a person reads them."""

    def __init__(self, firings: Firings, strings: TokenStrings) -> None:
        self.firings, self.strings = firings, strings

    def examples(
        self, places: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], which: Int[np.ndarray, " some"]
    ) -> list[Example]:
        """Some of a latent's firings."""
        return [self._example(*pair) for pair in zip(places[which].tolist(), values[which].tolist(), strict=True)]

    def _example(self, place: int, activation: float) -> Example:
        sequence, position = divmod(place, self.firings.tokens.shape[1])
        row = self.firings.tokens[sequence].tolist()
        start, stop = max(position - _BEFORE, 0), min(position + 1 + _BEHIND, len(row))
        shown = self.strings.show(row[start:stop])
        here = position - start
        return Example(
            before="".join(shown[:here]),
            token=shown[here],
            behind="".join(shown[here + 1 :]),
            activation=activation,
        )

    def top(self, latent: int, n: int) -> list[Example]:
        """The strongest firings, one a sequence."""
        places, values = self.firings.of(latent)
        _, first = np.unique(places // self.firings.tokens.shape[1], return_index=True)
        return self.examples(places, values, np.sort(first)[:n])

    def sampled(self, latent: int, intervals: int, n: int, seed: int) -> list[list[Example]]:
        """`n` random firings from each of so many equal steps of activation, from the strongest step to the weakest. Steps
        without firings are empty."""
        places, values = self.firings.of(latent)
        steps = np.clip(np.ceil(values / values[0] * intervals) - 1, 0, intervals - 1)
        drawn = []
        for step in reversed(range(intervals)):
            inside = np.flatnonzero(steps == step)
            order = torch.randperm(len(inside), generator=generator(seed, "interval", latent, step)).numpy()
            drawn.append(self.examples(places, values, np.sort(inside[order[:n]])))
        return drawn

    def tokens(self, latent: int, n: int) -> list[tuple[str, float]]:
        """The tokens that carry most of the latent's activation, with their shares."""
        places, values = self.firings.of(latent)
        flat, carried = self.firings.tokens.reshape(-1), Counter[int]()
        for token, value in zip(flat[places].tolist(), values.tolist(), strict=True):
            carried[token] += value
        total = sum(carried.values())
        return [(self.strings.one(token), value / total) for token, value in carried.most_common(n)]


@torch.no_grad()
def direct_logits(
    model: HookedModel, dictionary: Dictionary, latents: Sequence[int], n: int
) -> list[tuple[list[int], list[int]]]:
    """For each latent the tokens whose logits it raises most, and those it lowers most: its decoder row through W_out, the final
    norm's scale and W_U. The norm's division, which depends on the token, is left out, and the mean over the vocabulary taken off.
    The dictionary is of the last layer's `mlp.hook_post`."""
    rows = dictionary.W_dec[list(latents)].float() @ model.W_out[model.config.n_layers - 1].float()
    norm = model.weights.ln_final
    effects = (rows if norm is None else norm.linear(rows)) @ model.W_U.float()
    highest, lowest = effects.topk(n, dim=1).indices, effects.topk(n, dim=1, largest=False).indices
    return list(zip(highest.tolist(), lowest.tolist(), strict=True))


def strings_of(model: HookedModel) -> TokenStrings:
    """The display strings of the model's tokenizer."""
    assert model.tokenizer is not None
    return TokenStrings(model.tokenizer.backend_tokenizer)


def features_page(
    model: HookedModel, dictionary: Dictionary, firings: Firings, latents: Sequence[int], *, title: str, seed: int
) -> str:
    """Markdown of some latents: the tokens on which each fires, its strongest contexts, contexts drawn from each fifth of its
    activation, and the logits it moves directly."""
    contexts = Contexts(firings, strings_of(model))
    effects = direct_logits(model, dictionary, latents, 8) if latents else []
    blocks = [f"# {title}", "The marked token is where the latent fires; ↵ is a line end."]
    for latent, (raised, lowered) in zip(latents, effects, strict=True):
        carried = ", ".join(f"{_code(token)} {share:.0%}" for token, share in contexts.tokens(latent, 6))
        blocks += [
            f"## {latent}",
            f"Fires on {firings.density[latent]:.2%} of tokens. Its activation is on {carried}.",
            f"Raises {_listed(contexts.strings, raised)}; lowers {_listed(contexts.strings, lowered)}.",
            _table("strongest", contexts.top(latent, 6)),
        ]
        drawn = contexts.sampled(latent, 5, _PER_INTERVAL, seed)
        for number, examples in enumerate(drawn):
            if examples:
                blocks.append(_table(f"drawn from {80 - 20 * number}–{100 - 20 * number} % of its maximum", examples))
    return "\n\n".join(blocks) + "\n"


def _listed(strings: TokenStrings, ids: Sequence[int]) -> str:
    return ", ".join(_code(strings.one(token)) for token in ids)


def _table(name: str, examples: Sequence[Example]) -> str:
    rows = [f"| {one.activation:.2f} | {one.markdown} |" for one in examples]
    return "\n".join([f"| activation | {name} |", "|---|---|", *rows])


def _code(text: str) -> str:
    """Text as code in a cell of a Markdown table. Backticks and bars would end one or the other."""
    plain = text.replace("`", "ˋ").replace("|", "∣")
    return f"`{plain}`" if plain else ""
