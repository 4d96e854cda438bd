"""`towards_monosemanticity`: its measures against slow twins, its sheets, and the whole of it on a tiny model."""

import csv
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import microtome as mt
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary import Dictionary, EvaluateConfig, Origin, evaluate
from microtome.dictionary.activation import TopK
from microtome.model import HookedModel
from microtome.replications.monosemanticity_blind import KEY, RATINGS, comparison, score
from microtome.replications.monosemanticity_measures import (
    Firings,
    collect,
    density_clusters,
    goes_below_zero,
    losses,
    neurons_as_dictionary,
)
from microtome.replications.monosemanticity_report import unigram_loss
from microtome.replications.monosemanticity_tables import (
    TOP,
    Contexts,
    chance_greater,
    direct_logits,
    specificity,
    strings_of,
)
from microtome.replications.monosemanticity_training import MonosemanticityConfig, Subject
from microtome.replications.towards_monosemanticity import REPLICATION
from microtome.text import TokenDataset
from microtome.text.strings import TokenStrings
from microtome.views import Report

HOOK = "blocks.2.mlp.hook_post"


@pytest.fixture(scope="module")
def sae(tiny_llama: HookedModel) -> Dictionary:
    """A random dictionary of the last layer's neurons, which go below zero."""
    made = Dictionary(64, 40, TopK(5), origin=Origin.at(tiny_llama.name, HOOK))
    with torch.no_grad():
        rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
        made.W_dec.copy_(functional.normalize(rows, dim=1))
        made.encoder.copy_(made.W_dec)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def part(tiny_dataset: TokenDataset) -> TokenDataset:
    return tiny_dataset.slice(5, 65)


@pytest.fixture(scope="module")
def firings(tiny_llama: HookedModel, sae: Dictionary, part: TokenDataset) -> Firings:
    return collect(tiny_llama, sae, part, part.n_tokens)


# ---- neurons and firings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_neurons_are_a_dictionary(tiny_llama: HookedModel, part: TokenDataset, signed: bool) -> None:
    assert goes_below_zero(tiny_llama, HOOK, part)
    neurons = neurons_as_dictionary(tiny_llama, HOOK, signed=signed)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(neurons(x), x if signed else x.relu())
    dense = neurons.encode(x).to_dense()
    torch.testing.assert_close(dense[:, :64], x.relu())
    assert neurons.d_sae == (128 if signed else 64)


def test_every_firing_is_kept_strongest_first(
    tiny_llama: HookedModel, sae: Dictionary, part: TokenDataset, firings: Firings
) -> None:
    expected = []
    for sequence in range(part.n_sequences):
        tokens = torch.from_numpy(part.batch(sequence, sequence + 1))
        _, cache = tiny_llama.run_with_cache(tokens, [HOOK])
        for position, token in enumerate(tokens[0].tolist()):
            if token in part.special_ids:
                continue
            codes = sae.encode(cache[HOOK][0, position][None]).to_dense()[0]
            expected += [(i, sequence * 24 + position, float(codes[i])) for i in codes.nonzero()[:, 0].tolist()]
    assert firings.n_tokens == int((~np.isin(part.tokens, part.special_ids)).sum())
    assert len(expected) == len(firings.places) == round(firings.l0 * firings.n_tokens)
    for latent in range(40):
        mine = sorted((row for row in expected if row[0] == latent), key=lambda row: -row[2])
        places, values = firings.of(latent)
        assert (np.diff(values) <= 0).all()
        assert {row[1] for row in mine} == set(places.tolist())
        np.testing.assert_allclose(values, [row[2] for row in mine], rtol=1e-4, atol=1e-6)
    cut = firings.strongest(3)
    assert cut.counts.tolist() == [min(n, 3) for n in firings.counts]
    assert all(cut.of(i)[1].tolist() == firings.of(i)[1][:3].tolist() for i in range(40))


def test_losses_against_evaluate_and_against_plain_runs(
    tiny_llama: HookedModel, sae: Dictionary, part: TokenDataset
) -> None:
    found = losses(tiny_llama, sae, part, part.n_tokens)
    config = EvaluateConfig(n_tokens=part.n_tokens, function_tokens=part.n_tokens)
    other = evaluate(tiny_llama, sae, part, config)
    assert other.n_function_tokens == found.n_tokens
    for name, expected in (("clean", other.ce_clean), ("spliced", other.ce_spliced), ("zero", other.ce_zero)):
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5)
    assert found.recovered_zero == pytest.approx((found.zero - found.spliced) / (found.zero - found.clean))
    rows, total, n = [], 0.0, 0
    for i in range(part.n_sequences):
        tokens = torch.from_numpy(part.batch(i, i + 1))
        where = ~np.isin(tokens[0].numpy(), part.special_ids)
        rows.append(tiny_llama.activations(tokens, HOOK)[HOOK][0][where])
    mean = torch.cat(rows).mean(0)
    for i in range(part.n_sequences):
        tokens = torch.from_numpy(part.batch(i, i + 1))
        is_text = torch.from_numpy(~np.isin(tokens[0].numpy(), part.special_ids))

        def to_mean(x: torch.Tensor, _: object, here: torch.Tensor = is_text) -> torch.Tensor:
            return torch.where(here[None, :, None], mean, x)

        logits = tiny_llama.run_with_hooks(tokens, [(HOOK, to_mean)])
        each = functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        total, n = total + float(each[is_text[1:]].sum()), n + int(is_text[1:].sum())
    assert found.mean == pytest.approx(total / n, rel=1e-5)


