"""Matching pursuit and AbsTopK: against plain twins, and wherever else dictionaries are used."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from microtome.activations import ArraySource
from microtome.circuits import logit_attribution
from microtome.common.artifacts import read_json
from microtome.common.errors import ConfigError
from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    DictionarySet,
    EvaluateConfig,
    Origin,
    compare,
    evaluate,
    load_dictionary,
    save_dictionary,
    split_signs,
)
from microtome.dictionary.activation import AbsTopK, Activation, TopK
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.config import TopKConfig
from microtome.dictionary.pursuit import MatchingPursuit
from microtome.dictionary.trainer import TrainConfig, train
from microtome.features import IndexConfig, build_index
from microtome.model import HookedModel
from microtome.text import TokenDataset

HOOK = "blocks.1.hook_resid_pre"
SMALL = EvaluateConfig(n_tokens=500, function_tokens=48, batch_tokens=100)


def made_of(activation: Activation, *, d_in: int = 32, d_sae: int = 60, name: str = "tiny-llama") -> Dictionary:
    """Random rows of norm one, which are the encoder too, and a bias of the output."""
    made = Dictionary(d_in, d_sae, activation, origin=Origin.at(name, HOOK))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        rows = torch.randn(d_sae, d_in, generator=generator)
        made.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        made.encoder.copy_(made.W_dec)
        made.b_dec.copy_(torch.randn(d_in, generator=generator) * 0.1)
    return made.requires_grad_(False)


def x_of(n: int = 30, d: int = 32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1))


# ---- matching pursuit ---------------------------------------------------------------------------------------------------------


def pursued(row: Tensor, rows: Tensor, steps: int, threshold: float, *, stop_on_again: bool) -> tuple[Tensor, str]:
    """One row's codes, a step at a time, and why it ended."""
    f = torch.zeros(len(rows))
    for _ in range(steps):
        products = rows @ row
        latent = int(products.argmax())
        if products[latent] <= 0:
            return f, "nothing"
        again = bool(f[latent] > 0)
        f[latent] += products[latent]
        row = row - products[latent] * rows[latent]
        if again and stop_on_again:
            return f, "again"
        if threshold > 0 and row.norm() < threshold:
            return f, "near"
    return f, "steps"


@pytest.mark.parametrize(
    ("steps", "threshold", "stop", "norm", "ends"),
    [
        (32, 2.5, True, 1.0, {"near", "again"}),
        (5, 0.0, True, 1.0, {"steps"}),
        (32, 1e-2, True, 0.8, {"again"}),
        (40, 2.0, False, 0.8, {"near", "steps"}),
    ],
    ids=["threshold", "iterations", "again", "again-and-on"],
)
def test_a_matching_pursuit_is_its_plain_twin(
    steps: int, threshold: float, stop: bool, norm: float, ends: set[str]
) -> None:
    made = made_of(MatchingPursuit(steps, threshold, stop_on_duplicate_support=stop))
    made.W_dec.mul_(norm)
    made.encoder.mul_(norm)
    x = x_of()
    found = made.encode(x)
    wanted = [pursued(row - made.b_dec, made.W_dec, steps, threshold, stop_on_again=stop) for row in x]
    assert {why for _, why in wanted} == ends
    torch.testing.assert_close(found.to_dense(), torch.stack([f for f, _ in wanted]))
    assert torch.equal(found.l0, torch.stack([(f > 0).sum() for f, _ in wanted]).float())
    torch.testing.assert_close(made(x), found.to_dense() @ made.W_dec + made.b_dec)


def test_a_pursuit_ends_where_nothing_is_positive() -> None:
    """One latent, and a row that points away from it."""
    made = Dictionary(2, 1, MatchingPursuit(5, 0.0, stop_on_duplicate_support=False), origin=Origin.at("m", HOOK))
    with torch.no_grad():
        made.encoder.copy_(torch.tensor([[1.0, 0.0]]))
        made.W_dec.copy_(made.encoder)
    codes = made.encode(torch.tensor([[-1.0, 2.0], [3.0, 2.0]])).to_dense()
    assert codes.tolist() == [[0.0], [3.0]]


def test_each_rows_codes_are_its_own() -> None:
    made, x = made_of(MatchingPursuit(32, 1.0)), x_of()
    alone = torch.cat([made.encode(row[None]).to_dense() for row in x])
    torch.testing.assert_close(made.encode(x).to_dense(), alone)


