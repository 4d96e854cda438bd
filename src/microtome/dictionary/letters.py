"""The first-letter task: words that are one token, in prompts that show what to do with a few others.

A prompt is lines of `word: letter`; the activations wanted are those at the last word, before its letter is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.common.errors import InputError, ModelError
from microtome.common.progress import progress
from microtome.model import HookedModel


@dataclass(frozen=True, kw_only=True)
class FirstLetters:
    """Words, the number of each one's letter among `letters`, and prompts `[word, pos]` that end in the word."""

    words: tuple[str, ...]
    letters: tuple[str, ...]
    label: Int[Tensor, " word"]
    prompts: Int[Tensor, "word pos"]


def first_letters(
    model: HookedModel, *, per_letter: int = 100, least: int = 12, shots: int = 4, seed: int = 0
) -> FirstLetters:
    """Up to `per_letter` words of each letter that begins at least `least`, drawn from the tokenizer's vocabulary, each behind
    `shots` other words with their letters.

    Raises ModelError without a tokenizer, InputError where fewer than two letters have enough words.
    """
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
    rows = [_prompt(model, word, everything, shots, generator) for word, _ in chosen]
    length = min(map(len, rows))
    if any(len(row) != length for row in rows):
        raise InputError("Prompts of the first-letter task differ in length", got=sorted(set(map(len, rows))))
    return FirstLetters(
        words=tuple(word for word, _ in chosen),
        letters=tuple(by_letter),
        label=torch.tensor([number for _, number in chosen]),
        prompts=torch.tensor(rows),
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


def _prompt(model: HookedModel, word: str, others: Sequence[str], shots: int, generator: torch.Generator) -> list[int]:
    chosen = [others[i] for i in torch.randint(len(others), (shots,), generator=generator).tolist()]
    lines = "".join(f" {other}: {other[0].upper()}\n" for other in chosen)
    ids: list[int] = model.to_tokens(f"{lines} {word}")[0].tolist()
    return ids


@torch.no_grad()
def spelling_accuracy(
    model: HookedModel, task: FirstLetters, *, most: int = 100, seed: int = 0, rows: int = 32
) -> Float[Tensor, " word"]:
    """1 for each of up to `most` words whose first letter the model names: among the letters of the task, the right one is
    the likeliest behind `word:`."""
    chosen = torch.randperm(len(task.words), generator=torch.Generator().manual_seed(seed))[:most]
    colon = model.to_tokens(":", prepend_bos=False)[0].cpu()
    answers = torch.tensor([model.to_tokens(f" {c.upper()}", prepend_bos=False)[0, 0] for c in task.letters])
    right = []
    with progress(len(chosen), "spell", "words") as bar:
        for part in chosen.split(rows):
            tokens = torch.cat([task.prompts[part], colon.expand(len(part), -1)], 1).to(model.device)
            logits = model(tokens)[:, -1, answers.to(model.device)]
            right.append((logits.argmax(1).cpu() == task.label[part]).float())
            bar.advance(len(part))
    return torch.cat(right)
