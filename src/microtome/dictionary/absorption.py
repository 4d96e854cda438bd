"""Feature splitting and absorption on the first-letter task (Chanin et al. 2024, "A is for Absorption", 2409.14507; the
fractions as in SAEBench, Karvonen et al. 2025, 2503.09532).

1. Logistic probes find the direction p (unit norm) of each first letter in the model's activations.
2. *Splitting*: latents are added to a letter's split set, best first, as long as a probe on the set gains at least 0.03
   in F1. The mean size over letters says how many latents one letter is split into.
3. *Absorption*: on held-out words that the letter's probe gets right, the part of y · p that the split latents should
   carry and another latent carries instead: one for "snake", say, that holds "begins with s" as well.

With m the split latents' projection f · (W_dec p), a that of the up to three strongest other latents whose decoder rows
have cosine 0.1 or more with p: the absorption fraction is 0 where a < 0.4 y · p or m ≥ y · p, 1 where m ≤ 0, else
a' / (a' + m) with a' = min(a, y · p − m). Absorption is *full* where all split latents are silent and one latent, of cosine
0.025 or more, carries at least 0.4 of y · p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.errors import InputError
from microtome.common.progress import progress
from microtome.dictionary.fit import check_fit
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.labelled import EncodedTexts, in_decoder_units
from microtome.dictionary.letters import FirstLetters, by_beginning, first_letters, spelling_accuracy
from microtome.dictionary.logistic import fit_probes
from microtome.dictionary.probing import SEEDS, ranked_latents
from microtome.dictionary.surface import ContextDictionary, Read, SparseDictionary, decoder_rows, points
from microtome.dictionary.targeted import probe_direction
from microtome.model import HookedModel

LEAST_GAIN, MOST_SPLIT = 0.03, 10
LEAST_SPELLING, LEAST_PROBE_F1 = 0.8, 0.8  # below these the figures come with a note
_PROPORTION, _FRACTION_COSINE, _FULL_COSINE, _ABSORBERS = 0.4, 0.1, 0.025, 3


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One letter, the means over seeds; `split` are the latents of the first seed, `full_by` the latent that most often
    absorbs it whole there, if one does."""

    letter: str
    n_words: int
    probe_f1: float
    sparse_f1: float
    splits: float
    fraction: float
    full: float
    split: tuple[int, ...]
    full_by: int | None


@dataclass(frozen=True, kw_only=True)
class Absorption:
    """Means over letters, with intervals over letters. `spelling` is how often the model itself names the first letter, and
    `chance` what guessing gives. `notes` says where the model or the probes are too weak for the figures to mean much."""

    letters: tuple[Letter, ...]
    splits: Estimate
    fraction: Estimate
    full: Estimate
    probe_f1: Estimate
    sparse_f1: Estimate
    spelling: Estimate | None
    chance: float
    n_words: int
    notes: tuple[str, ...]


def absorption(
    model: HookedModel,
    dictionary: SparseDictionary,
    *,
    task: FirstLetters | None = None,
    seeds: Sequence[int] = SEEDS,
    per_letter: int = 300,
    spell: int = 300,
) -> Absorption:
    """Splitting and absorption of a dictionary. `task` (else words drawn from the vocabulary, `per_letter` of each letter);
    `spell` words are used to ask the model itself.

    Raises ConfigError for a dictionary that does not fit the model; ModelError and InputError as `first_letters` does.
    """
    check_fit(model, dictionary)
    task = task or first_letters(model, per_letter=per_letter)
    spelling = Estimate.of_mean(spelling_accuracy(model, task, most=spell)[None]) if spell else None
    return absorbed_letters(encode_words(model, dictionary, task), seeds=seeds, spelling=spelling)