def test_a_pursuit_in_other_units() -> None:
    """Trained on activations times 4: with that folded in, the codes of x are those of 4 x over 4."""
    made, folded = made_of(MatchingPursuit(32, 4.0)), made_of(MatchingPursuit(32, 4.0))
    folded.fold_scales(torch.full((32,), 4.0), torch.full((32,), 4.0))
    assert folded.activation.residual_threshold == 1.0
    torch.testing.assert_close(folded.encode(x_of()).to_dense(), made.encode(4 * x_of()).to_dense() / 4)


def test_folding_decoder_norms(tmp_path: Path) -> None:
    """With equal norms the codes grow by them and the rest is measured as before; with others another latent would be found."""
    made, long = made_of(MatchingPursuit(32, 2.5)), made_of(MatchingPursuit(32, 2.5))
    long.W_dec.mul_(0.5)
    long.encoder.mul_(2)
    long.fold_decoder_norms()
    torch.testing.assert_close(long.encode(x_of()).to_dense(), made.encode(x_of()).to_dense())
    made.W_dec[3] *= 2
    with pytest.raises(ConfigError, match="which latents are the largest. Got: matching_pursuit"):
        save_dictionary(made, tmp_path, fold_decoder_norms=True)


def test_folding_norms_of_one_leaves_a_pursuit_as_it_is(tmp_path: Path) -> None:
    """Also in that SAELens has it: its decoder is its encoder, to the last bit."""
    made = made_of(MatchingPursuit(32, 2.5))
    save_dictionary(made, tmp_path, fold_decoder_norms=True)
    assert read_json(tmp_path / "cfg.json")["architecture"] == "matching_pursuit"
    assert load_dictionary(tmp_path).fingerprint == made.fingerprint


def test_where_a_pursuit_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no function of its pre-activations"):
        MatchingPursuit(3).codes(torch.ones(1, 2), torch.zeros(2))
    with pytest.raises(ConfigError, match="d_in 8, d_out 6"):
        Dictionary(8, 9, MatchingPursuit(3), origin=Origin.at("m", HOOK), d_out=6, center=False)
    with pytest.raises(ConfigError, match="codes of pre-activations. Got: matching_pursuit"):
        CrossLayerTranscoder(8, 9, MatchingPursuit(3), origin=Origin(model_name="m", inputs=("a", "b")))
    with pytest.raises(ConfigError, match="max_iterations must be positive. Got: 0"):
        MatchingPursuit(0)


def test_a_set_of_pursuits() -> None:
    first, second = made_of(MatchingPursuit(32, 1.0)), made_of(AbsTopK(3))
    second.origin = Origin.at("tiny-llama", "blocks.0.hook_resid_pre")
    both, x = DictionarySet([first, second]), torch.cat([x_of(), x_of().flip(0)], 1)
    torch.testing.assert_close(both(x), torch.cat([first(x[:, :32]), second(x[:, 32:])], 1))


# ---- signs -----------------------------------------------------------------------------------------------------------------------


def test_the_largest_absolute_values_with_their_signs() -> None:
    made, x = made_of(AbsTopK(4)), x_of()
    pre = made.pre_activations(x)
    edge = pre.abs().sort(1, descending=True).values[:, 3:4]
    wanted = torch.where(pre.abs() >= edge, pre, 0.0)
    codes = made.encode(x)
    assert torch.equal(codes.to_dense(), wanted)
    assert (wanted < 0).any(1).sum() > 20
    assert torch.equal(codes.l0, torch.full((30,), 4.0))
    assert torch.equal(SparseCodes.of_dense(wanted).to_dense(), wanted)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_signs_taken_apart(norm: str) -> None:
    """A latent for each direction, and the same output."""
    made = made_of(AbsTopK(4))
    made.input_norm = norm  # type: ignore[assignment]
    both, x = split_signs(made), x_of()
    codes, dense = made.encode(x).to_dense(), both.encode(x).to_dense()
    assert (both.architecture, both.d_sae, both.k) == ("topk", 120, 4)
    torch.testing.assert_close(dense, torch.cat([codes.relu(), (-codes).relu()], 1))
    torch.testing.assert_close(both(x), made(x))
    with pytest.raises(ConfigError, match="has signs to split. Got: topk"):
        split_signs(both)


