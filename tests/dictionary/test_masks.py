"""Learned masks: on a model made by hand whose attributes lie in known latents, against all masks tried one after another."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.model.families import make
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from microtome.common.errors import ConfigError
from microtome.common.progress import progress
from microtome.dictionary import Dictionary, Entities, MaskConfig, Origin, cities, disentanglement
from microtome.dictionary.activation import ReLU
from microtome.dictionary.asking import ask, states_of
from microtome.dictionary.disentanglement import Exchange, halves_of
from microtome.dictionary.masks import learn_mask
from microtome.dictionary.surface import decoder_rows
from microtome.model import HookedModel
from microtome.model.hook_point import HookPoint

NAMES = tuple("abcdefghijkl")
STREAM = Origin(model_name="by hand", inputs=("blocks.1.hook_resid_pre",))
PROMPTS = {"colour": "On ={entity}", "shape": "The ={entity}"}
# What each latent reads and writes, as (dimension, factor): colours are dimensions 0 and 1, shapes 2 and 3.
LATENTS = (
    ((0, 1.0), (0, 1.0)),
    ((1, 1.0), (1, 1.0)),
    ((2, 1.0), (2, 1.0)),
    ((3, 1.0), (3, 1.0)),
    ((0, 3.0), (2, 0.5)),  # loud, tells the colours apart, and changes the shape
    ((1, 3.0), (3, 0.5)),
    ((4, 2.0), (5, 0.0)),  # tells entities apart, and changes nothing
)


@pytest.fixture(scope="module")
def by_hand(tiny: Callable[[str], HookedModel]) -> tuple[HookedModel, Entities, Tensor]:
    """A model whose blocks add nothing: its answers are read off the last token's embedding. Also the embeddings of the
    entities."""
    made = tiny("llama")
    hf = made.hf
    embedding, unembedding = (hf.get_parameter(name).data for name in ("model.embed_tokens.weight", "lm_head.weight"))
    for name, weight in hf.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
    model = HookedModel(hf, made.tokenizer, name="by hand", spec=made.spec)
    words = [str(model.to_string(torch.tensor([i]))) for i in range(2, 320)]
    words = [word for word in words if word[:1] == " " and word[1:].isalpha()]
    ids = {word: model.to_tokens(word, prepend_bos=False)[0].tolist() for word in words}
    red, blue, round_, square = [word for word in words if len(ids[word]) == 1][:4]
    unembedding.zero_()
    for dimension, word in enumerate((red, blue, round_, square)):
        unembedding[ids[word][0], dimension] = 2.0
    rows = torch.zeros(len(NAMES), 32)
    values: dict[str, dict[str, str]] = {}
    for i, name in enumerate(NAMES):
        colour, shape = i % 2, i // 2 % 2
        rows[i, [colour, 2 + shape]] = 1.0
        rows[i, 4] = 0.5 * (i % 3)
        embedding[model.to_single_token(name)] = rows[i]
        values[name] = {"colour": (red, blue)[colour].strip(), "shape": (round_, square)[shape].strip()}
    return model, Entities(name="made", values=values, prompts=PROMPTS), rows


def dictionary_by_hand() -> Dictionary:
    sae = Dictionary(32, len(LATENTS), ReLU(), origin=STREAM, center=False).requires_grad_(False)
    sae.encoder.zero_(), sae.W_dec.zero_()
    for i, ((reads, strength), (writes, size)) in enumerate(LATENTS):
        sae.encoder[i, reads], sae.W_dec[i, writes] = strength, size
    return sae


def exact_loss(share: Tensor, rows: Tensor, target: int, train: Tensor, sparsity: float) -> float:
    """The loss over all pairs, from the embeddings alone. `target`: 0 colours, 1 shapes."""
    encoder, decoder = torch.zeros(len(LATENTS), 32), torch.zeros(len(LATENTS), 32)
    for i, ((reads, strength), (writes, size)) in enumerate(LATENTS):
        encoder[i, reads], decoder[i, writes] = strength, size
    value = torch.stack([rows[:, 1], rows[:, 3]], 1).long()
    sums: dict[int, list[Tensor]] = {0: [], 1: []}
    for base, source in product(train.tolist(), train.tolist()):
        if value[base, target] == value[source, target]:
            continue
        y = rows[base] + ((rows[source] - rows[base]) @ encoder.T * share) @ decoder
        logits = 2 * y / (y.square().mean() + 1e-6).sqrt()
        for about in (0, 1):
            wanted = value[source if about == target else base, about]
            sums[about].append(functional.cross_entropy(logits[2 * about : 2 * about + 2], wanted))
    return sum(float(torch.stack(part).mean()) for part in sums.values()) / 2 + sparsity * float(share.sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mask_is_the_best_of_all_masks(by_hand: tuple[HookedModel, Entities, Tensor], seed: int) -> None:
    model, entities, rows = by_hand
    sae, config = dictionary_by_hand(), MaskConfig(steps=60, batch=16)
    asked = {attribute: ask(model, entities, attribute) for attribute in entities.prompts}
    states = {attribute: states_of(sae, of, 32) for attribute, of in asked.items()}
    train, _ = halves_of(entities, seed)
    with progress(1, "test", "runs") as bar:
        exchange = Exchange(model, sae, asked, states, decoder_rows(sae), 32, bar)
        masks = exchange.masks(config, train, seed)
        everything = torch.cartesian_prod(train, train)
        pairs = {about: everything[exchange.counts("colour", about, everything)] for about in entities.prompts}
        share = torch.rand(len(LATENTS), generator=torch.Generator().manual_seed(seed))
        found = [
            functional.cross_entropy(
                exchange.logits(about, share, pairs[about]), exchange.wanted("colour", about, pairs[about])
            )
            for about in entities.prompts
        ]
    assert float(sum(found)) / 2 == pytest.approx(exact_loss(share, rows, 0, train, 0.0), abs=1e-5)
    every = [torch.tensor(bits, dtype=torch.float) for bits in product((0, 1), repeat=len(LATENTS))]
    for target, attribute in enumerate(entities.prompts):
        best = min(every, key=lambda mask: exact_loss(mask, rows, target, train, config.sparsity))
        assert masks[attribute].tolist() == best.tolist()
        assert best.nonzero()[:, 0].tolist() == [2 * target, 2 * target + 1]


def test_a_mask_finds_what_ranking_does_not(by_hand: tuple[HookedModel, Entities, Tensor]) -> None:
    model, entities, _ = by_hand
    found = disentanglement(
        model, dictionary_by_hand(), entities, counts=(2,), mask=MaskConfig(steps=60, batch=16), seeds=(0, 1), pairs=16
    )
    assert found.masked is not None
    assert found.masked.latents == {"colour": (0, 1), "shape": (2, 3)}
    assert found.masked.n_latents == {"colour": 2, "shape": 2}
    assert [cause.value for cause in found.masked.cause.values() if cause] == [1, 1]
    assert [kept.value for row in found.masked.isolation.values() for kept in row.values() if kept] == [1, 1]
    assert found.masked.score is not None
    assert (found.masked.score.value, found.masked.score.low) == (1, 1)
    ranked = found.by_count["2"]
    assert ranked.latents["colour"] == (4, 5)
    assert ranked.cause["colour"] is not None
    assert ranked.cause["colour"].value == 0
    assert found.best == 2
    assert found.whole.latents == {}
    assert found.whole.n_latents == {"colour": 7, "shape": 7}


def test_a_mask_of_the_attribute_alone_does_not_isolate(by_hand: tuple[HookedModel, Entities, Tensor]) -> None:
    """Without the other attribute's task the tangled latents cost nothing but their price."""
    model, entities, _ = by_hand
    config = MaskConfig(steps=60, batch=16, sparsity=0.0, alone=True)
    found = disentanglement(model, dictionary_by_hand(), entities, counts=(), mask=config, seeds=(0,), pairs=16)
    assert found.masked is not None
    assert found.masked.cause["colour"] is not None
    assert found.masked.cause["colour"].value == 1
    assert {0, 1} <= set(found.masked.latents["colour"])
    assert found.best is None