@torch.no_grad()
def encode_words(
    model: HookedModel, dictionary: SparseDictionary, task: FirstLetters, *, rows: int = 256
) -> EncodedTexts:
    """x, y and codes at the last token of each prompt; one attribute for each letter."""
    order, parts = [], []
    with progress(len(task.words), "encode words", "words") as bar:
        # A dictionary whose codes depend on the tokens before has to see all of them.
        share = not isinstance(dictionary, ContextDictionary)
        for which, begun in by_beginning(model, task.prompts, rows=rows, share=share):
            read = Read(begun.activations(task.prompts[which], points([dictionary])))
            x, y, coded = (part[:, -1] for part in (read.x(dictionary), read.y(dictionary), read.rows(dictionary)))
            parts.append((x.cpu(), y.cpu(), in_decoder_units(dictionary, coded)))
            order.append(which)
            bar.advance(len(which))
    back = torch.cat(order).argsort()
    x, y, codes = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    return EncodedTexts(
        name="first letter",
        attributes=task.letters,
        labels=task.label[:, None] == torch.arange(len(task.letters)),
        x=x,
        y=y,
        codes=codes,
        W_dec=decoder_rows(dictionary).cpu(),
    )


def absorbed_letters(
    words: EncodedTexts, *, seeds: Sequence[int] = SEEDS, spelling: Estimate | None = None
) -> Absorption:
    """The figures from encoded words whose attributes are letters. Raises InputError where a letter has fewer than four
    words."""
    n_letters = len(words.attributes)
    names = ("splits", "fraction", "full", "probe_f1", "sparse_f1")
    found = {name: torch.full((len(seeds), n_letters), torch.nan, dtype=torch.float64) for name in names}
    split_of, full_by = [()] * n_letters, [None] * n_letters  # type: tuple[list[tuple[int, ...]], list[int | None]]
    for row, seed in enumerate(seeds):
        train = _training_words(words, seed)
        probes = fit_probes(words.y[train], words.labels[train], balanced=True)
        for i in range(n_letters):
            labels = words.labels[:, i]
            split, sparse_f1 = split_latents(words.codes, labels, train)
            says = probes.says(words.y)[:, i]
            tested = ~train & labels & says
            absorbed = absorbed_words(words, tested, probe_direction(probes, i), split)
            figures = {
                "splits": float(len(split)),
                "fraction": float(absorbed.fraction.double().mean()),
                "full": float(absorbed.full.double().mean()),
                "probe_f1": f1(says[~train], labels[~train]),
                "sparse_f1": sparse_f1,
            }
            for name, value in figures.items():
                found[name][row, i] = value
            if row == 0:
                split_of[i], full_by[i] = tuple(split.tolist()), absorbed.most_frequent
    means = {name: values.nanmean(0) for name, values in found.items()}
    letters = tuple(
        Letter(
            letter=letter,
            n_words=int(words.labels[:, i].sum()),
            split=split_of[i],
            full_by=full_by[i],
            **{name: float(means[name][i]) for name in names},
        )
        for i, letter in enumerate(words.attributes)
    )
    estimates = {name: Estimate.of_mean(values) for name, values in found.items()}
    return Absorption(
        letters=letters,
        spelling=spelling,
        chance=1 / n_letters,
        n_words=len(words.labels),
        notes=_notes(estimates["probe_f1"], spelling, 1 / n_letters),
        **estimates,
    )


def _notes(probe_f1: Estimate, spelling: Estimate | None, chance: float) -> tuple[str, ...]:
    found = []
    if spelling is not None and spelling.value < LEAST_SPELLING:
        found.append(
            f"The model names the first letter of {spelling.value:.2f} of the words (chance {chance:.2f}; here {LEAST_SPELLING} "
            "is asked for): it does not do the task well enough for absorption to mean much."
        )
    if not probe_f1.value >= LEAST_PROBE_F1:
        found.append(
            f"The letters' probes have F1 {probe_f1.value:.2f} (here {LEAST_PROBE_F1} is asked for): their directions are rough, "
            "and so is what is absorbed of them. More words for each letter help."
        )
    return tuple(found)


