"""Absorption, on words made by hand where it is known exactly, and against the definition written out for each word."""

import re

import pytest
import torch

from microtome.common.errors import InputError, ModelError
from microtome.dictionary import EncodedTexts, FirstLetters, absorption, first_letters
from microtome.dictionary.absorption import absorbed_letters, absorbed_words, encode_words, f1, split_latents
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.letters import by_beginning, context_of, spelling_accuracy, vocabulary_words
from microtome.model import HookedModel

from .handmade import encoded, perfect_dictionary
from .test_points import ORIGINS, random_at

N = 60


def words_with_absorbers(share_of_main: float = 0.0) -> tuple[EncodedTexts, torch.Tensor]:
    """Letters a and b, y = e0 and e1. Latent 0 is "a", 1 is "b"; of every fifth a-word the "a" latent has only
    `share_of_main`, and a latent of the word's own has the rest."""
    labels = torch.zeros(2 * N, 2, dtype=torch.bool)
    labels[:N, 0] = labels[N:, 1] = True
    y = labels.float() @ torch.eye(2, 3)
    special = torch.arange(0, N, 5)
    codes = torch.zeros(2 * N, 2 + len(special))
    codes[:, :2] = labels.float()
    codes[special, 0] = share_of_main
    codes[special, 2 + torch.arange(len(special))] = 1 - share_of_main
    rows = torch.zeros(2 + len(special), 3)
    rows[0], rows[1], rows[2:] = torch.eye(3)[0], torch.eye(3)[1], torch.eye(3)[0]
    return encoded(labels, y, codes, rows), special


