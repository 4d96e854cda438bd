"""The first-letter task: words that are one token, in prompts that show what to do with a few others.

A prompt is lines of `word has the first letter: L` (SAEBench's; Karvonen et al. 2025, 2503.09532); the activations wanted are
those at the last word, before its letter is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.common.config import require
from microtome.common.errors import InputError, ModelError
from microtome.common.progress import progress
from microtome.dictionary.beginning import Beginning
from microtome.model import HookedModel

ASKS = " has the first letter:"


@dataclass(frozen=True, kw_only=True)
class FirstLetters:
    """Words, the number of each one's letter among `letters`, and prompts `[word, pos]` that end in the word; behind `asks` the
    model says the letter."""

    words: tuple[str, ...]
    letters: tuple[str, ...]
    label: Int[Tensor, " word"]
    prompts: Int[Tensor, "word pos"]
    asks: str = ASKS


def first_letters(
    model: HookedModel,
    *,
    per_letter: int = 300,
    least: int = 12,
    shots: int = 4,
    contexts: int = 32,
    asks: str = ASKS,
    seed: int = 0,
) -> FirstLetters:
    """Up to `per_letter` words of each letter that begins at least `least`, drawn from the tokenizer's vocabulary, each behind
    `shots` other words with their letters; there are `contexts` different such beginnings.

    Raises ConfigError for numbers that cannot be, ModelError without a tokenizer, InputError where fewer than two letters have
    enough words.
    """
    require(per_letter >= 4 and least >= 4, "A letter needs four words or more", got=f"{per_letter=}, {least=}")
    require(
        shots >= 0 and contexts >= 2, "There can be no shots, and two contexts or more", got=f"{shots=}, {contexts=}"
    )
    if model.tokenizer is None:
        raise ModelError(
            f"{model.name} came without a tokenizer", fix="The first-letter task is made of its vocabulary"
        )
    generator = torch.Generator().manual_seed(seed)
    by_letter = {letter: words for letter, words in vocabulary_words(model).items() if len(words) >= least}
    if len(by_letter) < 2:
        raise InputError(
            "The vocabulary has too few words for the first-letter task",
            got=f"{len(by_letter)} letters with {least} words of one token or more",
            expected="at least two letters",
        )
    chosen = [
        (words[i], number)
        for number, words in enumerate(by_letter.values())
        for i in torch.randperm(len(words), generator=generator)[:per_letter].tolist()
    ]
    everything = [word for words in by_letter.values() for word in words]
    drawn = torch.randint(len(everything), (contexts, shots), generator=generator).tolist()
    shown = [[everything[i] for i in row] for row in drawn]
    first = torch.randint(contexts, (len(chosen),), generator=generator).tolist()
    rows = [
        _prompt(model, word, context_of(word, shown, at), asks) for (word, _), at in zip(chosen, first, strict=True)
    ]
    if len(set(map(len, rows))) > 1:
        raise InputError("Prompts of the first-letter task differ in length", got=sorted(set(map(len, rows))))
    return FirstLetters(
        words=tuple(word for word, _ in chosen),
        letters=tuple(by_letter),
        label=torch.tensor([number for _, number in chosen]),
        prompts=torch.tensor(rows),
        asks=asks,
    )


def vocabulary_words(model: HookedModel) -> dict[str, list[str]]:
    """The tokens that are a space and three ASCII letters or more, without the space, by their first letter."""
    assert model.tokenizer is not None
    found: dict[str, list[str]] = {letter: [] for letter in ascii_lowercase}
    special = set(model.tokenizer.all_special_ids)
    for i in range(min(len(model.tokenizer), model.config.d_vocab)):
        text = "" if i in special else str(model.tokenizer.decode([i]))
        word = text[1:]
        if text[:1] == " " and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower():
            found[word[0]].append(word)
    return {letter: sorted(words) for letter, words in found.items()}


def context_of(word: str, contexts: Sequence[Sequence[str]], at: int) -> Sequence[str]:
    """Context number `at`, or the next one that does not give the word away."""
    turned = [*contexts[at:], *contexts[:at]]
    return next((context for context in turned if word not in context), turned[0])


def _prompt(model: HookedModel, word: str, others: Sequence[str], asks: str) -> list[int]:
    lines = "".join(f" {other}{asks} {other[0].upper()}\n" for other in others)
    ids: list[int] = model.to_tokens(f"{lines} {word}")[0].tolist()
    return ids


def by_beginning(
    model: HookedModel, prompts: Int[Tensor, "word pos"], *, behind: int = 1, rows: int = 256, share: bool = True
) -> Iterator[tuple[Int[Tensor, " some"], Beginning]]:
    """The numbers of the prompts, some at a time, with what they have in common: all but the last `behind` tokens, which the
    model has read. Without `share`, and where hardly any two have something in common, each is read whole."""
    common = prompts[:, :-behind]
    # Rows of no tokens are all alike, but `unique` does not take them.
    beginnings, of = common.unique(dim=0, return_inverse=True) if common.shape[1] else (common, None)
    if not share or of is None or len(beginnings) * 4 > len(prompts):
        nothing = Beginning.of(model, prompts[0, :0])
        for part in torch.arange(len(prompts)).split(max(1, rows // 8)):
            yield part, nothing
        return
    for i, tokens in enumerate(beginnings):
        begun = Beginning.of(model, tokens)
        for part in (of == i).nonzero()[:, 0].split(rows):
            yield part, begun


@torch.no_grad()
def spelling_accuracy(
    model: HookedModel, task: FirstLetters, *, most: int = 300, seed: int = 0
) -> Float[Tensor, " word"]:
    """1 for each of up to `most` words whose first letter the model names: among the letters of the task, the right one is
    the likeliest behind the word and `asks`."""
    chosen = torch.randperm(len(task.words), generator=torch.Generator().manual_seed(seed))[:most]
    behind = model.to_tokens(task.asks, prepend_bos=False)[0].cpu()
    answers = torch.tensor([model.to_tokens(f" {c.upper()}", prepend_bos=False)[0, 0] for c in task.letters])
    asked = torch.cat([task.prompts[chosen], behind.expand(len(chosen), -1)], 1)
    right = torch.zeros(len(chosen))
    with progress(len(chosen), "spell", "words") as bar:
        for part, begun in by_beginning(model, asked, behind=1 + len(behind)):
            logits = begun.logits(asked[part]).cpu()[:, answers]
            right[part] = (logits.argmax(1) == task.label[chosen[part]]).float()
            bar.advance(len(part))
    return right