def _training_words(words: EncodedTexts, seed: int) -> Bool[Tensor, " word"]:
    """Half of the words of each letter."""
    train = torch.zeros(len(words.labels), dtype=torch.bool)
    for i, letter in enumerate(words.attributes):
        members = words.labels[:, i].nonzero()[:, 0]
        if len(members) < 4:
            raise InputError(f"Too few words begin with {letter}", got=len(members), expected="at least 4")
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed * 1000 + i))
        train[members[order[: len(members) // 2]]] = True
    return train


def split_latents(
    codes: Float[Tensor, "word d_sae"], labels: Bool[Tensor, " word"], train: Bool[Tensor, " word"]
) -> tuple[Int[Tensor, " split"], float]:
    """The latents that a letter is split into, and the F1 on held-out words of a probe on them.

    Latents come in the order of their mean difference on the training words, those first that fire more with the letter;
    the set grows as long as each next one gains at least 0.03 in F1.
    """
    order = _positive_first(codes[train], labels[train])
    best = -1.0
    for k in range(1, min(MOST_SPLIT, codes.shape[1]) + 1):
        chosen = codes[:, order[:k]]
        probe = fit_probes(chosen[train], labels[train, None], balanced=True)
        score = f1(probe.says(chosen[~train])[:, 0], labels[~train])
        if k > 1 and score - best < LEAST_GAIN:
            return order[: k - 1], best
        best = score
    return order[: min(MOST_SPLIT, codes.shape[1])], best


def _positive_first(codes: Float[Tensor, "word d_sae"], labels: Bool[Tensor, " word"]) -> Int[Tensor, " d_sae"]:
    order = ranked_latents(codes, labels)
    rises = (codes[labels].mean(0) > codes[~labels].mean(0))[order]
    return torch.cat([order[rises], order[~rises]])


def f1(says: Bool[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """2 · true positives / (all that were said or are there); 0 where there are none."""
    both = float((says & labels).sum())
    return 2 * both / max(float(says.sum() + labels.sum()), 1.0)


@dataclass(frozen=True)
class Absorbed:
    """For each word: the absorption fraction, and which latent absorbs it whole (−1: none)."""

    fraction: Float[Tensor, " word"]
    by: Int[Tensor, " word"]

    @property
    def full(self) -> Bool[Tensor, " word"]:
        """Whether one latent absorbs the word whole."""
        return self.by >= 0

    @property
    def most_frequent(self) -> int | None:
        """The latent that absorbs most words, if any does."""
        return int(self.by[self.full].mode().values) if self.full.any() else None


def absorbed_words(
    words: EncodedTexts, tested: Bool[Tensor, " word"], direction: Float[Tensor, " d_out"], split: Int[Tensor, " n"]
) -> Absorbed:
    """Absorption of each tested word; `direction` has unit norm."""
    codes, whole = words.codes[tested], words.y[tested] @ direction
    along = words.W_dec @ direction
    cosine = along / words.W_dec.norm(dim=1).clamp_min(1e-30)
    projections = codes * along
    main = projections[:, split].sum(1)
    others = projections.clone()
    others[:, split] = 0
    others[:, cosine < _FRACTION_COSINE] = 0
    absorbers = others.clamp_min(0).topk(min(_ABSORBERS, others.shape[1]), dim=1).values.sum(1)
    taken = torch.minimum(absorbers, whole - main)
    fraction = torch.where(main <= 0, torch.ones_like(main), taken / (taken + main))
    nothing = (main >= whole) | (absorbers < _PROPORTION * whole) | (whole <= 0)
    strongest, latent = projections.max(1) if len(projections) else (whole, whole.long())
    silent = (codes[:, split] == 0).all(1)
    full = silent & (whole > 0) & (strongest >= _PROPORTION * whole) & (cosine[latent] >= _FULL_COSINE)
    return Absorbed(torch.where(nothing, 0.0, fraction.clamp(0, 1)), torch.where(full, latent, -1))