def test_losses_of_the_neurons_are_the_models(tiny_llama: HookedModel, part: TokenDataset) -> None:
    found = losses(tiny_llama, neurons_as_dictionary(tiny_llama, HOOK, signed=True), part, 480)
    assert found.spliced == pytest.approx(found.clean, abs=1e-5)
    assert found.recovered_zero == pytest.approx(1, abs=1e-3)


# ---- densities ------------------------------------------------------------------------------------------------------------


def test_two_clusters_are_found_where_there_are_two_and_not_in_one() -> None:
    rng = np.random.default_rng(0)
    low, high = 10 ** rng.normal(-5.5, 0.2, 300), 10 ** rng.normal(-2.5, 0.5, 700)
    found = density_clusters(np.concatenate([low, high, np.zeros(50)]).clip(0, 1))
    assert found is not None
    assert found.two
    assert found.means == pytest.approx((-5.5, -2.5), abs=0.1)
    assert found.spreads == pytest.approx((0.2, 0.5), abs=0.05)
    assert found.shares == pytest.approx((0.3, 0.7), abs=0.02)
    assert found.separation == pytest.approx(math.sqrt(2) * 3 / math.hypot(0.2, 0.5), rel=0.1)
    one = density_clusters(10 ** rng.normal(-3, 0.5, 1000))
    assert one is not None
    assert not one.two
    assert density_clusters(np.array([0.1, 0.2, 0.0])) is None


# ---- tables ---------------------------------------------------------------------------------------------------------------


def test_proxies_against_their_definitions(firings: Firings, part: TokenDataset) -> None:
    found = specificity(firings)
    assert found.latents.tolist() == [i for i in range(40) if firings.counts[i] >= TOP]
    assert len(found.latents) > 5
    flat = firings.tokens.reshape(-1).tolist()
    text = [p for p, token in enumerate(flat) if token not in part.special_ids]
    for row, latent in enumerate(found.latents.tolist()):
        places, values = firings.of(latent)
        f = dict(zip(places.tolist(), values.astype(float).tolist(), strict=True))
        top = Counter(flat[p] for p in places[:TOP].tolist())
        assert found.top_share[row] == pytest.approx(max(top.values()) / TOP)
        carried: Counter[int] = Counter()
        for p, value in f.items():
            carried[flat[p]] += value
        p = np.array(list(carried.values())) / sum(carried.values())
        assert found.entropy[row] == pytest.approx(-(p * np.log2(p)).sum(), rel=1e-5)
        activations = [f.get(p, 0.0) for p in text]
        correlations = [np.corrcoef([flat[p] == token for p in text], activations)[0, 1] for token in carried]
        assert found.explained[row] == pytest.approx(max(r**2 for r in correlations), rel=1e-4)


