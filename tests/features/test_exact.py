"""Sums that do not depend on the order of addition."""

from fractions import Fraction

import numpy as np
import pytest

from microtome.common.errors import InputError
from microtome.features.exact import ExactSum


def _sum(values: np.ndarray, slots: int = 1) -> ExactSum:
    total = ExactSum.zeros(slots)
    total.add(np.zeros(1, np.int64), values.astype(np.float64), np.zeros(1, np.int64))
    return total


def test_order_and_grouping_leave_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    values = (rng.gamma(1, 1, 500) * 10.0 ** rng.integers(-4, 5, 500)).astype(np.float32)
    whole = _sum(values)
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(values)
        cut = 1 + seed * 20
        parts = _sum(shuffled[cut:]).plus(_sum(shuffled[:cut]))
        assert (whole.whole[0], whole.fraction[0]) == (parts.whole[0], parts.fraction[0])
    # A float sum does depend on it, so the above is not true by chance.
    assert len({np.cumsum(np.random.default_rng(s).permutation(values))[-1] for s in range(20)}) > 1


def test_total_is_exact_to_the_last_bit_kept() -> None:
    values = np.array([0.1, 1e3, 3.25, 2.0**-40, 7e-5], np.float32).astype(np.float64)
    exact = sum((Fraction(v) for v in values), Fraction(0))
    assert abs(Fraction(float(_sum(values).total()[0])) - exact) <= Fraction(5, 2**40)


def test_slots_get_their_own_runs() -> None:
    total = ExactSum.zeros(4)
    total.add(np.array([1, 3]), np.array([1.5, 2.5, 10.0]), np.array([0, 2]))
    total.add(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    assert total.total().tolist() == [0.0, 4.0, 0.0, 10.0]


def test_overflow_is_an_error() -> None:
    total = _sum(np.array([2.0**62]))
    with pytest.raises(InputError, match="63 bits"):
        total.add(np.zeros(1, np.int64), np.array([2.0**62]), np.zeros(1, np.int64))