def test_a_training_begins_with_split_signs(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    both = split_signs(made_of(AbsTopK(3)))
    save_dictionary(both, tmp_path / "start")
    config = TopKConfig(k=3, d_sae=both.d_sae, fine_tune=str(tmp_path / "start"), lr=1e-9)
    run = TrainConfig(n_tokens=64, batch_size=32)
    [made] = train(config, ArraySource(x_of(64)), out=tmp_path / "out", config=run)
    torch.testing.assert_close(made(x_of(16)), both(x_of(16)), rtol=1e-4, atol=1e-4)


# ---- measured and used ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [AbsTopK(3), MatchingPursuit(32, 0.5)], ids=["abstopk", "pursuit"])
def test_they_are_measured_as_others_are(
    activation: Activation, tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    sae = made_of(activation)
    found = evaluate(tiny_llama, sae, tiny_dataset, EvaluateConfig(n_tokens=10**9, function_tokens=0))
    tokens = torch.from_numpy(tiny_dataset.batch(0, tiny_dataset.n_sequences))
    text = ~torch.isin(tokens, torch.tensor([0, 1]))
    rows = tiny_llama.run_with_cache(tokens)[1][HOOK][text]
    fires = sae.encode(rows).to_dense() != 0
    assert found.l0 == pytest.approx(float(fires.sum(1).double().mean()))
    assert found.n_dead == int((~fires.any(0)).sum())
    decoded = sae(rows).double()
    fvu = (rows - decoded).square().sum() / (rows.double() - rows.double().mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-4)


def test_a_latent_that_only_fires_below_zero_is_alive(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    sae = made_of(AbsTopK(1))
    sae.b_enc[7] = -1e6
    found = evaluate(tiny_llama, sae, tiny_dataset, SMALL)
    assert (found.l0, found.n_dead, found.n_dense) == (1.0, 59, 1)


def test_a_signed_dictionary_and_its_split_measure_alike(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    sae = made_of(AbsTopK(3))
    table = compare(tiny_llama, [sae, split_signs(sae)], tiny_dataset, SMALL, names=["signed", "split"])
    one, other = (row.evaluation for row in table.rows)
    assert one.l0 == other.l0
    assert one.fvu == pytest.approx(other.fvu, rel=1e-5)
    assert one.delta_ce == pytest.approx(other.delta_ce, rel=1e-3)


@pytest.mark.parametrize("activation", [AbsTopK(3), MatchingPursuit(32, 0.5)], ids=["abstopk", "pursuit"])
def test_their_features_add_up_to_the_logits(activation: Activation, tiny_llama: HookedModel) -> None:
    sae, tokens = made_of(activation), torch.tensor([[0, 7, 3, 9, 4]])
    found = logit_attribution(tiny_llama, tokens, answer=5, wrong=8, by="feature", dictionary=sae)
    x = tiny_llama.activations(tokens, HOOK)[HOOK][0, -1:]
    fires = (sae.encode(x).to_dense() != 0)[0]
    for latent in range(60):
        assert (f"F{latent}" in found.effects.axes[0].labels) == bool(fires[latent]), latent
    logits = tiny_llama(tokens)[0, -1]
    torch.testing.assert_close(found.effects.values.sum(), logits[5] - logits[8], atol=1e-4, rtol=1e-4)


def test_an_index_of_each(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    """Signed codes are refused, a latent for each sign is not; a pursuit's counts are those of a plain run."""
    config = IndexConfig(sink_norm=float("inf"))
    signed, data = made_of(AbsTopK(3)), tiny_dataset.slice(0, 4)
    with pytest.raises(ConfigError, match="has some below. Got: activation abstopk. .*--split-signs"):
        build_index(tiny_llama, signed, data, tmp_path / "signed", config=config)
    tokens = torch.from_numpy(data.batch(0, data.n_sequences))
    rows = tiny_llama.run_with_cache(tokens)[1][HOOK][~torch.isin(tokens, torch.tensor([0, 1]))]
    for name, sae in {"split": split_signs(signed), "pursuit": made_of(MatchingPursuit(32, 0.5))}.items():
        index = build_index(tiny_llama, sae, data, tmp_path / name, config=config)
        counts = (sae.encode(rows).to_dense() > 0).sum(0).tolist()
        assert [index.feature(i).row.count for i in range(0, sae.d_sae, 7)] == counts[::7]
    assert isinstance(split_signs(signed).activation, TopK)
