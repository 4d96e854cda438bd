"""Disentanglement in the way of RAVEL (Huang et al. 2024, 2402.17700; as a score of dictionaries in SAEBench, 2503.09532).

For an attribute, say the country of a city: choose the n latents whose codes at the city's last token tell its values
apart best. Then, in a prompt about one city, give these latents the codes that another city has (what the dictionary does
not explain stays). *Cause*: the model now names the other city's country. *Isolation*: asked for something else, the
language, it still names the first city's. The score of two attributes is the mean of both causes and both isolations.

The model answers with the likeliest of the attribute's values. Only cities that it answers rightly when left alone count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.errors import InputError
from microtome.common.progress import Progress, progress
from microtome.dictionary.entities import Entities, cities
from microtome.dictionary.fit import check_fit
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.labelled import in_decoder_units
from microtome.dictionary.splice import parts_of, spliced
from microtome.dictionary.surface import Read, SparseDictionary, decoder_rows
from microtome.model import HookedModel
from microtome.model.prompts import Prompts

COUNTS = (4, 16, 64)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How the unedited model does on one attribute, over all entities; `chance` is one over the number of values."""

    attribute: str
    accuracy: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """Figures by the number of latents exchanged. `cause[attribute]` and `isolation[attribute][other]` are None where the
    model could answer for no pair of entities."""

    n_latents: int
    score: Estimate | None
    cause: dict[str, Estimate | None]
    isolation: dict[str, dict[str, Estimate | None]]


@dataclass(frozen=True, kw_only=True)
class Disentanglement:
    """RAVEL's figures of one dictionary. `whole` exchanges all latents: the most cause that the dictionary can have at this
    place, and no choice of latents. `best` is the number of latents with the highest score."""

    entities: str
    n_entities: int
    n_pairs: int
    answered: tuple[Answered, ...]
    by_count: tuple[Disentangled, ...]
    whole: Disentangled
    best: int | None


@dataclass(frozen=True)
class _Asked:
    """One attribute's prompts for all entities: ids with padding, the place of each entity's last token, the answers' ids,
    and the number of the right one."""

    prompts: Prompts
    place: Int[Tensor, " entity"]
    answers: Int[Tensor, " value"]
    value: Int[Tensor, " entity"]


@dataclass(frozen=True)
class _States:
    """What flows at the entities' places in one attribute's prompts."""

    codes: Float[Tensor, "entity d_sae"]
    y: Float[Tensor, "entity d_out"]
    says: Int[Tensor, " entity"]


@torch.no_grad()
def disentanglement(
    model: HookedModel,
    dictionary: SparseDictionary,
    entities: Entities | None = None,
    *,
    counts: Sequence[int] = COUNTS,
    seeds: Sequence[int] = SEEDS,
    pairs: int = 12,
    rows: int = 32,
) -> Disentanglement:
    """Cause and isolation on `pairs` pairs of entities for each seed, by the number of latents exchanged.

    Raises ConfigError for a dictionary that does not fit the model, InputError for entities whose answers share their
    first token.
    """
    check_fit(model, dictionary)
    entities = entities or cities()
    asked = {attribute: _ask(model, entities, attribute) for attribute in entities.prompts}
    n_runs = (len(counts) + 1) * len(asked) ** 2 * len(seeds) * pairs
    with progress(n_runs, "disentangle", "runs") as bar:
        states = {attribute: _states(model, dictionary, ask, rows) for attribute, ask in asked.items()}
        exchange = _Exchange(model, dictionary, asked, states, rows, bar)
        drawn = [_pairs(len(entities.values), pairs, seed) for seed in seeds]
        found = [exchange.figures(count, drawn) for count in (*counts, dictionary.d_sae)]
    scored = [one for one in found[:-1] if one.score is not None]
    return Disentanglement(
        entities=entities.name,
        n_entities=len(entities.values),
        n_pairs=pairs * len(seeds),
        answered=tuple(
            Answered(
                attribute=attribute,
                accuracy=float((states[attribute].says == ask.value).double().mean()),
                chance=1 / len(ask.answers),
            )
            for attribute, ask in asked.items()
        ),
        by_count=tuple(found[:-1]),
        whole=found[-1],
        best=max(scored, key=lambda one: one.score.value if one.score else 0.0).n_latents if scored else None,
    )


def _ask(model: HookedModel, entities: Entities, attribute: str) -> _Asked:
    names = list(entities.values)
    before, _, after = entities.prompts[attribute].partition("{entity}")
    texts = [f"{before}{name}{after}" for name in names]
    prompts = model.prompts(texts)
    place = torch.tensor([len(model.to_tokens(f"{before}{name}")[0]) - 1 for name in names])
    for text, name, row, last in zip(texts, names, prompts.tokens, place.tolist(), strict=True):
        if model.to_tokens(f"{before}{name}")[0].tolist() != row[: last + 1].tolist():
            raise InputError(f"The last token of {name} is not its own", got=text, fix="Put a space behind {entity}")
    values = sorted({entities.values[name][attribute] for name in names})
    answers = [int(model.to_tokens(f" {value}", prepend_bos=False)[0, 0]) for value in values]
    if len(set(answers)) < len(answers):
        raise InputError(f"Two values of {attribute} begin with the same token", got=", ".join(values))
    value = torch.tensor([values.index(entities.values[name][attribute]) for name in names])
    return _Asked(prompts, place, torch.tensor(answers), value)


