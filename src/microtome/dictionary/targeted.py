"""Taking a property out: do a few latents carry it, and nothing else? Two scores on probes of the model's activations.

*TPP*, targeted probe perturbation (Marks et al.; Karvonen et al., SAEBench, 2503.09532): for each attribute of the same
texts take out the n latents that raise its probe most; the score is how much accuracy its probe loses, less the mean loss
of the other attributes' probes.

*SCR*, spurious correlation removal: a probe for a wanted attribute, trained where it always comes with a spurious one,
uses both. Take out the n latents that the spurious attribute's probe uses most: (acc_ablated − acc_biased) / (acc_clean −
acc_biased) on texts where the two are independent; acc_clean is a probe's that was trained on such texts.

Latents are ranked by (mean code with the attribute − mean without) · (decoder row · probe). Neither score ranks
dictionaries reliably (2605.18229): read them with their intervals, and beside sparse probing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.errors import InputError
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.labelled import EncodedTexts, LabelledTexts
from microtome.dictionary.logistic import Probes, fit_probes
from microtome.dictionary.probing import SEEDS

COUNTS = (2, 5, 10, 20, 50)
_LEAST_GAP = 0.05


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """TPP of one set of texts by the number of latents taken out: the `score` (mean over attributes), and its two parts."""

    task: str
    attributes: tuple[str, ...]
    accuracy: float
    score: dict[str, Estimate]
    intended: dict[str, float]
    unintended: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """SCR of one ordered pair of attributes by the number of latents taken out. `score` is None where the biased probe is
    less than 0.05 worse than the clean one: there is nothing to remove."""

    task: str
    wanted: str
    spurious: str
    biased: float
    clean: float
    accuracy: dict[str, float]
    score: dict[str, Estimate] | None


def tpp(
    encoded: Sequence[EncodedTexts], *, counts: Sequence[int] = COUNTS, seeds: Sequence[int] = SEEDS
) -> list[Perturbed]:
    """TPP of every set with two attributes or more. Raises InputError if there is none."""
    check_tpp(encoded)
    return [_perturbed(texts, counts, seeds) for texts in encoded if len(texts.attributes) > 1]


def check_tpp(texts: Sequence[LabelledTexts] | Sequence[EncodedTexts]) -> None:
    """Raise InputError where no set has two attributes or more."""
    if not any(len(one.attributes) > 1 for one in texts):
        raise InputError(
            "TPP needs texts with two attributes or more",
            got=", ".join(one.name for one in texts),
            fix='Give labels of three kinds or more, or a second label in a column "spurious"',
        )


def _perturbed(texts: EncodedTexts, counts: Sequence[int], seeds: Sequence[int]) -> Perturbed:
    n, n_attributes = texts.labels.shape
    score = {count: torch.full((len(seeds), n), torch.nan) for count in counts}
    intended, unintended = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    accuracy = 0.0
    for row, seed in enumerate(seeds):
        train = _half(texts.labels, seed)
        probes = fit_probes(texts.y[train], texts.labels[train])
        before = probes.right(texts.y, texts.labels)
        accuracy += float(before[~train].mean()) / len(seeds)
        drops = {count: torch.zeros(2, n) for count in counts}
        for attribute in range(n_attributes):
            order = by_effect(texts, train, attribute, probes)
            for count in counts:
                lost = (before - probes.right(texts.without(order[:count]), texts.labels)).float()
                others = torch.arange(n_attributes) != attribute
                drops[count] += torch.stack([lost[:, attribute], lost[:, others].mean(1)]) / n_attributes
        for count, (own, other) in drops.items():
            score[count][row, ~train] = (own - other)[~train]
            intended[count] += float(own[~train].mean()) / len(seeds)
            unintended[count] += float(other[~train].mean()) / len(seeds)
    return Perturbed(
        task=texts.name,
        attributes=texts.attributes,
        accuracy=accuracy,
        score={str(count): Estimate.of_mean(values) for count, values in score.items()},
        intended={str(count): value for count, value in intended.items()},
        unintended={str(count): value for count, value in unintended.items()},
    )


def scr(
    encoded: Sequence[EncodedTexts], *, counts: Sequence[int] = COUNTS, seeds: Sequence[int] = SEEDS
) -> list[Removed]:
    """SCR of every ordered pair of attributes of one set whose four combinations all have eight texts. Raises InputError if
    there is no such pair."""
    pairs = [(texts, *pair) for texts in encoded for pair in _crossed(texts.labels)]
    _check_pairs(pairs, encoded)
    return [_removed(texts, wanted, spurious, counts, seeds) for texts, wanted, spurious in pairs]


def check_scr(texts: Sequence[LabelledTexts]) -> None:
    """Raise InputError where no set has a pair of attributes whose four combinations all have eight texts."""
    _check_pairs([pair for one in texts for pair in _crossed(torch.tensor(list(one.attributes.values())).T)], texts)


def _crossed(labels: Bool[Tensor, "text attribute"]) -> list[tuple[int, int]]:
    """The ordered pairs of attributes whose four combinations all have eight texts."""
    pairs = permutations(range(labels.shape[1]), 2)
    return [(a, b) for a, b in pairs if min(len(cell) for cell in _cells(labels[:, [a, b]])) >= 8]


def _check_pairs(pairs: Sequence[object], texts: Sequence[LabelledTexts] | Sequence[EncodedTexts]) -> None:
    if not pairs:
        raise InputError(
            "SCR needs texts with two attributes in all four combinations, eight of each",
            got=", ".join(one.name for one in texts),
            fix='Give a second label, independent of the first, in a column "spurious"',
        )


def _removed(texts: EncodedTexts, wanted: int, spurious: int, counts: Sequence[int], seeds: Sequence[int]) -> Removed:
    n = len(texts.labels)
    right = {name: torch.zeros(len(seeds), n) for name in ("biased", "clean", *map(str, counts))}
    tested = torch.zeros(len(seeds), n)
    wanted_label = texts.labels[:, [wanted]]
    for row, seed in enumerate(seeds):
        biased_rows, clean_rows, test = _splits(texts.labels[:, [wanted, spurious]], seed)
        biased = fit_probes(texts.y[biased_rows], wanted_label[biased_rows])
        clean = fit_probes(texts.y[clean_rows], wanted_label[clean_rows])
        of_spurious = fit_probes(texts.y[clean_rows], texts.labels[clean_rows][:, [spurious]])
        order = by_effect(texts, clean_rows, spurious, of_spurious, column=0)
        tested[row, test] = 1
        right["biased"][row, test] = biased.right(texts.y[test], wanted_label[test])[:, 0].float()
        right["clean"][row, test] = clean.right(texts.y[test], wanted_label[test])[:, 0].float()
        for count in counts:
            ablated = texts.without(order[:count])[test]
            right[str(count)][row, test] = biased.right(ablated, wanted_label[test])[:, 0].float()
    accuracy = {name: float((values.sum(1) / tested.sum(1)).mean()) for name, values in right.items()}
    gap = right["clean"] - right["biased"]
    enough = accuracy["clean"] - accuracy["biased"] >= _LEAST_GAP
    # Summed over seeds first: the gap of one seed alone may be nothing.
    scores = {
        str(count): Estimate.of_ratio((right[str(count)] - right["biased"]).sum(0)[None], gap.sum(0)[None])
        for count in counts
    }
    return Removed(
        task=texts.name,
        wanted=texts.attributes[wanted],
        spurious=texts.attributes[spurious],
        biased=accuracy.pop("biased"),
        clean=accuracy.pop("clean"),
        accuracy=accuracy,
        score=scores if enough else None,
    )


def by_effect(
    texts: EncodedTexts, train: Tensor, attribute: int, probes: Probes, column: int | None = None
) -> Int[Tensor, " d_sae"]:
    """The latents by how much they raise the attribute's probe where the attribute is there, most first."""
    codes, labels = texts.codes[train], texts.labels[train][:, attribute]
    difference = codes[labels].mean(0) - codes[~labels].mean(0)
    direction = probes.weight[:, attribute if column is None else column].float()
    return (difference * (texts.W_dec @ direction)).argsort(descending=True, stable=True)


