"""Intervals, logistic regression, sparse probing, TPP and SCR, on texts made by hand with figures known in advance."""

import math

import pytest
import torch
from torch import Tensor

from microtome.common.errors import InputError
from microtome.dictionary import EncodedTexts, probing, scr, tpp
from microtome.dictionary.intervals import Estimate
from microtome.dictionary.logistic import fit_probes
from microtome.dictionary.probing import halves, ranked_latents

from .handmade import encoded

FOUR = torch.tensor([(a, b) for a in (0, 1) for b in (0, 1) for _ in range(30)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- intervals ----------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_normal_one_where_that_holds() -> None:
    values = normal(2000).double() + 5
    found = Estimate.of_mean(values[None])
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.15 * half)


def test_a_unit_that_a_seed_left_out_does_not_count() -> None:
    nan = math.nan
    found = Estimate.of_mean(torch.tensor([[1.0, 2.0, nan], [nan, 4.0, 6.0]]))
    assert list(found.seeds) == [1.5, 5]
    assert found.value == 3.25


def test_the_interval_of_a_ratio_draws_both_parts_together() -> None:
    denominator = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)) + 1
    found = Estimate.of_ratio(3 * denominator, denominator)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


# ---- logistic regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_probes_are_where_the_gradient_vanishes(balanced: bool) -> None:
    """The stationary conditions on standardised features, written out, for two tasks at once."""
    x = normal(200, 4).double() * torch.tensor([1.0, 10, 0.1, 1]) + torch.tensor([0.0, 100, 0, 5])
    labels = torch.stack([x[:, 0] + normal(200, seed=1) > 0.8, x[:, 1] + 9 * normal(200, seed=2) > 100], 1)
    probes = fit_probes(x, labels, l2=2.0, balanced=balanced)
    mean, std = x.mean(0), x.std(0, correction=0)
    standard = (x - mean) / std
    for task in range(2):
        y = labels[:, task].double()
        weights = torch.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean())) if balanced else torch.ones(200).double()
        residual = weights * (torch.sigmoid(x @ probes.weight[:, task] + probes.bias[task]) - y)
        own = probes.weight[:, task] * std
        torch.testing.assert_close(standard.T @ residual + 2.0 * own, torch.zeros(4).double(), atol=1e-3, rtol=0)
        assert float(residual.sum()) == pytest.approx(0, abs=1e-3)


def test_a_feature_that_never_changes_gets_no_weight() -> None:
    x = torch.stack([normal(50), torch.full((50,), 1e6)], 1)
    probes = fit_probes(x, x[:, :1] > 0)
    assert float(probes.weight[1, 0]) == 0
    assert float(probes.right(x, x[:, :1] > 0).mean()) > 0.95


def test_a_task_of_one_class_is_refused() -> None:
    with pytest.raises(InputError, match="both classes"):
        fit_probes(normal(10, 2), torch.ones(10, 1, dtype=torch.bool))


# ---- sparse probing -----------------------------------------------------------------------------------------------------


def one_latent_knows(*, x: Tensor) -> EncodedTexts:
    labels = FOUR[:, :1]
    codes = normal(120, 30, seed=3).relu()
    codes[:, 7] = labels[:, 0] * 0.1 + 0.001 * codes[:, 7]
    return encoded(labels, normal(120, 30, seed=6), codes, torch.eye(30), x=x)


def test_the_latent_that_knows_is_found_and_suffices() -> None:
    found = probing([one_latent_knows(x=normal(120, 30, seed=4))])
    [task] = found.tasks
    assert task.latents[0] == 7
    assert task.sparse["1"].value == task.sparse["2"].value == 1
    assert (task.chance, task.n_texts) == (0.5, 120)
    assert found.mean["top_1"] == 1
    assert task.model.low < 0.5 < task.model.high, "noise tells nothing"
    assert not task.answered
    assert len(set(task.model.seeds)) > 1


def test_a_model_that_knows_is_above_chance() -> None:
    [task] = probing([one_latent_knows(x=FOUR.float())]).tasks
    assert task.model.value == 1
    assert task.answered