def test_absorption_that_is_known() -> None:
    words, special = words_with_absorbers()
    found = absorbed_letters(words)
    a, b = found.letters
    assert (a.splits, a.split) == (1, (0,))
    assert a.probe_f1 == b.probe_f1 == b.sparse_f1 == 1
    assert (b.fraction, b.full, b.full_by) == (0, 0, None)
    tested = []
    for seed in range(3):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed * 1000))[N // 2 :]
        tested.append(float(torch.isin(order, special).float().mean()))
    assert a.full == pytest.approx(sum(tested) / 3)
    assert a.fraction == a.full
    assert a.full_by is not None
    assert a.full_by >= 2
    assert found.fraction.value == pytest.approx(a.fraction / 2)
    assert found.fraction.seeds == pytest.approx([share / 2 for share in tested])
    assert a.sparse_f1 < 1
    assert found.notes == ()


def test_a_weak_model_and_weak_probes_are_said() -> None:
    words, _ = words_with_absorbers()
    half = Estimate(0.5, 0.4, 0.6)
    [note] = absorbed_letters(words, spelling=half).notes
    assert note.startswith("The model names the first letter of 0.50 of the words (chance 0.50;")
    noise = torch.randn(2 * N, 3, generator=torch.Generator().manual_seed(0))
    found = absorbed_letters(encoded(words.labels, noise, words.codes, words.W_dec), spelling=Estimate(0.9, 0.8, 1.0))
    assert found.probe_f1.value < 0.7
    [note] = found.notes
    assert note.startswith(f"The letters' probes have F1 {found.probe_f1.value:.2f}")


def test_half_of_a_word_absorbed_is_a_half_and_not_full() -> None:
    words, special = words_with_absorbers(0.5)
    mask = torch.zeros(2 * N, dtype=torch.bool)
    mask[special] = True
    found = absorbed_words(words, mask, torch.eye(3)[0], torch.tensor([0]))
    assert found.fraction.tolist() == [0.5] * len(special)
    assert not found.full.any()
    assert found.most_frequent is None


def test_two_halves_of_a_letter_are_a_split() -> None:
    """Each of two latents fires for half of the words: together they gain far more than 0.03, a third one nothing."""
    labels = torch.arange(80) < 40
    codes = torch.rand(80, 5, generator=torch.Generator().manual_seed(0)) * 0.01
    codes[:40, 3] += (torch.arange(40) % 2).float()
    codes[:40, 1] += 1 - (torch.arange(40) % 2).float()
    split, score = split_latents(codes, labels, torch.arange(80) % 4 < 2)
    assert sorted(split.tolist()) == [1, 3]
    assert score == 1


def test_each_words_figures_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    n, d, f = 200, 6, 30
    codes = torch.randn(n, f, generator=generator).relu() * (torch.rand(n, f, generator=generator) < 0.2)
    rows = torch.randn(f, d, generator=generator)
    y = codes @ rows + 0.1 * torch.randn(n, d, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    split = torch.tensor([4, 9])
    words = encoded(torch.zeros(n, 1), y, codes, rows, names="a")
    found = absorbed_words(words, torch.ones(n, dtype=torch.bool), direction, split)
    kinds = set()
    for i in range(n):
        whole = float(y[i] @ direction)
        carried = [
            (float(codes[i, j] * (rows[j] @ direction)), float(rows[j] @ direction / rows[j].norm())) for j in range(f)
        ]
        main = sum(carried[j][0] for j in (4, 9))
        others = sorted((p for j, (p, c) in enumerate(carried) if j not in (4, 9) and c >= 0.1 and p > 0), reverse=True)
        absorbers = sum(others[:3])
        if whole <= 0 or main >= whole or absorbers < 0.4 * whole:
            expected, kind = 0.0, "none"
        elif main <= 0:
            expected, kind = 1.0, "all"
        else:
            taken = min(absorbers, whole - main)
            expected, kind = taken / (taken + main), "part"
        kinds.add(kind)
        assert float(found.fraction[i]) == pytest.approx(expected, abs=1e-5), i
        top = max(range(f), key=lambda j: carried[j][0])
        silent = all(float(codes[i, j]) == 0 for j in (4, 9))
        full = silent and whole > 0 and carried[top][1] >= 0.025 and carried[top][0] >= 0.4 * whole
        assert int(found.by[i]) == (top if full else -1), i
    assert kinds == {"none", "all", "part"}
    assert found.full.any()


def test_f1() -> None:
    says, labels = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert f1(says, labels) == 0.5
    assert f1(says & False, labels & False) == 0


def test_a_letter_of_three_words_is_refused() -> None:
    words, _ = words_with_absorbers()
    few = encoded(words.labels[N - 3 :], words.y[N - 3 :], words.codes[N - 3 :], words.W_dec)
    with pytest.raises(InputError, match="Too few words begin with a"):
        absorbed_letters(few)


# ---- on models ----------------------------------------------------------------------------------------------------------


def made_task(contexts: int = 24) -> FirstLetters:
    """Words and what comes before them are random tokens; there are so many different beginnings."""
    prompts = torch.randint(2, 320, (24, 9), generator=torch.Generator().manual_seed(0))
    prompts[:, :-1] = prompts[torch.arange(24) % contexts, :-1]
    return FirstLetters(
        words=tuple(map(str, range(24))), letters=("a", "b"), label=torch.arange(24) % 2, prompts=prompts, asks=":"
    )


@pytest.mark.parametrize("contexts", [24, 3, 1])
def test_words_are_read_at_the_last_token(tiny_llama: HookedModel, contexts: int) -> None:
    task, sae = made_task(contexts), random_at(ORIGINS["transcoder"], 32, 32, center=False, skip=True)
    words = encode_words(tiny_llama, sae, task, rows=5)
    _, cache = tiny_llama.run_with_cache(task.prompts)
    torch.testing.assert_close(words.x, cache["blocks.0.hook_resid_post"][:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(words.y, cache["blocks.1.hook_resid_pre"][:, -1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(words.codes, sae.encode(words.x).to_dense())
    assert words.labels[:, 0].tolist() == [True, False] * 12


def test_a_perfect_dictionary_of_any_model_gives_figures_and_chance(tiny_llama: HookedModel) -> None:
    sae = perfect_dictionary(ORIGINS["autoencoder"], 32)
    found = absorption(tiny_llama, sae, task=made_task(), spell=20)
    assert found.chance == 0.5
    assert found.spelling is not None
    assert 0 <= found.spelling.value <= 1
    assert found.n_words == 24


@pytest.mark.parametrize("contexts", [24, 3])
def test_spelling_is_right_where_the_letter_is_the_likeliest(tiny_llama: HookedModel, contexts: int) -> None:
    task = made_task(contexts)
    right = spelling_accuracy(tiny_llama, task, most=24)
    colon = tiny_llama.to_tokens(":", prepend_bos=False)
    logits = tiny_llama(torch.cat([task.prompts, colon.expand(24, -1)], 1))[:, -1]
    ids = [int(tiny_llama.to_tokens(f" {c}", prepend_bos=False)[0, 0]) for c in "AB"]
    direct = logits[:, ids].argmax(1) == task.label
    assert sorted(right.tolist()) == sorted(direct.float().tolist())


def test_prompts_of_one_token_share_nothing(tiny_llama: HookedModel) -> None:
    """Without shots, a model that puts no BOS first reads the word alone."""
    prompts = torch.randint(2, 320, (24, 1), generator=torch.Generator().manual_seed(0))
    parts = list(by_beginning(tiny_llama, prompts, rows=40))
    assert torch.equal(torch.cat([part for part, _ in parts]), torch.arange(24))
    logits = torch.cat([begun.logits(prompts[part]) for part, begun in parts])
    torch.testing.assert_close(logits, tiny_llama(prompts)[:, -1], atol=1e-5, rtol=1e-4)


def test_a_small_vocabulary_is_refused(tiny_llama: HookedModel) -> None:
    with pytest.raises(InputError, match="too few words"):
        first_letters(tiny_llama)
    nameless = HookedModel(tiny_llama.hf, None, name="tiny", spec=tiny_llama.spec)
    with pytest.raises(ModelError, match="without a tokenizer"):
        first_letters(nameless)


def test_the_real_vocabulary_has_words_of_one_token(smol: HookedModel) -> None:
    words = vocabulary_words(smol)
    assert "snake" in words["s"]
    assert sum(map(len, words.values())) > 5000
    task = first_letters(smol, per_letter=4, least=100, shots=2, contexts=5, asks=":")
    assert {word[0] for word in task.words} == set(task.letters)
    for word, row, label in zip(task.words, task.prompts, task.label.tolist(), strict=True):
        assert smol.to_string(row[-1:]) == f" {word}"
        assert task.letters[label] == word[0]
        shown = str(smol.to_string(row[1:-1])).split()
        assert word not in {other.strip(":") for other in shown}
        assert shown[1::2] == [other[0].upper() for other in shown[::2]]
    assert smol.to_string(task.prompts[0]).count("\n") == 2
    assert 1 < len(task.prompts[:, :-1].unique(dim=0)) <= 5
    said = smol.to_string(first_letters(smol, per_letter=4, least=100, shots=1).prompts[0, 1:-1])
    assert re.fullmatch(r" (\w)\w+ has the first letter: ([A-Z])\n", str(said))
    bare = first_letters(smol, per_letter=4, least=100, shots=0)
    assert bare.prompts.shape[1] == 2


def test_a_word_never_stands_in_its_own_context() -> None:
    contexts = [["ant", "bee"], ["bee", "cat"], ["cat", "dog"]]
    assert [context_of(word, contexts, at) for word, at in (("bee", 0), ("cat", 1), ("ant", 1), ("dog", 2))] == [
        ["cat", "dog"],
        ["ant", "bee"],
        ["bee", "cat"],
        ["ant", "bee"],
    ]
