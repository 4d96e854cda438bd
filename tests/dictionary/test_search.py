"""The search for λ: a full training with what it found ends at the L0 that was asked for; what cannot be found is said."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from microtome.activations.array import ArraySource
from microtome.common.errors import ConfigError, InputError
from microtome.dictionary.config import (
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    PAnnealConfig,
    PenaltyConfig,
    ReLUConfig,
    TopKConfig,
)
from microtome.dictionary.search import (
    SearchConfig,
    Trial,
    bracket,
    interpolate,
    refine,
    search_coefficient,
    try_coefficients,
)
from microtome.dictionary.trainer import TrainConfig, train, train_cross_layer

SHORT = TrainConfig(n_tokens=256 * 150, batch_size=256, lr=5e-3, warmup_steps=20, device="cpu")
TRAIN = TrainConfig(n_tokens=256 * 300, batch_size=256, lr=5e-3, warmup_steps=20, device="cpu")
SIZES: dict[str, Any] = {"d_sae": 64, "dead_after": 10_000}
JUMP: dict[str, Any] = {"bandwidth": 0.5}


@cache
def source() -> ArraySource:
    """Rows that are sums of 4 of 40 directions in 24 dimensions on average, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    directions = functional.normalize(torch.randn(40, 24, generator=generator), dim=1)
    fires = torch.rand(16_384, 40, generator=generator) < 0.1
    rows = (fires * (torch.rand(fires.shape, generator=generator) + 0.5)) @ directions
    return ArraySource(rows + 0.02 * torch.randn(rows.shape, generator=generator), rows_per_block=512)


@pytest.mark.parametrize(
    "dictionary",
    [
        ReLUConfig(**SIZES, coefficient=0.0, norms="free"),
        PAnnealConfig(**SIZES),
        GatedConfig(**SIZES, coefficient=20.0),
        JumpReLUConfig(**SIZES),
        JumpReLUConfig(**SIZES, **JUMP, start_threshold=0.3),
        JumpReLUConfig(**SIZES, **JUMP, sparsity="tanh"),
    ],
    ids=["relu-free-from-zero", "p-anneal", "gated", "jumprelu", "jumprelu-low-start", "jumprelu-tanh"],
)
def test_a_full_training_ends_at_the_target(dictionary: PenaltyConfig) -> None:
    found = search_coefficient(dictionary, source(), 6.0, config=TRAIN, search=SearchConfig(share=1.0))
    assert replace(found, coefficient=dictionary.coefficient) == dictionary
    [trial] = try_coefficients(found, source(), [found.coefficient], config=TRAIN)
    assert trial.l0 == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("target", [2.0, 16.0])
def test_jumprelu_comes_to_small_and_large_targets(target: float) -> None:
    """Its thresholds begin at 2 √λ, so λ moves L0 far even in a short training."""
    found = search_coefficient(JumpReLUConfig(**SIZES), source(), target, config=TRAIN, search=SearchConfig(share=1.0))
    [trial] = try_coefficients(found, source(), [found.coefficient], config=TRAIN)
    assert trial.l0 == pytest.approx(target, rel=0.15)


@cache
def layered() -> ArraySource:
    """Two layers that each read 12 of the columns above, and what each adds to two outputs."""
    rows = source().rows.view(-1, 2, 12)
    first, second, both = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(2)) / 12**0.5
    writes = [rows[:, 0] @ first, rows[:, 0] @ both + rows[:, 1] @ second]
    names = ("in0", "in1", "out0", "out1")
    return ArraySource(torch.cat([rows.flatten(1), *writes], 1), hook_names=names, widths=(12,) * 4, rows_per_block=512)


def test_the_target_of_a_cross_layer_transcoder_is_for_each_layer(tmp_path: Path) -> None:
    config = ReLUConfig(d_sae=48, cross_layer=True, inputs=("in0", "in1"), outputs=("out0", "out1"), dead_after=10_000)
    found = search_coefficient(config, layered(), 10.0, config=SHORT, search=SearchConfig(share=1.0))
    [clt] = train_cross_layer(found, layered(), out=tmp_path / "clt", config=SHORT)
    x = layered().rows[:, :24]
    fires = [x[:, 12 * i : 12 * i + 12] @ clt.encoder[i].T + clt.b_enc[i] > 0 for i in range(2)]
    l0 = [float(each.sum(1).double().mean()) for each in fires]
    assert sum(l0) / 2 == pytest.approx(10.0, rel=0.15)
    with pytest.raises(ConfigError, match=r"Got: 49\.0\. Expected: 48"):
        search_coefficient(config, layered(), 49.0, config=SHORT)


def test_the_target_of_a_crosscoder_is_of_all_its_points(tmp_path: Path) -> None:
    config = ReLUConfig(**SIZES, inputs=("in0", "in1"))
    found = search_coefficient(config, layered(), 6.0, config=TRAIN, search=SearchConfig(share=1.0))
    [crosscoder] = train(found, layered(), out=tmp_path / "cross", config=TRAIN)
    x = layered().rows[:, :24]
    fires = (x - crosscoder.b_dec) @ crosscoder.W_enc + crosscoder.b_enc > 0
    assert float(fires.sum(1).double().mean()) == pytest.approx(6.0, rel=0.15)


