"""Disentanglement in the way of RAVEL (Huang et al. 2024, 2402.17700; as a score of dictionaries in SAEBench, 2503.09532).

For an attribute, say the country of a city: choose latents. Then, in a prompt about one city, give these latents the codes
that another city has at its last token (what the dictionary does not explain stays). *Cause*: the model now names the other
city's country. *Isolation*: asked for something else, the language, it still names the first city's. The score of two
attributes is the mean of both causes and both isolations.

Latents are chosen on one half of the entities, and the figures are of pairs within the other half. The halves are drawn anew
with each seed, and entities of the same values are spread over both. Two ways to choose: the n latents whose codes tell the
values apart best, and a learned mask (`masks.py`).

The model answers with the likeliest of the attribute's values. Only entities that it answers rightly when left alone count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from microtome.common.progress import Progress, progress
from microtome.dictionary.asking import Asked, States, ask, states_of
from microtome.dictionary.entities import Entities, cities
from microtome.dictionary.fit import check_fit
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.masks import MaskConfig, learn_mask
from microtome.dictionary.splice import parts_of
from microtome.dictionary.surface import SparseDictionary, decoder_rows
from microtome.model import HookedModel

COUNTS = (4, 16, 64)
SEEDS = (0, 1, 2)
Choice = Mapping[str, Float[Tensor, " d_sae"]]  # for each attribute the share by which each latent is exchanged


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How the unedited model does on one attribute, over all entities; `chance` is one over the number of values."""

    attribute: str
    accuracy: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """Figures of one choice of latents. `n_latents[attribute]` is how many are exchanged (the mean over seeds), `latents` those
    of the first seed, in no order; `cause[attribute]` and `isolation[attribute][other]` are None where the model could answer
    for no pair of entities."""

    n_latents: dict[str, float]
    latents: dict[str, tuple[int, ...]]
    score: Estimate | None
    cause: dict[str, Estimate | None]
    isolation: dict[str, dict[str, Estimate | None]]


@dataclass(frozen=True, kw_only=True)
class Disentanglement:
    """RAVEL's figures of one dictionary. `by_count` has the latents that tell values apart best, by their number; `best` is
    the number with the highest score. `masked` has those of a learned mask, if one was asked for. `whole` exchanges all
    latents: the most cause that the dictionary can have at this place, and no choice (its `latents` are not listed)."""

    entities: str
    n_entities: int
    n_pairs: int
    answered: tuple[Answered, ...]
    by_count: dict[str, Disentangled]
    masked: Disentangled | None
    whole: Disentangled
    best: int | None


@torch.no_grad()
def disentanglement(
    model: HookedModel,
    dictionary: SparseDictionary,
    entities: Entities | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    mask: MaskConfig | None = None,
    seeds: Sequence[int] = SEEDS,
    pairs: int = 12,
    rows: int = 32,
) -> Disentanglement:
    """Cause and isolation on `pairs` pairs of entities for each seed, by the number of latents exchanged, and with a mask
    learned for each attribute and seed.

    Raises ConfigError for a dictionary that does not fit the model, InputError for entities whose answers share their
    first token.
    """
    check_fit(model, dictionary)
    entities = entities or cities()
    asked = {attribute: ask(model, entities, attribute) for attribute in entities.prompts}
    n_masks = mask.steps * len(asked) * len(seeds) if mask else 0
    n_runs = (len(counts) + 1 + bool(mask)) * len(asked) ** 2 * len(seeds) * pairs
    with progress(n_runs + n_masks, "disentangle", "runs") as bar:
        states = {attribute: states_of(dictionary, of, rows) for attribute, of in asked.items()}
        exchange = Exchange(model, dictionary, asked, states, decoder_rows(dictionary).cpu(), rows, bar)
        split = [halves_of(entities, seed) for seed in seeds]
        tested = [_pairs(test, pairs, seed) for (_, test), seed in zip(split, seeds, strict=True)]
        chosen = {str(n): [exchange.told_apart(n, train) for train, _ in split] for n in (*counts, dictionary.d_sae)}
        if mask is not None:
            chosen["mask"] = [exchange.masks(mask, train, seed) for (train, _), seed in zip(split, seeds, strict=True)]
        found = {name: exchange.figures(choice, tested) for name, choice in chosen.items()}
    by_count = {str(n): found[str(n)] for n in counts}
    scores = {int(n): one.score.value for n, one in by_count.items() if one.score is not None}
    return Disentanglement(
        entities=entities.name,
        n_entities=len(entities.values),
        n_pairs=pairs * len(seeds),
        answered=tuple(
            Answered(
                attribute=attribute,
                accuracy=float((states[attribute].says == of.value).double().mean()),
                chance=1 / len(of.answers),
            )
            for attribute, of in asked.items()
        ),
        by_count=by_count,
        masked=found.get("mask"),
        whole=replace(found[str(dictionary.d_sae)], latents={}),
        best=max(scores, key=lambda n: scores[n]) if scores else None,
    )


