"""JumpReLU's thresholds: where they begin, how quickly they learn, and where they end; and where the gates of Gated begin."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from microtome.activations.array import ArraySource
from microtome.common.errors import ConfigError
from microtome.dictionary.activation import TopK
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import DictionaryConfig, GatedConfig, JumpReLUConfig, ReLUConfig
from microtome.dictionary.dictionary import Dictionary, Origin
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack
from microtome.dictionary.trainer import TrainConfig, Trainer

D, F = 12, 40


def rows(n: int = 8192) -> torch.Tensor:
    """Sums of 2 of 30 directions on average, each with a strength between 1 and 2."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, D, generator=generator), dim=1)
    strengths = 1 + torch.rand(n, 30, generator=generator)
    return (strengths * (torch.rand(n, 30, generator=generator) < 2 / 30)) @ directions


def trained(config: JumpReLUConfig, folder: Path, *, steps: int, lr: float = 3e-3) -> Trainer:
    source = ArraySource(rows(), rows_per_block=512)
    training = TrainConfig(n_tokens=256 * steps, batch_size=256, lr=lr, warmup_steps=0, decay_fraction=0, device="cpu")
    trainer = Trainer([config], source, folder / "run", training)
    batches = trainer.begin()
    for _ in range(steps):
        trainer.train_step(next(batches))
    return trainer


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (JumpReLUConfig(d_sae=F, coefficient=0.25), 2.0),
        (JumpReLUConfig(d_sae=F, coefficient=4.0, sparsity="tanh"), 4.0),
        (JumpReLUConfig(d_sae=F, coefficient=4.0, sparsity="quadratic", target_l0=3.0), 1.0),
        (JumpReLUConfig(d_sae=F, coefficient=4.0, start_threshold=0.0), 0.0),
    ],
    ids=["step", "tanh", "quadratic", "said"],
)
def test_where_thresholds_begin(config: JumpReLUConfig, start: float) -> None:
    assert config.first_threshold == start
    assert torch.equal(make_rule([config]).get_parameter("threshold"), torch.full((1, F), start))


