"""`evaluate` on dictionaries of every kind of place: perfect ones, transcoders, crosscoders, dead ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from microtome.common.errors import ConfigError, InputError
from microtome.dictionary import CrossLayerTranscoder, Dictionary, EvaluateConfig, Origin, evaluate, evaluate_all
from microtome.dictionary.activation import ReLU, TopK
from microtome.dictionary.moments import UnitSums, units_of
from microtome.dictionary.surface import decoder_rows
from microtome.model import HookedModel
from microtome.text import TokenDataset

from ..makers import random_dictionary  # noqa: TID252 – shared by tests
from .handmade import perfect_dictionary

FIRST, SECOND = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
SOME = EvaluateConfig(n_tokens=24 * 20, function_tokens=24 * 10, batch_tokens=100)
ORIGINS = {
    "autoencoder": Origin(model_name="tiny-llama", inputs=(FIRST,)),
    "transcoder": Origin(model_name="tiny-llama", inputs=("blocks.0.hook_resid_post",), outputs=(FIRST,)),
    "crosscoder": Origin(model_name="tiny-llama", inputs=(FIRST, SECOND)),
    "heads": Origin(model_name="tiny-llama", inputs=("blocks.1.attn.hook_z",)),
}


def random_at(origin: Origin, d_in: int, d_out: int, *, center: bool = True, skip: bool = False) -> Dictionary:
    generator = torch.Generator().manual_seed(1)
    sae = Dictionary(d_in, 50, TopK(4), origin=origin, d_out=d_out, center=center, skip=skip)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return sae.requires_grad_(False)


def text_of(dataset: TokenDataset, n: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(dataset.batch(0, n))
    return tokens, ~torch.isin(tokens, torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", list(ORIGINS))
def test_a_perfect_dictionary_loses_nothing(tiny_llama: HookedModel, tiny_dataset: TokenDataset, kind: str) -> None:
    sae = perfect_dictionary(ORIGINS[kind], 64 if kind == "crosscoder" else 32)
    found = evaluate(tiny_llama, sae, tiny_dataset, SOME)
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert found.explained_variance == pytest.approx(1)
    assert (found.cosine, found.norm_ratio) == pytest.approx((1, 1), abs=1e-5)
    for value in (found.ce_recovered, found.ce_recovered_mean, found.kl_recovered, found.kl_recovered_mean):
        assert value == pytest.approx(1, abs=1e-5)
    assert found.delta_ce == pytest.approx(0, abs=1e-6)
    assert found.ce_zero != pytest.approx(found.ce_clean)
    assert found.ce_mean != pytest.approx(found.ce_zero)


def test_a_skip_path_that_copies_is_perfect_without_any_latent(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    sae = Dictionary(32, 8, TopK(2), origin=ORIGINS["transcoder"], center=False, skip=True)
    assert sae.W_skip is not None
    with torch.no_grad():
        sae.W_skip.copy_(torch.eye(32))
    found = evaluate(tiny_llama, sae, tiny_dataset, SOME)
    assert (found.fvu, found.l0) == pytest.approx((0, 0), abs=1e-9)
    assert found.ce_recovered == pytest.approx(1, abs=1e-5)
    assert found.n_dead == 8
    assert "No latent fired" in found.notes[0]


def test_figures_of_a_transcoder(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    """FVU is of y, not of x."""
    origin = Origin(
        model_name="tiny-llama", inputs=("blocks.1.ln2.hook_normalized",), outputs=("blocks.1.hook_mlp_out",)
    )
    sae = random_at(origin, 32, 32, center=False, skip=True)
    found = evaluate(tiny_llama, sae, tiny_dataset, SOME)
    tokens, text = text_of(tiny_dataset, 20)
    _, cache = tiny_llama.run_with_cache(tokens)
    x, y = cache[origin.inputs[0]][text], cache[origin.outputs[0]][text].double()
    predicted = sae(x).double()
    assert found.fvu == pytest.approx(float((y - predicted).square().sum() / (y - y.mean(0)).square().sum()), rel=1e-5)
    logits = tiny_llama(tokens)[:10].double().log_softmax(-1)
    scored = text[:10, 1:]
    target = tokens[:10, 1:][scored][:, None]
    assert found.ce_clean == pytest.approx(float(-logits[:, :-1][scored].gather(1, target).mean()), rel=1e-5)

    def mean_there(activation: Tensor, _: object) -> Tensor:
        activation[text[:10]] = y.mean(0).float()
        return activation

    edited = tiny_llama.run_with_hooks(tokens[:10], [(origin.outputs[0], mean_there)]).double().log_softmax(-1)
    assert found.ce_mean == pytest.approx(float(-edited[:, :-1][scored].gather(1, target).mean()), rel=1e-5)


def test_figures_of_a_crosscoder(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    """Each layer called by hand: the first point replaced, one block on, the second replaced with what the clean run gave."""
    sae = random_at(ORIGINS["crosscoder"], 64, 64)
    found = evaluate(tiny_llama, sae, tiny_dataset, SOME)
    tokens, text = text_of(tiny_dataset, 20)
    _, cache = tiny_llama.run_with_cache(tokens)
    x = torch.cat([cache[FIRST], cache[SECOND]], -1)
    predicted = sae(x)
    for point, part in zip(found.points, (slice(0, 32), slice(32, 64)), strict=True):
        y = x[text][:, part].double()
        error = (y - predicted[text][:, part]).square().sum()
        assert point.fvu == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-5)
    assert sum(point.variance for point in found.points) == pytest.approx(1)
    tokens, text, predicted = tokens[:10], text[:10], predicted[:10]
    layers = list(tiny_llama.hf.get_submodule("model.layers").children())
    rotary = tiny_llama.hf.get_submodule("model.rotary_emb")(x, torch.arange(24)[None])
    stream = cache[FIRST][:10].clone()
    stream[text] = predicted[text][:, :32]
    stream = layers[1](stream, position_embeddings=rotary, attention_mask=None)
    stream[text] = predicted[text][:, 32:]
    stream = layers[2](stream, position_embeddings=rotary, attention_mask=None)
    log_p = (tiny_llama.hf.get_submodule("model.norm")(stream) @ tiny_llama.W_U).double().log_softmax(-1)
    scored = text[:, 1:]
    ce = -log_p[:, :-1][scored].gather(1, tokens[:, 1:][scored][:, None]).mean()
    assert found.ce_spliced == pytest.approx(float(ce), rel=1e-4)
    stream = cache[SECOND][:10].clone()  # the second point alone
    stream[text] = predicted[text][:, 32:]
    stream = layers[2](stream, position_embeddings=rotary, attention_mask=None)
    log_p = (tiny_llama.hf.get_submodule("model.norm")(stream) @ tiny_llama.W_U).double().log_softmax(-1)
    ce = -log_p[:, :-1][scored].gather(1, tokens[:, 1:][scored][:, None]).mean()
    assert found.points[1].loss["ce_spliced"] == pytest.approx(float(ce), rel=1e-4)
    assert found.points[0].loss["ce_spliced"] != pytest.approx(float(ce), rel=1e-4)


def test_several_together_are_as_each_alone(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    several = [
        random_dictionary(tmp_path / "a", model="tiny-llama", d_in=32),
        random_dictionary(tmp_path / "b", model="tiny-llama", d_in=32, hook=SECOND, seed=2),
        random_dictionary(tmp_path / "c", model="tiny-llama", d_in=32, d_sae=64, seed=3),
    ]
    together = evaluate_all(tiny_llama, several, tiny_dataset, SOME)
    assert together == [evaluate(tiny_llama, sae, tiny_dataset, SOME) for sae in several]


def test_intervals_hold_their_figures(tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path: Path) -> None:
    sae = random_dictionary(tmp_path, model="tiny-llama", d_in=32)
    found = evaluate(tiny_llama, sae, tiny_dataset, SOME)
    for name in ("fvu", "cosine", "norm_ratio", "ce_spliced", "delta_ce", "ce_recovered_mean", "kl_spliced"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high, name
    assert found.intervals["l0"] == (4, 4)


def test_the_fvu_of_drawn_units_is_that_of_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(60, 5, generator=generator).double() + 3
    unit = torch.arange(60) % 6
    units = UnitSums(6, 5)
    units.add_vectors(y, unit)
    error = torch.rand(60, generator=generator)
    for name, values in (("n", torch.ones(60)), ("square", y.square().sum(1)), ("error", error)):
        units.add(name, values, unit)
    drawn = [0, 0, 3, 4, 4, 4]
    rows = torch.cat([y[unit == u] for u in drawn])
    errors = torch.cat([error[unit == u] for u in drawn])
    weights = torch.bincount(torch.tensor(drawn), minlength=6).double()[None]
    direct = errors.double().sum() / (rows - rows.mean(0)).square().sum()
    assert float(units.fvu(weights)) == pytest.approx(float(direct))


@pytest.mark.parametrize(("n", "most"), [(7, 6), (1024, 1023), (5000, 1023)], ids=str)
def test_units_are_sequences_or_neighbours_in_bounded_number(n: int, most: int) -> None:
    unit = units_of(n)
    assert (len(unit), int(unit[0]), int(unit[-1])) == (n, 0, most)
    assert set(unit.diff().tolist()) <= {0, 1}


def test_text_of_special_tokens_alone_is_refused(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    empty = tiny_dataset.slice(0, 3)
    empty.__dict__["tokens"] = np.zeros((3, 24), dtype=np.uint16)  # BOS, nothing else
    sae = perfect_dictionary(ORIGINS["autoencoder"], 32)
    with pytest.raises(InputError, match="no text tokens"):
        evaluate(tiny_llama, sae, empty, SOME)


def test_outputs_of_another_width_are_refused(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    origin = Origin(model_name="tiny-llama", inputs=(FIRST,), outputs=("blocks.1.mlp.hook_post",))
    with pytest.raises(ConfigError, match=r"d_out 32.*64"):
        evaluate(tiny_llama, random_at(origin, 32, 32, center=False), tiny_dataset, SOME)


def test_a_wrong_scale_is_noted(tiny_llama: HookedModel, tiny_dataset: TokenDataset) -> None:
    sae = perfect_dictionary(ORIGINS["autoencoder"], 32)
    with torch.no_grad():
        sae.W_dec.mul_(10)
    assert "worse than the mean" in evaluate(tiny_llama, sae, tiny_dataset, SOME).notes[0]


def cross_layer() -> CrossLayerTranscoder:
    """Two layers that read the ends of two blocks and give the beginnings of the next ones, which are the same."""
    origin = Origin(
        model_name="tiny-llama",
        inputs=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
        outputs=(FIRST, SECOND),
    )
    clt = CrossLayerTranscoder(32, 64, ReLU(), origin=origin)
    with torch.no_grad():
        both = torch.cat([torch.eye(32), -torch.eye(32)])
        for layer in range(2):
            clt.encoder[layer].copy_(both)
            clt.W_dec[layer][:, 0].copy_(both)
    return clt.requires_grad_(False)


def test_a_cross_layer_transcoder_is_measured_as_the_others(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset
) -> None:
    clt = cross_layer()
    found = evaluate(tiny_llama, clt, tiny_dataset, SOME)
    assert [point.name for point in found.points] == [FIRST, SECOND]
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert found.ce_recovered == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        clt.W_dec[0][:, 1].copy_(0.1 * clt.W_dec[0][:, 0])  # what the first layer adds to the second is too much
    found = evaluate(tiny_llama, clt, tiny_dataset, SOME)
    assert found.points[0].fvu == pytest.approx(0, abs=1e-9)
    assert found.points[1].fvu > 1e-3


def test_decoder_rows_of_a_cross_layer_transcoder_are_what_each_latent_writes() -> None:
    clt = cross_layer()
    with torch.no_grad():
        clt.W_dec[0][:, 1].fill_(0.5)
        clt.b_dec.fill_(3)
    rows = decoder_rows(clt, chunk=50)
    assert rows.shape == (128, 64)
    torch.testing.assert_close(rows[:64], clt.W_dec[0].flatten(1))
    torch.testing.assert_close(rows[64:, 32:], clt.W_dec[1][:, 0])
    assert not rows[64:, :32].any()


def test_decoder_rows_of_a_class_with_other_decoders_are_found_by_decoding() -> None:
    sae = random_at(ORIGINS["transcoder"], 32, 32, center=False, skip=True)
    rows = decoder_rows(sae)
    assert torch.equal(rows, sae.W_dec)

    class Hidden:
        """The same dictionary, whose W_dec is not to be seen."""

        origin, d_in, d_out, d_sae = sae.origin, 32, 32, 50
        encode, decode, parameters = sae.encode, sae.decode, sae.parameters

    torch.testing.assert_close(decoder_rows(Hidden()), rows)