def test_interpolation_is_a_line_in_the_logarithms() -> None:
    trials = [Trial(1.0, 400.0), Trial(4.0, 100.0), Trial(16.0, 1.0)]
    assert bracket(trials, 200.0) == (trials[0], trials[1])
    assert interpolate(trials, 200.0) == pytest.approx(2.0)
    assert interpolate(trials, 10.0) == pytest.approx(8.0)
    assert interpolate(trials, 100.0) == pytest.approx(4.0)
    assert bracket(trials, 401.0) is None
    assert bracket(trials, 0.5) is None


def test_interpolation_through_noise_and_through_silence() -> None:
    noisy = [Trial(1.0, 50.0), Trial(2.0, 20.0), Trial(4.0, 40.0), Trial(8.0, 10.0)]
    assert 4.0 < interpolate(noisy, 30.0) < 8.0
    silent = [Trial(1.0, 10.0), Trial(2.0, 0.0)]
    assert 1.0 < interpolate(silent, 5.0) < 1.1
    level = [Trial(1.0, 7.0), Trial(4.0, 7.0)]
    assert interpolate(level, 7.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("center", "gaps"), [(1.0, [2.0, 2.0, 2.0**0.5]), (9.0, [2.0, 2.0**0.5])], ids=["outside", "inside"]
)
def test_coefficients_come_nearer_to_each_other_only_once_they_enclose_the_target(
    center: float, gaps: list[float]
) -> None:
    """L0 falls as 8000 / λ³, and is 8 at λ 10: from 1 on, the first round stays outside."""
    asked: list[list[float]] = []

    def tried(wanted: Sequence[float]) -> list[Trial]:
        asked.append(list(wanted))
        return [Trial(each, 8000 / each**3) for each in wanted]

    trials = refine(center, 8.0, SearchConfig(rounds=3), tried)
    assert [each[1] / each[0] for each in asked] == pytest.approx(gaps)
    assert interpolate(trials, 8.0) == pytest.approx(10.0)


def test_a_target_out_of_reach_names_what_was_found() -> None:
    """Hardly trained, no λ makes the latents fire on more than half of the rows, or moves them at all."""
    short = replace(TRAIN, n_tokens=256, warmup_steps=0, lr=1e-6)
    search = SearchConfig(factors=(0.5, 2.0), rounds=1)
    with pytest.raises(InputError, match=r"L0 of 60\. Got: L0 3\d\.\d+ with λ 2\.5, L0 3.* from 3\d.* wider") as caught:
        search_coefficient(ReLUConfig(**SIZES), source(), 60.0, config=short, search=search)
    assert "with λ 10" in str(caught.value)
    with pytest.raises(InputError, match="no longer moves it"):
        search_coefficient(ReLUConfig(**SIZES), source(), 5.0, config=short, search=search)


def test_a_search_that_does_not_enclose_the_target_warns() -> None:
    """The closer coefficients lie all but at one place; the line through them is all there is."""
    narrow = SearchConfig(factors=(1 / 16, 16.0), rounds=1, closer=2, closer_factor=1.0001)
    with pytest.warns(UserWarning, match=r"L0 of 6 did not enclose it: trainings come to L0 \d.* with λ"):
        search_coefficient(ReLUConfig(**SIZES), source(), 6.0, config=SHORT, search=narrow)


@pytest.mark.parametrize("coefficient", [1e-3, 1e4])
def test_the_range_is_moved_towards_the_target(coefficient: float) -> None:
    far = ReLUConfig(**SIZES, coefficient=coefficient)
    search = SearchConfig(share=0.35)
    found = search_coefficient(far, source(), 6.0, config=TRAIN, search=search)
    assert 1.0 < found.coefficient < 10.0


@pytest.mark.parametrize(
    ("dictionary", "target", "message"),
    [
        (TopKConfig(d_sae=64, k=4), 6.0, "not set by a coefficient.*Set k"),
        (JumpReLUConfig(d_sae=64, sparsity="quadratic", target_l0=5.0), 6.0, "target of its own"),
        (ReLUConfig(d_sae=64), 0.0, "between 0 and d_sae"),
        (ReLUConfig(d_sae=64), 65.0, "between 0 and d_sae"),
    ],
    ids=["topk", "quadratic", "zero", "beyond-the-width"],
)
def test_what_cannot_be_searched(dictionary: DictionaryConfig, target: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_coefficient(dictionary, source(), target, config=TRAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share"),
        ({"factors": (2.0, 1.0)}, "rise"),
        ({"rounds": 0}, "rounds"),
        ({"closer": 1}, "closer"),
    ],
    ids=["share", "factors", "rounds", "closer"],
)
def test_search_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**settings)