def test_latents_that_change_nothing_are_left_out_at_a_price() -> None:
    """A loss with a minimum that is known: 0.3 for each of the first two that is missing."""

    def loss(share: Tensor, _: torch.Generator) -> Tensor:
        return 0.3 * (1 - share[:2]).sum()

    assert learn_mask(loss, 5, MaskConfig(steps=30)).tolist() == [True, True, False, False, False]
    assert not learn_mask(loss, 5, MaskConfig(steps=30, sparsity=0.4)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "one step"),
        ({"batch": 0}, "one exchange"),
        ({"lr": 0.0}, "learning rate"),
        ({"temperature": (0.1, 1.0)}, "temperature"),
        ({"sparsity": -1.0}, "negative"),
    ],
    ids=["steps", "batch", "lr", "temperature", "sparsity"],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig(**settings)  # type: ignore[arg-type]


def writing(value: Tensor, place: int) -> Callable[[Tensor, HookPoint], Tensor]:
    def hook(activation: Tensor, _: HookPoint) -> Tensor:
        activation[0, place] = value
        return activation

    return hook


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "opt", "gemma3", "mixtral"])
def test_a_beginning_that_is_shared_gives_the_same_logits(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Against whole prompts, and against a plain hook; entities of one and of several tokens."""
    bare = make(kind)
    model = HookedModel(bare.hf, tiny_tokenizer, name=kind, spec=bare.spec)
    names = ("a", "xq", "zzz", "b")
    values = {name: {"first": "x", "second": "y"} for name in names}
    prompts = {"first": "On the first ={entity} on", "second": "The dog sat on ={entity} dog and"}
    entities = Entities(name="made", values=values, prompts=prompts)
    for attribute, prompt in prompts.items():
        shared, plain = (ask(model, entities, attribute, share=share) for share in (True, False))
        assert plain.begun.n == 0
        assert shared.begun.n > 3
        which = torch.tensor([2, 0, 2, 1])
        value = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        for put in ({}, {"blocks.1.hook_resid_pre": value}):
            found = shared.logits(which, put)
            torch.testing.assert_close(found, plain.logits(which, put), atol=1e-4, rtol=1e-4)
            for i, entity in enumerate(which.tolist()):
                hook = writing(value[i], int(shared.place[entity]))
                text = prompt.format(entity=names[entity])
                logits = model.run_with_hooks(text, [(name, hook) for name in put])[0, -1, shared.answers]
                torch.testing.assert_close(found[i], logits, atol=1e-4, rtol=1e-4)


def test_halves_share_nothing_and_hold_every_country() -> None:
    table = cities()
    names = list(table.values)
    seen = set()
    for seed in range(4):
        train, test = halves_of(table, seed)
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(names)))
        seen.add(tuple(train.tolist()))
        for half in (train, test):
            countries = [table.values[names[i]]["country"] for i in half.tolist()]
            assert {countries.count(country) for country in countries} == {2}
            assert len(set(countries)) == 12
    assert len(seen) == 4