def test_dead_latents_answer_by_chance() -> None:
    labels = FOUR[:, :1]
    dead = encoded(labels, labels.float(), torch.zeros(120, 9), torch.zeros(9, 1))
    [task] = probing([dead]).tasks
    assert task.sparse["1"].value == task.all_latents.value == 0.5


def test_latents_are_ranked_by_the_difference_in_standard_deviations() -> None:
    codes, labels = normal(40, 6).relu(), torch.arange(40) % 3 == 0
    codes[:, 2] = 0
    score = [
        0.0 if i == 2 else abs(float(codes[labels, i].mean() - codes[~labels, i].mean())) / float(codes[:, i].std())
        for i in range(6)
    ]
    assert ranked_latents(codes, labels).tolist() == sorted(range(6), key=lambda i: -score[i])


def test_halves_have_equal_shares_and_differ_by_seed() -> None:
    labels = torch.arange(60) < 20
    first, second = halves(labels, 0, "x"), halves(labels, 1, "x")
    assert (int((first & labels).sum()), int((first & ~labels).sum())) == (10, 20)
    assert not torch.equal(first, second)
    with pytest.raises(InputError, match="too few"):
        halves(torch.arange(60) < 3, 0, "x")


# ---- TPP and SCR --------------------------------------------------------------------------------------------------------


def two_attributes(*, tangled: bool = False, noise: float = 0.0) -> EncodedTexts:
    """Each attribute has its own axis, −1 or 1, and two latents, one for each sign; tangled, the latents of the first change
    the second's axis as well."""
    sign = FOUR.float() * 2 - 1
    y = torch.cat([sign + noise * torch.stack([normal(120), torch.zeros(120)], 1), normal(120, 2, seed=5)], 1)
    codes = torch.cat([sign.relu(), (-sign).relu()], 1)[:, [0, 2, 1, 3]]  # a, not a, b, not b
    rows = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    if tangled:
        rows[:2, 1] = torch.tensor([1.0, -1])
    return encoded(FOUR, y, codes, torch.cat([rows, torch.zeros(4, 2)], 1))


def test_taking_an_attributes_own_latents_out_costs_it_alone() -> None:
    [found] = tpp([two_attributes()], counts=(2,))
    assert found.accuracy == 1
    assert found.intended["2"] == pytest.approx(0.5, abs=0.1)
    assert found.unintended["2"] == 0
    assert found.score["2"].value == pytest.approx(found.intended["2"])


def test_tangled_latents_score_lower() -> None:
    [found] = tpp([two_attributes(tangled=True)], counts=(2,))
    [clean] = tpp([two_attributes()], counts=(2,))
    assert found.unintended["2"] > 0.1
    assert found.score["2"].value < clean.score["2"].value


def test_nothing_taken_out_loses_nothing() -> None:
    dead = two_attributes()
    [found] = tpp([encoded(FOUR, dead.y, torch.zeros(120, 4), dead.W_dec)], counts=(2,))
    assert found.score["2"].value == 0


def test_taking_the_spurious_latents_out_restores_the_probe() -> None:
    found = {(one.wanted, one.spurious): one for one in scr([two_attributes(noise=0.6)], counts=(2, 4))}
    one = found["a", "b"]
    assert one.biased < one.clean - 0.05
    assert one.score is not None
    direct = (one.accuracy["2"] - one.biased) / (one.clean - one.biased)
    assert one.score["2"].value == pytest.approx(direct)
    assert one.score["2"].low < direct < one.score["2"].high
    assert one.score["2"].value > 0.7


def test_without_a_gap_there_is_nothing_to_remove() -> None:
    """The wanted attribute is loud, the spurious one is not in y at all."""
    made = two_attributes()
    y = made.y.clone()
    y[:, 1] = 0
    [one, _] = scr([encoded(FOUR, y, made.codes, made.W_dec)], counts=(2,))
    assert (one.biased, one.clean) == (1, 1)
    assert one.score is None


def test_sets_that_have_no_pair_are_refused() -> None:
    single = one_latent_knows(x=FOUR.float())
    with pytest.raises(InputError, match="two attributes"):
        tpp([single])
    with pytest.raises(InputError, match="four combinations"):
        scr([single])
