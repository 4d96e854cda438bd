"""Cause and isolation: with all of the embedding exchanged, the model reads the other entity's prompt, so both are known."""

import json
from pathlib import Path

import pytest
import torch

from microtome.common.errors import InputError
from microtome.dictionary import Dictionary, Entities, Origin, cities, disentanglement, read_entities
from microtome.dictionary.activation import ReLU
from microtome.dictionary.disentanglement import attribute_latents, halves_of
from microtome.model import HookedModel

from .handmade import perfect_dictionary

NAMES = tuple("abcdefghijklm")
PROMPTS = {"first": "On the ={entity} on", "second": "walked ={entity} dog and"}
EMBEDDING = Origin(model_name="tiny-llama", inputs=("blocks.0.hook_resid_pre",))


@pytest.fixture(scope="module")
def answered(tiny_llama: HookedModel) -> Entities:
    """Entities whose values are what the tiny model says of them, among two words of one token each."""
    words = [str(tiny_llama.to_string(torch.tensor([i]))) for i in range(2, 320)]
    single = [
        w for w in words if w[:1] == " " and w[1:].isalpha() and len(tiny_llama.to_tokens(w, prepend_bos=False)[0]) == 1
    ]
    values: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    for attribute, prompt in PROMPTS.items():
        logits = torch.stack([tiny_llama(prompt.format(entity=name))[0, -1] for name in NAMES])
        ids = [int(tiny_llama.to_single_token(word)) for word in single]
        # The two words between which the answers differ most.
        pairs = [(i, j) for i in range(len(ids)) for j in range(i)]
        says = {(i, j): logits[:, [ids[i], ids[j]]].argmax(1) for i, j in pairs}
        i, j = min(pairs, key=lambda pair: abs(float(says[pair].float().mean()) - 0.5))
        for name, which in zip(NAMES, says[i, j].tolist(), strict=True):
            values[name][attribute] = single[(i, j)[which]].strip()
    return Entities(name="made", values=values, prompts=PROMPTS)


def test_exchanging_everything_makes_it_the_other_entity(tiny_llama: HookedModel, answered: Entities) -> None:
    sae = perfect_dictionary(EMBEDDING, 32)
    found = disentanglement(tiny_llama, sae, answered, counts=(1,), seeds=(0, 1), pairs=20)
    assert [one.accuracy for one in found.answered] == [1, 1]
    assert [one.chance for one in found.answered] == [0.5, 0.5]
    for attribute, cause in found.whole.cause.items():
        assert cause is not None, attribute
        assert cause.value == 1
    # What is kept of the other attribute is what both entities happen to share.
    for target, about in (("first", "second"), ("second", "first")):
        kept = found.whole.isolation[target][about]
        assert kept is not None
        shared = []
        for seed in (0, 1):
            generator, (_, test) = torch.Generator().manual_seed(seed), halves_of(answered, seed)
            base = torch.randint(len(test), (20,), generator=generator)
            source = (base + torch.randint(1, len(test), (20,), generator=generator)) % len(test)
            of = answered.values
            rows = [(NAMES[test[b]], NAMES[test[s]]) for b, s in zip(base.tolist(), source.tolist(), strict=True)]
            shared.append([of[b][about] == of[s][about] for b, s in rows if of[b][target] != of[s][target]])
        assert kept.value == pytest.approx(sum(sum(part) / len(part) for part in shared) / 2)


def test_a_dictionary_that_changes_nothing_isolates_and_does_not_cause(
    tiny_llama: HookedModel, answered: Entities
) -> None:
    sae = Dictionary(32, 16, ReLU(), origin=EMBEDDING)
    found = disentanglement(tiny_llama, sae, answered, counts=(4,), seeds=(0,), pairs=20)
    assert found.best == 4
    one = found.by_count["4"]
    assert [cause.value for cause in one.cause.values() if cause] == [0, 0]
    assert [kept.value for row in one.isolation.values() for kept in row.values() if kept] == [1, 1]
    assert one.score is not None
    assert one.score.value == 0.5


def test_a_model_that_answers_nothing_gives_no_score(tiny_llama: HookedModel, answered: Entities) -> None:
    """Every value swapped: the model is always wrong."""
    swapped = {
        name: {a: next(v for v in _values(answered, a) if v != row[a]) for a in PROMPTS}
        for name, row in answered.values.items()
    }
    wrong = Entities(name="wrong", values=swapped, prompts=PROMPTS)
    found = disentanglement(tiny_llama, perfect_dictionary(EMBEDDING, 32), wrong, counts=(2,), seeds=(0,), pairs=6)
    assert [one.accuracy for one in found.answered] == [0, 0]
    assert found.by_count["2"].score is None
    assert found.by_count["2"].cause == {"first": None, "second": None}
    assert found.best is None


def _values(entities: Entities, attribute: str) -> list[str]:
    return sorted({row[attribute] for row in entities.values.values()})


def test_the_latents_of_an_attribute_come_first() -> None:
    value = torch.arange(12) % 3
    codes = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    codes[:, 4] = value.float()
    codes[:, 2] = (value == 1).float() * 0.8
    codes[:, 1] = torch.tensor([0.0, 5, 1, 3, 2, 4] * 2)  # loud, and of no value's own
    order = attribute_latents(codes, value).tolist()
    assert order[:2] == [4, 2]
    assert order[-1] == 1


def test_the_cities_have_answers_that_differ_in_their_first_token(smol: HookedModel) -> None:
    table = cities()
    for attribute in table.prompts:
        values = {row[attribute] for row in table.values.values()}
        first = {int(smol.to_tokens(f" {value}", prepend_bos=False)[0, 0]) for value in values}
        assert len(first) == len(values) >= 4


def test_a_users_file(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"entity": name, "attributes": {"first": "x", "second": "y"}} for name in "abcd"]
    rows += [{"attribute": attribute, "prompt": prompt} for attribute, prompt in PROMPTS.items()]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_entities(path)
    assert found == Entities(
        name="mine", values={name: {"first": "x", "second": "y"} for name in "abcd"}, prompts=PROMPTS
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 1 is neither"),
        ('{"entity": "a"}', "line 1 is neither"),
        ('{"entity": "a", "attributes": {"x": "y"}}', "two attributes with prompts"),
    ],
    ids=["no json", "no attributes", "too few"],
)
def test_bad_files_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_entities(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="no file"):
        read_entities(tmp_path / "none.jsonl")


def test_tables_that_do_not_fit_are_refused(tiny_llama: HookedModel) -> None:
    values = {name: {"first": "x", "second": "y"} for name in "abcd"}
    with pytest.raises(InputError, match="entity} once"):
        Entities(name="t", values=values, prompts={"first": "no place", "second": "{entity} is"})
    with pytest.raises(InputError, match="lack third"):
        Entities(name="t", values=values, prompts={"first": "{entity} is", "third": "{entity} is"})
    same = {**values, "a": {"first": "xy", "second": "y"}}
    table = Entities(name="t", values=same, prompts=PROMPTS)
    with pytest.raises(InputError, match="begin with the same token"):
        disentanglement(tiny_llama, perfect_dictionary(EMBEDDING, 32), table)
