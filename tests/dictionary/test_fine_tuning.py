"""A fine-tuning begins with the codes of the dictionary that it is given, or with the nearest that its architecture has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microtome.activations import ArraySource
from microtome.common.errors import ConfigError
from microtome.dictionary.activation import AbsTopK, Activation, Gated, GroupMax, JumpReLU, ReLU, TopK
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
)
from microtome.dictionary.cross_layer import CrossLayerTranscoder
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.fine_tuning import checked
from microtome.dictionary.formats import save_dictionary
from microtome.dictionary.pursuit import MatchingPursuit
from microtome.dictionary.rules import Step
from microtome.dictionary.trainer import TrainConfig, Trainer

D, F, N, K = 16, 48, 512, 6
Codes = Float[Tensor, "n f"]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ACTIVATIONS: dict[str, Activation] = {
    "relu": ReLU(),
    "jumprelu": JumpReLU(rand(F, seed=1).abs() + 0.2),
    "gated": Gated(0.5 * rand(F, seed=2), 0.5 * rand(F, seed=3)),
    "topk": TopK(K),
    "groupmax": GroupMax(K),
}
CONFIGS: dict[str, DictionaryConfig] = {
    "relu": ReLUConfig(d_sae=F),
    "p-anneal": PAnnealConfig(d_sae=F),
    "gated": GatedConfig(d_sae=F),
    "jumprelu": JumpReLUConfig(d_sae=F),
    "topk": TopKConfig(d_sae=F, k=K),
    "batchtopk": BatchTopKConfig(d_sae=F, k=K),
    "matryoshka": MatryoshkaConfig(d_sae=F, k=K),
}
DATA = 5 * rand(N, D, seed=4) + 3


def start_with(activation: Activation, *, transcoder: bool = False) -> Dictionary:
    """A dictionary of random weights and unit rows, of activations five times as large as training has them."""
    origin = Origin(model_name="toy", inputs=("a",), outputs=("b",) if transcoder else ("a",))
    made = Dictionary(D, F, activation, origin=origin, center=not transcoder)
    with torch.no_grad():
        made.encoder.copy_(rand(F, D, seed=5) / 8)
        made.b_enc.copy_(0.3 * rand(F, seed=6))
        made.b_dec.copy_(rand(D, seed=7))
        made.W_dec.copy_(functional.normalize(rand(F, D, seed=8), dim=1))
    return made.requires_grad_(False)


def begun(config: DictionaryConfig, start: Dictionary, folder: Path) -> Codes:
    """The codes of a fine-tuning's first step on all rows, in the dictionary's own units."""
    where = folder / "start"
    where.mkdir()
    save_dictionary(start, where)
    source = ArraySource(torch.cat([DATA, DATA.flip(1)], 1), hook_names=("a", "b"), widths=(D, D), model_name="toy")
    tuned = replace(config, fine_tune=str(where), inputs=("a",), outputs=start.origin.outputs)
    trainer = Trainer([tuned], source, folder / "tuned", TrainConfig(n_tokens=N, batch_size=N, select_dtype="fp32"))
    trainer.begin()
    stack = trainer.groups[0].stack
    x = (DATA * trainer.scales[:D])[None]
    step = Step(1.0, torch.ones(1, N), stack.norms(), stack.b_enc, lambda: stack._column_sums(x))
    kept = stack.rule.keep(stack.pre_activations(x, torch.float32), step)
    b_dec = stack.b_dec if stack.config.centered else None
    values = stack.rule.values(kept.pre_activations(x, b_dec, stack.encoder, stack.b_enc), kept, step)
    with torch.no_grad():  # each latent's values, one latent decoded at a time
        eye = torch.eye(F)[None]
        codes = kept.decode(values, eye)[0]
    return codes * stack.norms()[0] / trainer.scales[0]


def plain(start: Dictionary) -> tuple[Codes, Codes]:
    """The values that latents would have on each row, and the codes that they have."""
    x = DATA - start.b_dec if start.center else DATA
    product = x @ start.encoder.T
    z = product + start.b_enc
    activation = start.activation
    if isinstance(activation, Gated):
        opens = z > 0
        z = activation.r_mag.exp() * product + activation.b_mag
        return z, z.relu() * opens
    if isinstance(activation, JumpReLU):
        return z, z * (z > activation.threshold)
    if isinstance(activation, TopK):
        return z, z.relu() * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
    return z, z.relu()


def largest(z: Codes, n: int) -> Codes:
    return z.relu() * (z >= z.flatten().sort(descending=True).values[n - 1])


@pytest.mark.parametrize("to", CONFIGS)
@pytest.mark.parametrize("of", ["relu", "jumprelu", "gated", "topk"])
def test_the_first_step_has_the_dictionarys_codes_or_the_nearest(of: str, to: str, tmp_path: Path) -> None:
    start, config = start_with(ACTIVATIONS[of]), CONFIGS[to]
    z, codes = plain(start)
    assert 1 < float((codes > 0).sum(1).float().mean()) < F - 1
    found = begun(config, start, tmp_path)
    if to in (
        "jumprelu",
        "gated",
    ):  # the same; of TopK those above one threshold, about as many (it is from other rows)
        expected = codes if of != "topk" else largest(z, int((found > 0).sum()))
        assert int((found > 0).sum()) == pytest.approx(int((codes > 0).sum()), rel=0.03)
    elif to == "topk":
        expected = z.relu() * torch.zeros_like(z).scatter(1, z.topk(K, dim=1).indices, 1.0)
    elif isinstance(config, BatchTopKConfig):
        expected = largest(z, K * N)
    else:  # ReLU has the same values, and those that thresholds held back
        expected = z.relu()
        assert torch.equal(expected[codes > 0], codes[codes > 0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("of", ["relu", "jumprelu", "gated"])
def test_transcoders_begin_so_too(of: str, to: str, tmp_path: Path) -> None:
    """Their input is not centred, and what they write is in other units than what they read."""
    start = start_with(ACTIVATIONS[of], transcoder=True)
    z, codes = plain(start)
    assert bool((codes > 0).any())
    found = begun(CONFIGS[to], start, tmp_path)
    torch.testing.assert_close(found, codes if to != "relu" else z.relu(), rtol=1e-4, atol=1e-4)


def test_groups_are_given_a_threshold_as_well(tmp_path: Path) -> None:
    start = start_with(ACTIVATIONS["groupmax"])
    found = begun(CONFIGS["jumprelu"], start, tmp_path)
    assert int((found > 0).sum()) == pytest.approx(int((start.encode(DATA).values > 0).sum()), rel=0.03)
    torch.testing.assert_close(found, largest(plain(start)[0], int((found > 0).sum())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["jumprelu", "gated", "relu", "topk"])
@pytest.mark.parametrize("activation", [AbsTopK(K), MatchingPursuit(K)], ids=["abstopk", "pursuit"])
def test_codes_that_no_architecture_has_are_refused(activation: Activation, to: str, tmp_path: Path) -> None:
    """Also where TopK would be given a threshold: of an AbsTopK it would leave out all that is below zero."""
    with pytest.raises(ConfigError, match=f"no architecture here that is trained. Got: {activation.name}"):
        begun(CONFIGS[to], start_with(activation), tmp_path)


def test_signed_cross_layer_transcoders_are_refused() -> None:
    origin = Origin(model_name="toy", inputs=("a", "b"))
    checked(CrossLayerTranscoder(D, F, TopK(K), origin=origin))
    with pytest.raises(ConfigError, match="no architecture here that is trained. Got: abstopk"):
        checked(CrossLayerTranscoder(D, F, AbsTopK(K), origin=origin))


@pytest.mark.parametrize(("of", "fits"), [("relu", True), ("gated", False)])
def test_a_tied_one_begins_only_with_an_encoder_that_is_the_decoders_transpose(
    of: str, fits: bool, tmp_path: Path
) -> None:
    start: Any = start_with(ACTIVATIONS[of])
    start.encoder.copy_(start.W_dec)
    config = replace(CONFIGS["jumprelu"], tied=True)
    if fits:
        torch.testing.assert_close(begun(config, start, tmp_path), plain(start)[1], rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(ConfigError, match="not the transpose of its decoder"):
        begun(config, start, tmp_path)


@pytest.mark.parametrize("sparsity", ["step", "tanh", "quadratic"])
def test_thresholds_of_what_was_relu_are_learnt(sparsity: Any, tmp_path: Path) -> None:
    """The codes are those of ReLU (with "tanh" less the very small), and every threshold can go up."""
    target: dict[str, Any] = {"target_l0": 4.0} if sparsity == "quadratic" else {}
    config = JumpReLUConfig(
        d_sae=F, sparsity=sparsity, coefficient=3.0, coefficient_warmup=0.0, bandwidth=0.5, **target
    )
    start, where = start_with(ReLU()), tmp_path / "start"
    where.mkdir()
    save_dictionary(start, where)
    source = ArraySource(DATA, hook_names=("a",), widths=(D,), model_name="toy")
    run = TrainConfig(n_tokens=N * 30, batch_size=N, lr=1e-3, warmup_steps=0)
    trainer = Trainer([replace(config, fine_tune=str(where))], source, tmp_path / "tuned", run)
    batches = trainer.begin()
    group = trainer.groups[0]
    threshold = group.stack.rule.get_parameter("threshold")
    least = 0.005 if sparsity == "tanh" else 0.0
    assert threshold.tolist() == [[pytest.approx(least)] * F]
    exported = group.export(0, trainer.scales, {"model_name": "toy"})
    codes = plain(start)[1]
    expected = codes * (codes > least / float(trainer.scales[0]))
    torch.testing.assert_close(exported(DATA), expected @ start.W_dec + start.b_dec, rtol=1e-3, atol=1e-3)
    for _ in range(20):
        trainer.train_step(next(batches))
    assert float(threshold.detach().min()) > 0.02