def test_chance_greater_against_all_pairs() -> None:
    a, b = [1, 2, 2, 5], [2, 3, 1]
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert chance_greater(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(chance_greater([], b))


def test_contexts_show_the_place_and_intervals_hold_what_they_say(tiny_llama: HookedModel, firings: Firings) -> None:
    contexts = Contexts(firings, strings_of(tiny_llama))
    latent = int(firings.counts.argmax())
    places, values = firings.of(latent)
    top = contexts.top(latent, 4)
    assert top[0].activation == pytest.approx(float(values[0]))
    sequence, position = divmod(int(places[0]), 24)
    row = firings.tokens[sequence].tolist()
    shown = TokenStrings(tiny_llama.tokenizer.backend_tokenizer).show(row)  # type: ignore[union-attr]
    assert top[0].token == shown[position]
    assert top[0].before == "".join(shown[max(position - 12, 0) : position])
    assert top[0].behind == "".join(shown[position + 1 : position + 5])
    assert [one.activation for one in top] == sorted((one.activation for one in top), reverse=True)
    drawn = contexts.sampled(latent, 4, 3, seed=0)
    assert drawn == contexts.sampled(latent, 4, 3, seed=0)
    for number, examples in enumerate(drawn):
        high = values[0] * (1 - number / 4)
        assert all(high - values[0] / 4 - 1e-6 < one.activation <= high + 1e-6 for one in examples)
    assert sum(share for _, share in contexts.tokens(latent, 1000)) == pytest.approx(1)


def test_direct_logits_against_the_models_own_weights(tiny_llama: HookedModel, sae: Dictionary) -> None:
    [(raised, lowered)] = direct_logits(tiny_llama, sae, [7], 5)
    hf = tiny_llama.hf
    direction = hf.model.layers[2].mlp.down_proj.weight @ sae.W_dec[7] * hf.model.norm.weight
    order = (hf.lm_head.weight @ direction).argsort(descending=True).tolist()
    assert raised == order[:5]
    assert lowered == order[::-1][:5]


# ---- the blind comparison -------------------------------------------------------------------------------------------------


@pytest.fixture
def sheet(tiny_llama: HookedModel, part: TokenDataset, firings: Firings, tmp_path: Path) -> Path:
    neurons = collect(tiny_llama, neurons_as_dictionary(tiny_llama, HOOK, signed=True), part, part.n_tokens)
    made = comparison({"feature": firings, "neuron": neurons}, strings_of(tiny_llama), n=4, seed=3)
    again = comparison({"feature": firings, "neuron": neurons}, strings_of(tiny_llama), n=4, seed=3)
    assert made == again
    assert "feature" not in made.items + made.ratings
    assert "neuron" not in made.items + made.ratings
    made.save(tmp_path)
    return tmp_path


def filled(folder: Path, ratings: dict[str, str]) -> Path:
    with (folder / RATINGS).open("w", newline="") as file:
        csv.writer(file).writerows(
            [("item", "rating", "confidence", "note"), *((i, r, "", "") for i, r in ratings.items())]
        )
    return folder / RATINGS


def test_a_filled_in_sheet_is_scored(sheet: Path) -> None:
    key = json.loads((sheet / KEY).read_text())["items"]
    kinds = Counter(one["kind"] for one in key.values())
    assert kinds == {"feature": 4, "neuron": 4}
    order = [one["kind"] for one in key.values()]
    assert order != sorted(order), "the order is mixed"
    ratings = {item: "5" if one["kind"] == "feature" else "2" for item, one in key.items()}
    first = next(iter(ratings))
    ratings[first] = ""  # not judged
    scores = score(filled(sheet, ratings), sheet / KEY)
    assert scores.means == pytest.approx((5, 2))
    assert sum(scores.rated) == 7
    assert scores.chance == 1
    assert scores.interval == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ({"1": "6"}, "no such rating"),
        ({"1": "good"}, "no such rating"),
        ({"99": "3"}, "not in"),
        ({"1": "3"}, "Both kinds"),
    ],
    ids=["too high", "a word", "unknown", "one kind"],
)
def test_sheets_that_cannot_be_scored(sheet: Path, ratings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(filled(sheet, ratings), sheet / KEY)


def test_filled_in_ratings_are_not_overwritten(sheet: Path, tiny_llama: HookedModel, firings: Firings) -> None:
    before = filled(sheet, {"1": "3"}).read_text()
    other = comparison({"feature": firings}, strings_of(tiny_llama), n=3, seed=4)
    with pytest.raises(InputError, match="another comparison"):
        other.save(sheet)
    assert (sheet / RATINGS).read_text() == before


# ---- the whole of it ------------------------------------------------------------------------------------------------------

QUICK = replace(
    REPLICATION.smoke,
    max_tokens=30_000,
    lm_tokens=6000,
    sae_tokens=6000,
    d_sae=96,
    sae_batch=256,
    resample_every=5,
    dead_after=1000,
    loss_tokens=512,
    table_tokens=1024,
)


def test_the_whole_of_it_is_found_again_and_writes_its_sheets(tmp_path: Path) -> None:
    settings = {"runs": str(tmp_path / "runs"), "sheets": str(tmp_path / "sheets")}
    changed = {
        name: getattr(QUICK, name)
        for name in QUICK.__dict__
        if getattr(QUICK, name) != getattr(REPLICATION.smoke, name)
    }
    report: Report = mt.replicate("towards_monosemanticity", preset="smoke", **{**changed, **settings})
    assert report["norms"].passed
    assert report["neurons_exact"].passed
    assert 0 < float(report["l0"].measured or 0) < 96
    assert {f.name for f in (tmp_path / "sheets").iterdir()} == {
        "comparison.md",
        "comparison-key.json",
        "ratings.csv",
        "features.md",
    }
    made = {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*.safetensors")}
    again: Report = mt.replicate("towards_monosemanticity", preset="smoke", **{**changed, "runs": settings["runs"]})
    assert [c.measured for c in again.claims] == [c.measured for c in report.claims]
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path / "runs").rglob("*.safetensors")}


def test_the_loss_of_token_frequencies(tiny_llama: HookedModel, sae: Dictionary, tiny_dataset: TokenDataset) -> None:
    data, held_out = tiny_dataset.split(0.8)
    counts = Counter(data.tokens.reshape(-1).tolist())
    total = sum(counts.values()) + tiny_llama.config.d_vocab
    text = [token for token in held_out.tokens.reshape(-1).tolist() if token not in held_out.special_ids]
    expected = -sum(math.log((counts[token] + 1) / total) for token in text) / len(text)
    assert unigram_loss(Subject(tiny_llama, HOOK, sae, data, held_out)) == pytest.approx(expected)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="n_heads"):
        MonosemanticityConfig(n_heads=7)
    with pytest.raises(ConfigError, match="hold a batch"):
        MonosemanticityConfig(lm_tokens=100)