def _states(model: HookedModel, dictionary: SparseDictionary, ask: _Asked, rows: int) -> _States:
    codes, y, says = [], [], []
    for part in torch.arange(len(ask.place)).split(rows):
        prompts = _rows(ask.prompts, part)
        logits, cache = model.run_with_cache(prompts, _names(dictionary))
        read, here = Read(cache), (torch.arange(len(part)), ask.place[part])
        codes.append(in_decoder_units(dictionary, read.x(dictionary)[here]))
        y.append(read.y(dictionary)[here].cpu())
        says.append(_answer(logits, prompts, ask.answers))
    return _States(torch.cat(codes), torch.cat(y), torch.cat(says))


def _names(dictionary: SparseDictionary) -> list[str]:
    return list(dict.fromkeys((*dictionary.origin.inputs, *dictionary.origin.outputs)))


def _rows(prompts: Prompts, which: Tensor) -> Prompts:
    mask = None if prompts.mask is None else prompts.mask[which.to(prompts.mask.device)]
    return Prompts(prompts.tokens[which.to(prompts.tokens.device)], mask)


def _answer(logits: Float[Tensor, "row pos d_vocab"], prompts: Prompts, answers: Tensor) -> Int[Tensor, " row"]:
    n = prompts.tokens.shape[1] if prompts.mask is None else prompts.mask.sum(1).cpu()
    last = torch.as_tensor(n).expand(len(logits)) - 1
    return logits[torch.arange(len(logits)), last.to(logits.device)][:, answers.to(logits.device)].argmax(1).cpu()


def _pairs(n: int, pairs: int, seed: int) -> Int[Tensor, "pair 2"]:
    """Ordered pairs of different entities (base, source)."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(n, (pairs,), generator=generator)
    return torch.stack([base, (base + torch.randint(1, n, (pairs,), generator=generator)) % n], 1)


@dataclass(frozen=True)
class _Exchange:
    model: HookedModel
    dictionary: SparseDictionary
    asked: dict[str, _Asked]
    states: dict[str, _States]
    rows: int
    bar: Progress

    def figures(self, count: int, drawn: list[Int[Tensor, "pair 2"]]) -> Disentangled:
        """Cause and isolation with `count` latents of each attribute exchanged."""
        result = {
            (target, about): torch.stack([self._kept(target, about, count, pairs) for pairs in drawn])
            for target in self.asked
            for about in self.asked
        }
        cause = {target: _estimate(result[target, target]) for target in self.asked}
        isolation = {
            target: {about: _estimate(result[target, about]) for about in self.asked if about != target}
            for target in self.asked
        }
        return Disentangled(n_latents=count, score=_score(result, list(self.asked)), cause=cause, isolation=isolation)

    def _kept(self, target: str, about: str, count: int, pairs: Int[Tensor, "pair 2"]) -> Float[Tensor, " pair"]:
        """With `target`'s latents exchanged and `about` asked for: 1 where the answer is as wanted, NaN where the pair does
        not count. For the cause (`target` is `about`) the values must differ, and both be answered rightly."""
        ask, state = self.asked[about], self.states[about]
        base, source = pairs.T
        right = state.says == ask.value
        counts = right[base]
        if target == about:
            counts = counts & right[source] & (ask.value[base] != ask.value[source])
        else:
            other = self.asked[target].value
            counts = counts & (other[base] != other[source])
        wanted = ask.value[source if target == about else base]
        found = torch.full((len(pairs),), torch.nan)
        counted = counts.nonzero()[:, 0]
        for part in counted.split(self.rows) if len(counted) else ():
            says = self._run(target, about, count, base[part], source[part])
            found[part] = (says == wanted[part]).float()
        self.bar.advance(len(pairs))
        return found

    def _run(self, target: str, about: str, count: int, base: Tensor, source: Tensor) -> Int[Tensor, " row"]:
        ask, state = self.asked[about], self.states[about]
        latents = attribute_latents(self.states[target].codes, self.asked[target].value)[:count]
        change = state.codes[source][:, latents] - state.codes[base][:, latents]
        y = state.y[base] + change @ decoder_rows(self.dictionary).cpu()[latents]
        prompts = _rows(ask.prompts, base)
        where: Bool[Tensor, "row pos"] = torch.zeros(prompts.tokens.shape, dtype=torch.bool)
        where[torch.arange(len(base)), ask.place[base]] = True
        everywhere = y[:, None].expand(-1, where.shape[1], -1)
        parts = parts_of(self.model, self.dictionary.origin.outputs, everywhere)
        logits = spliced(self.model, prompts, parts, where.to(self.model.device))
        return _answer(logits, prompts, ask.answers)


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
