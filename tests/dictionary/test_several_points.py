"""Dictionaries of several points: transcoders, crosscoders of layers and of two models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microtome.activations import ActivationStore, ArraySource, HarvestConfig, ModelSource, PairedSource, harvest
from microtome.common.errors import ConfigError, InputError, MicrotomeError
from microtome.dictionary import (
    BatchTopKConfig,
    Dictionary,
    Origin,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    load_dictionary,
    train,
)
from microtome.dictionary.activation import JumpReLU
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.crosscoding import compare_sides
from microtome.dictionary.decoders import OwnDecoder
from microtome.dictionary.stack import DataStatistics, Stack
from microtome.dictionary.sweeps import per_layer
from microtome.model import HookedModel
from microtome.text import TokenDataset

WIDTHS = (5, 3, 4)
D, F, N = sum(WIDTHS), 10, 30
LAMBDA = 0.7
SEVERAL: dict[str, Any] = {"d_sae": F, "inputs": ("a", "b", "c"), "outlier_cap": None}
RELU = ReLUConfig(**SEVERAL, coefficient=LAMBDA, coefficient_warmup=0.0)


def make(config: ReLUConfig | BatchTopKConfig) -> Stack:
    stack = Stack([config], make_rule([config]), D, D, OwnDecoder(1, F, WIDTHS))
    stack.initialise(DataStatistics(torch.zeros(1, D), torch.zeros(1, D), 1.0), [0])
    with torch.no_grad():
        stack.W_dec.add_(torch.randn(stack.W_dec.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    stack.after_update()
    return stack


def rows() -> Float[Tensor, "1 n d"]:
    return torch.randn(1, N, D, generator=torch.Generator().manual_seed(2))


def norms_by_point(W_dec: Tensor) -> Tensor:
    """Σ_l ‖W_dec,i^l‖, point by point."""
    a, b, c = W_dec[:, :5], W_dec[:, 5:8], W_dec[:, 8:]
    return a.square().sum(1).sqrt() + b.square().sum(1).sqrt() + c.square().sum(1).sqrt()


@pytest.mark.parametrize("norms", ["free", "unit"])
def test_the_penalty_of_a_crosscoder_counts_the_sum_of_the_points_norms(norms: Any) -> None:
    stack, x = make(replace(RELU, norms=norms)), rows()
    W_dec, encoder = stack.W_dec.detach()[0].requires_grad_(), stack.encoder[0].detach()
    f = (x[0] @ encoder.T).relu()
    penalty = (f * (norms_by_point(W_dec) if norms == "free" else 1.0)).sum()
    loss = ((f @ W_dec - x[0]).square().sum() + LAMBDA * penalty) / N
    loss.backward()
    report = stack.step(x, x, variance=1.0)
    torch.testing.assert_close(report.loss[0], loss.detach())
    assert stack.W_dec.grad is not None
    torch.testing.assert_close(stack.W_dec.grad[0], W_dec.grad)


def test_unit_norms_of_a_crosscoder_add_up_to_one_and_stay_so() -> None:
    stack = make(replace(RELU, norms="unit"))
    torch.testing.assert_close(norms_by_point(stack.W_dec[0]), torch.ones(F))
    stack.step(rows(), rows(), variance=1.0)
    stack.before_update()
    assert stack.W_dec.grad is not None
    growth = (stack.W_dec.grad * stack.W_dec.detach()).sum(2)
    assert float(growth.abs().max()) < 1e-6
    with torch.no_grad():
        stack.W_dec.add_(stack.W_dec.grad, alpha=-0.5)
    stack.after_update()
    torch.testing.assert_close(norms_by_point(stack.W_dec[0]), torch.ones(F))


def test_with_unit_norms_a_latent_begins_as_the_projection_on_its_row() -> None:
    config = replace(RELU, norms="unit", d_sae=1, coefficient=0.0)
    stack = Stack([config], make_rule([config]), D, D, OwnDecoder(1, 1, WIDTHS))
    stack.initialise(DataStatistics(torch.zeros(1, D), torch.zeros(1, D), 1.0), [0])
    x = stack.W_dec.detach() * 7.0
    assert float(stack.step(x, x, variance=1.0).fvu[0]) < 1e-10


def test_folding_gives_the_points_norms_a_sum_of_one_and_changes_no_output() -> None:
    origin = Origin(model_name="toy", inputs=("a", "b", "c"), widths=WIDTHS)
    made = Dictionary(D, F, JumpReLU(torch.full((F,), 0.3)), origin=origin)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("encoder", "W_dec", "b_enc", "b_dec"):
            p = made.get_parameter(name)
            p.copy_(torch.randn(p.shape, generator=generator))
    before, x = made(rows()[0]), rows()[0]
    made.fold_decoder_norms()
    torch.testing.assert_close(norms_by_point(made.W_dec), torch.ones(F))
    torch.testing.assert_close(made(x), before)


@pytest.mark.parametrize("norms", ["free", "unit"])
def test_fine_tuning_of_a_crosscoder_begins_with_what_was_exported_whatever_the_points_scales(norms: Any) -> None:
    stack, again = make(replace(RELU, norms=norms)), make(replace(RELU, norms=norms))
    with torch.no_grad():
        again.W_dec.add_(1.0)
    scales = torch.tensor([2.0] * 5 + [0.1] * 3 + [7.0] * 4)
    origin = Origin(model_name="toy", inputs=("a", "b", "c"), widths=WIDTHS)
    made, x = stack.export(0, origin, scales, scales), rows()[0] / scales
    again.begin_with(0, made, scales, scales)
    before = again.W_dec.detach().clone()
    again.after_update()
    torch.testing.assert_close(again.export(0, origin, scales, scales)(x), made(x), rtol=1e-4, atol=1e-4)
    if norms == "unit":
        torch.testing.assert_close(norms_by_point(before[0]), torch.ones(F))


def test_a_batchtopk_crosscoder_is_exported_with_the_threshold_that_it_was_trained_with() -> None:
    stack, x = make(BatchTopKConfig(**SEVERAL, k=3, norms="free")), rows()
    stack.step(x, x, variance=1.0)
    stack.rule.get_buffer("threshold").mul_(0.999)  # a hair lower, so that the smallest value of the batch is above it
    made = stack.export(0, Origin(model_name="toy", inputs=("a", "b", "c"), widths=WIDTHS))
    scores = ((x[0] @ stack.encoder[0].T).relu() * norms_by_point(stack.W_dec[0])).detach()
    kept = scores >= scores.flatten().sort(descending=True).values[3 * N - 1]
    torch.testing.assert_close(made.encode(x[0]).to_dense(), scores * kept)


# ---- on a tiny model ------------------------------------------------------------------------------------------------

MLPS = tuple((f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out") for i in range(3))
RESID = tuple(f"blocks.{i}.hook_resid_pre" for i in range(3))
RUN = TrainConfig(n_tokens=64 * 60, batch_size=64, warmup_steps=5, lr=5e-3)
TOPK = TopKConfig(d_sae=96, k=6, dead_after=1000, aux_k=8)


@pytest.fixture(scope="module")
def store(
    tiny_llama: HookedModel, tiny_dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    hooks = [*RESID, *(name for pair in MLPS for name in pair)]
    folder = tmp_path_factory.mktemp("points") / "acts"
    return harvest(tiny_llama, tiny_dataset, hooks, folder, config=HarvestConfig(dtype="fp32"))


def fvu(made: Dictionary, store: ActivationStore) -> float:
    sides = [torch.cat([store.read(p, 0, 16)[:, 1:].flatten(0, 1) for p in points], 1) for points in made_points(made)]
    x, y = sides
    return float((made(x) - y).square().sum() / (y - y.mean(0)).square().sum())


def made_points(made: Dictionary) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return made.origin.inputs, made.origin.outputs


def test_transcoders_of_all_layers_on_one_stream(store: ActivationStore, tmp_path: Path) -> None:
    plain = per_layer(TOPK, [a for a, _ in MLPS], [b for _, b in MLPS])
    made = train([*plain, replace(plain[1], skip=True)], store, out=tmp_path / "set", config=RUN)
    assert [made_points(each) for each in made[:3]] == [((a,), (b,)) for a, b in MLPS]
    scores = [fvu(each, store) for each in made]
    assert max(scores[:3]) < 0.65
    assert scores[3] < scores[1]
    assert made[3].architecture == "topk_skip_transcoder"
    opened = load_dictionary(tmp_path / "set" / "3")
    assert opened.fingerprint == made[3].fingerprint


def test_a_skip_transcoder_of_a_linear_map_is_its_skip_path(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(2048, 8, generator=generator) + 1, torch.randn(8, 8, generator=generator)
    source = ArraySource(torch.cat([x, x @ matrix], 1), hook_names=("a", "b"), widths=(8, 8), model_name="toy")
    config = ReLUConfig(d_sae=16, coefficient=1000.0, inputs=("a",), outputs=("b",), skip=True, revival="none")
    [made] = train(
        config, source, out=tmp_path / "skip", config=replace(RUN, n_tokens=128 * 300, batch_size=128, lr=2e-2)
    )
    assert made.W_skip is not None
    assert float((made.W_skip - matrix).norm() / matrix.norm()) < 0.05


def test_a_crosscoder_of_three_layers(store: ActivationStore, tmp_path: Path) -> None:
    [made] = train(replace(TOPK, inputs=RESID), store, out=tmp_path / "cross", config=RUN)
    opened = load_dictionary(tmp_path / "cross")
    assert opened.fingerprint == made.fingerprint
    assert opened.output_widths == (store.width(RESID[0]),) * 3
    assert not opened.is_transcoder
    assert fvu(opened, store) < 0.35
    torch.testing.assert_close(opened(torch.zeros(1, opened.d_in)), made(torch.zeros(1, made.d_in)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ("blocks.0.hook_resid_pre", "blocks.7.hook_resid_pre")}, r"blocks\.7\.hook_resid_pre"),
        ({"inputs": (RESID[0],), "outputs": ("blocks.9.hook_mlp_out",)}, r"blocks\.9\.hook_mlp_out"),
        ({"inputs": RESID, "tied": True, "norms": "unit"}, "tied crosscoder has free norms"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], message: str, store: ActivationStore, tmp_path: Path
) -> None:
    with pytest.raises(MicrotomeError, match=message):
        train(replace(TOPK, **change), store, out=tmp_path / "made", config=RUN)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="k must be between 1 and d_sae"):
        TopKConfig(d_sae=4, k=5)
    with pytest.raises(ConfigError, match="as many|an output for each input"):
        per_layer(TOPK, ["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="width for each output"):
        Origin(model_name="toy", inputs=("a", "b"), widths=(3,))
    with pytest.raises(ConfigError, match="add up to d_out"):
        Dictionary(5, 4, JumpReLU(torch.zeros(4)), origin=Origin(model_name="toy", inputs=("a", "b"), widths=(3, 3)))
    odd = Dictionary(5, 4, JumpReLU(torch.zeros(4)), origin=Origin(model_name="toy", inputs=("a", "b")))
    with pytest.raises(ConfigError, match="widths"):
        odd.fold_decoder_norms()


def test_an_output_that_never_changes_is_refused(tmp_path: Path) -> None:
    data = torch.cat([torch.randn(512, 4, generator=torch.Generator().manual_seed(0)), torch.ones(512, 3)], 1)
    source = ArraySource(data, hook_names=("a", "b"), widths=(4, 3), model_name="toy")
    for config in (TopKConfig(d_sae=8, k=2, inputs=("a",), outputs=("b",)), TopKConfig(d_sae=8, k=2)):
        with pytest.raises(InputError, match="equal rows at b"):
            train(
                config, source, out=tmp_path / "made", config=TrainConfig(n_tokens=256, batch_size=64), overwrite=True
            )


# ---- of two models --------------------------------------------------------------------------------------------------


def two_models(n: int = 6000) -> tuple[ArraySource, Float[Tensor, "n d"], Float[Tensor, "f d"], Float[Tensor, "f d"]]:
    """Of 24 features both models have the first 12; the next 6 only the first, the last 6 only the second, whose
    activations are ten times as large."""
    generator = torch.Generator().manual_seed(0)
    a, b = (functional.normalize(torch.randn(24, 20, generator=generator), dim=1) for _ in range(2))
    a[18:], b[12:18] = 0.0, 0.0
    codes = (torch.rand(n, 24, generator=generator) < 0.08) * (torch.rand(n, 24, generator=generator) + 0.5)
    sides = [codes @ a + 1, 10 * (codes @ b) + 1]
    rows = torch.cat(sides, 1)
    source = ArraySource(rows, hook_names=("base:resid", "chat:resid"), widths=(20, 20), model_name="base+chat")
    return source, rows, a, b


def test_a_crosscoder_of_two_models_from_one_text(
    tiny: Callable[[str], HookedModel], tiny_dataset: TokenDataset, tmp_path: Path
) -> None:
    sources = [ModelSource(tiny(family), tiny_dataset, "blocks.1.hook_resid_pre") for family in ("llama", "gpt2")]
    source = PairedSource(sources[0], sources[1], names=("base", "chat"))
    [made] = train(replace(TOPK, d_sae=64), source, out=tmp_path / "cross", config=RUN)
    assert made.origin.outputs == ("base:blocks.1.hook_resid_pre", "chat:blocks.1.hook_resid_pre")
    assert made.output_widths == source.widths
    rows = source.read(0)
    x = rows - rows.mean(0)
    assert float((made(rows) - rows).square().sum() / x.square().sum()) < 0.5
    sides = compare_sides(made, rows)
    assert sides.names == ("base", "chat")
    alive = sides.norms.sum(1) > 0
    assert float(sides.relative[alive].std()) > 0.05


@pytest.mark.parametrize("norms", ["free", "unit"])
def test_a_crosscoder_of_two_models_tells_which_has_a_feature(norms: Any, tmp_path: Path) -> None:
    source, data, a, b = two_models()
    config = TopKConfig(d_sae=24, k=3, norms=norms, dead_after=4000, aux_k=6)
    run = TrainConfig(n_tokens=256 * 400, batch_size=256, lr=1e-2, warmup_steps=20)
    [made] = train(config, source, out=tmp_path / "cross", config=run)
    sides = compare_sides(made, data)
    assert sides.names == ("base", "chat")
    true = functional.normalize(torch.cat([a, b], 1), dim=1)
    scaled = functional.normalize(made.W_dec * torch.tensor([1.0, 0.1]).repeat_interleave(20), dim=1)
    cosine, best = (scaled @ true.T).max(1)
    found = cosine > 0.9
    assert int(found.sum()) >= 18
    wanted = torch.where(best < 12, 0, torch.where(best < 18, 1, 2))
    first, second = sides.only("base", 0.3), sides.only("chat", 0.3)
    got = torch.where(sides.shared(0.2), 0, torch.where(first, 1, torch.where(second, 2, 3)))
    assert float((wanted[found] == got[found]).float().mean()) > 0.9
    pairs = found & (best < 12)
    assert sides.cosine is not None
    expected = functional.cosine_similarity(a, b, dim=1)[best]
    torch.testing.assert_close(sides.cosine[pairs], expected[pairs], atol=0.15, rtol=0)


def test_relative_norms_and_cosines_are_those_of_the_definition() -> None:
    origin = Origin(model_name="m", inputs=("a:x", "a:y", "b:x", "b:y"), widths=(2, 1, 2, 1))
    made = Dictionary(6, 3, JumpReLU(torch.zeros(3)), origin=origin)
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[3.0, 4, 1, 0, 0, 0], [0, 3, 4, 0, 30, 40], [0, 0, 0, 0, 0, 0]]))
    data = torch.tensor([[2.0, 0, 1, 0, 20, 10], [0, -2, -1, 20, 0, -10]])  # b's are ten times as far from their mean
    sides = compare_sides(made, data)
    torch.testing.assert_close(sides.norms, torch.tensor([[6.0, 0], [7, 7], [0, 0]]))
    torch.testing.assert_close(sides.relative, torch.tensor([0.0, 0.5, 0.5]))
    assert sides.cosine is not None
    torch.testing.assert_close(sides.cosine, torch.tensor([0.0, 1.0, 0.0]))
    assert sides.only("a").tolist() == [True, False, False]
    assert sides.only("b").tolist() == [False, False, False]
    assert sides.shared().tolist() == [False, True, True]
    with pytest.raises(ConfigError, match="neither side"):
        sides.only("c")
    with pytest.raises(InputError, match="not this crosscoder's"):
        compare_sides(made, data[:, :5])
    single = Dictionary(6, 3, JumpReLU(torch.zeros(3)), origin=Origin.at("m", "x"))
    with pytest.raises(ConfigError, match="two sides"):
        compare_sides(single, data)