def _half(labels: Bool[Tensor, "text attribute"], seed: int) -> Bool[Tensor, " text"]:
    """Every second of the texts in the order of their labels, drawn with `seed`: half of each combination."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    order = torch.tensor(sorted(shuffled, key=lambda i: labels[i].tolist()))
    return torch.zeros(len(labels), dtype=torch.bool).index_fill(0, order[::2], True)


def _cells(labels: Bool[Tensor, "text 2"]) -> list[Int[Tensor, " member"]]:
    """The texts of each combination: neither, the second only, the first only, both."""
    return [(labels == torch.tensor(pair)).all(1).nonzero()[:, 0] for pair in ((0, 0), (0, 1), (1, 0), (1, 1))]


def _splits(labels: Bool[Tensor, "text 2"], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a training set where both labels agree, of one of the same size with all combinations alike, and of a test
    set with all combinations alike."""
    generator = torch.Generator().manual_seed(seed)
    cells = [cell[torch.randperm(len(cell), generator=generator)] for cell in _cells(labels)]
    half = min(len(cell) for cell in cells) // 2
    test = torch.cat([cell[half : 2 * half] for cell in cells])
    biased = torch.cat([cells[0][:half], cells[3][:half]])
    clean = torch.cat([cell[: half // 2] for cell in cells])
    return biased, clean, test


def probe_direction(probes: Probes, column: int) -> Float[Tensor, " d"]:
    """The probe's weights as a unit vector in float32."""
    weight = probes.weight[:, column].float()
    direction: Tensor = weight / weight.norm().clamp_min(1e-30)
    return direction