def test_each_member_begins_and_begins_again_at_its_own_threshold() -> None:
    starts = (1.0, 9.0)
    configs: list[DictionaryConfig] = [JumpReLUConfig(d_sae=F, coefficient=each, revival="resample") for each in starts]
    stack = Stack(configs, make_rule(configs), D, D)
    zero = torch.zeros(2, D)
    stack.initialise(DataStatistics(zero, zero, 1.0), [0, 1])
    threshold = stack.rule.get_parameter("threshold")
    torch.testing.assert_close(threshold[:, 0].detach(), torch.tensor([2.0, 6.0]))
    with torch.no_grad():
        threshold.fill_(50.0)
    optimiser = torch.optim.Adam(stack.parameters())
    x = rows(64)
    for member in range(2):
        resample(stack, optimiser, member, torch.arange(F) < 3, x, x, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(threshold[:, 2], torch.tensor([0.4, 1.2]))  # a fifth, as their encoder rows
    assert threshold[:, 3].tolist() == [50.0, 50.0]


@pytest.mark.parametrize("norms", ["unit", "free"])
@pytest.mark.parametrize("kind", ["jumprelu", "gated"])
def test_latents_begin_so_rare_that_two_standard_deviations_are_needed(kind: str, norms: Any) -> None:
    """Whatever the encoder rows' norms (0.1 where the decoder's are free): 2.3 % of normal rows are above."""
    config: DictionaryConfig = {
        "jumprelu": JumpReLUConfig(d_sae=F, coefficient=1.0, norms=norms),
        "gated": GatedConfig(d_sae=F, norms=norms),
    }[kind]
    stack = Stack([config], make_rule([config]), D, D)
    zero = torch.zeros(1, D)
    stack.initialise(DataStatistics(zero, zero, 1.0), [0])
    report = stack.step(
        torch.randn(1, 4096, D, generator=torch.Generator().manual_seed(0)), zero.expand(1, 4096, D), variance=1.0
    )
    assert float(report.l0[0]) / F == pytest.approx(0.0228, rel=0.1)


@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_thresholds_move_by_their_rate_times_the_learning_rate(rate: float, tmp_path: Path) -> None:
    """Adam's first step has the length of the learning rate, for every number that has a gradient."""
    config = JumpReLUConfig(d_sae=F, coefficient=1.0, threshold_rate=rate)
    trainer = trained(config, tmp_path, steps=1, lr=1e-3)
    stack = trainer.groups[0].stack
    moved = (stack.rule.get_parameter("threshold").detach() - 2.0).abs()
    assert float(moved.max()) == pytest.approx(rate * 1e-3, rel=1e-2)
    assert float(stack.b_enc.detach().abs().max()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("start", [None, 1.0])
def test_thresholds_end_near_the_root_of_the_coefficient(start: float | None, tmp_path: Path) -> None:
    """Firing at z saves z² and costs λ; wherever thresholds begin."""
    config = JumpReLUConfig(d_sae=F, coefficient=0.5, start_threshold=start)
    threshold = trained(config, tmp_path, steps=300).groups[0].stack.rule.get_parameter("threshold").detach()
    assert float(threshold.median()) == pytest.approx(0.5**0.5, rel=0.25)


def test_settings_that_cannot_be() -> None:
    for wrong in ({"threshold_rate": 0.0}, {"start_threshold": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(JumpReLUConfig(d_sae=F), **wrong)  # type: ignore[arg-type]


def test_gates_begin_without_a_change_of_the_magnitudes_where_the_input_is_not_centred() -> None:
    """The values are W (x − x̄) wherever a gate is open, on rows far from the origin."""
    config = GatedConfig(d_sae=F, inputs=("a",), outputs=("b",))
    stack = Stack([config], make_rule([config]), D, D)
    generator = torch.Generator().manual_seed(0)
    mean = 5 * torch.randn(1, D, generator=generator)
    stack.initialise(DataStatistics(mean, torch.zeros(1, D), 1.0), [0])
    x = mean + torch.randn(512, D, generator=generator)
    found = stack.export(0, Origin(model_name="toy", inputs=("a",), outputs=("b",))).encode(x).to_dense()
    along = (x - mean) @ stack.encoder[0].T
    wanted = along * (along > 2 * stack.encoder[0].norm(dim=1)) * stack.W_dec[0].norm(dim=1)
    assert 0.01 < float((found > 0).float().mean()) < 0.04
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms", ["unit", "free"])
def test_fine_tuning_of_relu_as_jumprelu_begins_with_the_same_codes(norms: Any) -> None:
    zero, origin, stacks = torch.zeros(1, D), Origin(model_name="toy", inputs=("a",)), []
    for seed, config in enumerate((ReLUConfig(d_sae=F, norms=norms), JumpReLUConfig(d_sae=F, norms=norms))):
        stacks.append(Stack([config], make_rule([config]), D, D))
        stacks[-1].initialise(DataStatistics(zero, zero, 1.0), [seed])
    start, x, ones = stacks[0].export(0, origin), rows(64), torch.ones(D)
    stacks[1].begin_with(0, start, ones, ones)
    codes = stacks[1].export(0, origin).encode(x).to_dense()
    assert bool((codes > 0).any())
    torch.testing.assert_close(codes, start.encode(x).to_dense())


def test_fine_tuning_as_jumprelu_needs_thresholds() -> None:
    config = JumpReLUConfig(d_sae=F)
    stack = Stack([config], make_rule([config]), D, D)
    start = Dictionary(D, F, TopK(4), origin=Origin(model_name="toy", inputs=("a",)))
    with pytest.raises(ConfigError, match=r"without thresholds\. Got: topk\. Expected: relu, jumprelu or gated"):
        stack.begin_with(0, start, torch.ones(D), torch.ones(D))