def halves_of(entities: Entities, seed: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """The numbers of the entities to choose latents on, and of those to try them on: drawn with `seed`, every second of the
    entities in the order of their values."""
    rows = list(entities.values.values())
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    order = torch.tensor(sorted(shuffled, key=lambda i: [rows[i][attribute] for attribute in entities.prompts]))
    return order[seed % 2 :: 2].sort().values, order[1 - seed % 2 :: 2].sort().values


def _pairs(among: Int[Tensor, " entity"], pairs: int, seed: int) -> Int[Tensor, "pair 2"]:
    """Ordered pairs of different entities (base, source)."""
    generator, n = torch.Generator().manual_seed(seed), len(among)
    base = torch.randint(n, (pairs,), generator=generator)
    return among[torch.stack([base, (base + torch.randint(1, n, (pairs,), generator=generator)) % n], 1)]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Latents exchanged between entities, and what the model then says."""

    model: HookedModel
    dictionary: SparseDictionary
    asked: Mapping[str, Asked]
    states: Mapping[str, States]
    W_dec: Float[Tensor, "d_sae d_out"]
    rows: int
    bar: Progress

    def logits(
        self, about: str, share: Float[Tensor, " d_sae"], pairs: Int[Tensor, "pair 2"]
    ) -> Float[Tensor, "pair value"]:
        """Of the values of `about`, in the base entities' prompts, each latent exchanged by its share."""
        of, (base, source) = self.states[about], pairs.T
        y = of.y[base] + ((of.codes[source] - of.codes[base]) * share) @ self.W_dec
        return self.asked[about].logits(base, parts_of(self.model, self.dictionary.origin.outputs, y))

    def wanted(self, target: str, about: str, pairs: Int[Tensor, "pair 2"]) -> Int[Tensor, " pair"]:
        """The value of `about` to be named when `target` is exchanged: the source's own of the target itself, else the base's."""
        return self.asked[about].value[pairs[:, 1 if target == about else 0]]

    def counts(self, target: str, about: str, pairs: Int[Tensor, "pair 2"]) -> Bool[Tensor, " pair"]:
        """Which pairs say something: the target's values differ, and the model, left alone, answers rightly for the base, and
        for the cause (`target` is `about`) for the source as well."""
        base, source = pairs.T
        right = self.states[about].says == self.asked[about].value
        value = self.asked[target].value
        differ = right[base] & (value[base] != value[source])
        return differ & right[source] if target == about else differ

    # ---- choosing ---------------------------------------------------------------------------------------------------

    def told_apart(self, count: int, train: Int[Tensor, " entity"]) -> Choice:
        """The `count` latents whose codes tell the values apart best."""
        chosen = {}
        for attribute, asked in self.asked.items():
            order = attribute_latents(self.states[attribute].codes[train], asked.value[train])
            chosen[attribute] = torch.zeros(len(order)).index_fill(0, order[:count], 1.0)
        return chosen

    def masks(self, config: MaskConfig, train: Int[Tensor, " entity"], seed: int) -> Choice:
        """A mask learned for each attribute; an empty one where no pair could teach it."""
        every = torch.cartesian_prod(train, train)
        chosen = {}
        for target in self.asked:
            tasks = [target] if config.alone else [target, *(about for about in self.asked if about != target)]
            pairs = {about: every[self.counts(target, about, every)] for about in tasks}
            chosen[target] = torch.zeros(self.dictionary.d_sae)
            if len(pairs[target]):
                loss = partial(self.loss, target, {about: some for about, some in pairs.items() if len(some)}, config)
                mask = learn_mask(loss, self.dictionary.d_sae, config, seed=seed, after_step=self.bar.advance)
                chosen[target] = mask.float()
        return chosen

    def loss(
        self,
        target: str,
        pairs: Mapping[str, Int[Tensor, "pair 2"]],
        config: MaskConfig,
        share: Float[Tensor, " d_sae"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of the wanted values: half its weight on the cause, half on the isolations, on pairs drawn from `pairs`."""
        parts = {}
        for about, some in pairs.items():
            drawn = some[torch.randint(len(some), (config.batch,), generator=generator)]
            parts[about] = functional.cross_entropy(self.logits(about, share, drawn), self.wanted(target, about, drawn))
        others = [part for about, part in parts.items() if about != target]
        return parts[target] if not others else (parts[target] + torch.stack(others).mean()) / 2

    # ---- measuring --------------------------------------------------------------------------------------------------

    def figures(self, chosen: Sequence[Choice], tested: Sequence[Int[Tensor, "pair 2"]]) -> Disentangled:
        """Cause and isolation with what was chosen for each seed, on that seed's pairs."""
        seeds = list(zip(chosen, tested, strict=True))
        result = {
            (target, about): torch.stack([self._kept(target, about, choice[target], pairs) for choice, pairs in seeds])
            for target in self.asked
            for about in self.asked
        }
        return Disentangled(
            n_latents={a: sum(float(choice[a].sum()) for choice in chosen) / len(chosen) for a in self.asked},
            latents={a: tuple(chosen[0][a].nonzero()[:, 0].tolist()) for a in self.asked},
            score=_score(result, list(self.asked)),
            cause={a: _estimate(result[a, a]) for a in self.asked},
            isolation={a: {b: _estimate(result[a, b]) for b in self.asked if b != a} for a in self.asked},
        )

    def _kept(
        self, target: str, about: str, share: Float[Tensor, " d_sae"], pairs: Int[Tensor, "pair 2"]
    ) -> Float[Tensor, " pair"]:
        """With `target`'s latents exchanged and `about` asked for: 1 where the answer is as wanted, NaN where the pair does
        not count."""
        found = torch.full((len(pairs),), torch.nan)
        counted = self.counts(target, about, pairs).nonzero()[:, 0]
        for part in counted.split(self.rows) if len(counted) else ():
            says = self.logits(about, share, pairs[part]).argmax(1)
            found[part] = (says == self.wanted(target, about, pairs[part])).float()
        self.bar.advance(len(pairs))
        return found


def attribute_latents(codes: Float[Tensor, "entity d_sae"], value: Int[Tensor, " entity"]) -> Int[Tensor, " d_sae"]:
    """The latents whose codes tell the values apart, best first: by the sum of squares between the values less that within
    them, so a latent must be clear and also large to come first."""
    means = torch.stack([codes[value == v].mean(0) for v in value.unique().tolist()])
    number = torch.stack([(value == v).sum() for v in value.unique().tolist()])
    between = (number[:, None] * (means - codes.mean(0)).square()).sum(0)
    total = (codes - codes.mean(0)).square().sum(0)
    return (between - (total - between)).argsort(descending=True, stable=True)


def _estimate(values: Float[Tensor, "seed pair"]) -> Estimate | None:
    return None if values.isnan().all() else Estimate.of_mean(values)


def _score(result: dict[tuple[str, str], Float[Tensor, "seed pair"]], attributes: list[str]) -> Estimate | None:
    """The mean over pairs of attributes of the mean of two causes and two isolations, with its interval over pairs of
    entities; None where one of the four has no pair."""
    parts = [result[key] for a, b in combinations(attributes, 2) for key in ((a, a), (b, b), (a, b), (b, a))]
    if any(part.isnan().all() for part in parts):
        return None
    weights = [(~part.isnan()).double() / (~part.isnan()).sum() for part in parts]
    # Each part counts alike, however many pairs it has.
    values = sum(part.nan_to_num().double() * w for part, w in zip(parts, weights, strict=True))
    total = sum(weights, torch.zeros_like(weights[0]))
    return Estimate.of_ratio(torch.as_tensor(values).flatten()[None], total.flatten()[None])
