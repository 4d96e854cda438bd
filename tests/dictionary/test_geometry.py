"""Cosines between decoder rows, MMCS and matching, against direct computation and brute force."""

from itertools import permutations

import numpy as np
import pytest
import torch

from microtome.common.errors import InputError
from microtome.dictionary import Dictionary, Origin, geometry, similarity
from microtome.dictionary.activation import ReLU
from microtome.dictionary.geometry import random_nearest
from microtome.dictionary.matching import best_matching

from ..makers import topk_dictionary  # noqa: TID252 – shared by tests

AT = Origin.at("m", "h")


def with_rows(rows: torch.Tensor) -> Dictionary:
    sae = Dictionary(rows.shape[1], len(rows), ReLU(), origin=AT)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    return sae


def test_nearest_neighbours() -> None:
    sae = topk_dictionary(16, 60, 4, origin=AT)
    with torch.no_grad():
        sae.W_dec[1] = 3 * sae.W_dec[0]  # a copy, but for its length
        sae.W_dec[2] = 0
    found = geometry(sae)
    rows = sae.W_dec.detach()[[0, 1, *range(3, 60)]].double()
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    nearest = cosine.max(1).values
    assert (found.n_latents, found.n_zero) == (60, 1)
    assert found.nearest_mean == pytest.approx(float(nearest.mean()), abs=1e-6)
    assert found.above == pytest.approx({"0.5": float((nearest > 0.5).double().mean()), "0.9": 2 / 59})
    assert sum(found.histogram_counts) == 59
    assert (found.norm_min, found.norm_max) == pytest.approx((0, 3), abs=1e-5)


@pytest.mark.parametrize(("n", "d"), [(100, 3), (50, 2), (400, 24)], ids=str)
def test_the_random_expectation_is_that_of_drawn_directions(n: int, d: int) -> None:
    rows = torch.randn(40, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows /= rows.norm(dim=2, keepdim=True)
    cosine = rows @ rows.transpose(1, 2)
    cosine.diagonal(dim1=1, dim2=2).fill_(-2)
    nearest = cosine.max(2).values
    mean, above = random_nearest(n, d)
    assert mean == pytest.approx(float(nearest.mean()), abs=0.003)
    for threshold, share in above.items():
        assert share == pytest.approx(float((nearest > float(threshold)).double().mean()), abs=0.02)


def test_in_one_dimension_cosines_are_signs() -> None:
    assert random_nearest(2, 1)[0] == 0
    assert random_nearest(3, 1)[1]["0.9"] == 0.75


def test_one_direction_has_no_neighbour() -> None:
    with pytest.raises(InputError, match="two latents"):
        geometry(with_rows(torch.tensor([[1.0, 0], [0, 0]])))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (3, 6), (6, 6)], ids=str)
def test_the_best_matching_is_that_of_trying_all(n: int, m: int) -> None:
    source = np.random.default_rng(0)
    for _ in range(10):
        score = source.normal(size=(n, m)).round(1)  # with ties
        columns = best_matching(score)
        best = max(sum(score[i, p[i]] for i in range(n)) for p in permutations(range(m), n))
        assert len(set(columns.tolist())) == n
        assert score[np.arange(n), columns].sum() == pytest.approx(best)


def test_a_permuted_dictionary_is_the_same() -> None:
    sae = topk_dictionary(16, 80, 4, origin=AT)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    found = similarity(sae, with_rows(2 * sae.W_dec.detach()[order]))
    assert (found.forward, found.backward, found.matched) == pytest.approx((1, 1, 1), abs=1e-6)
    assert found.forward_above == found.matched_above == {"0.7": 1, "0.9": 1}


def test_a_part_of_a_wide_dictionary_is_in_it_and_not_the_other_way_round() -> None:
    """Orthogonal rows: what is not shared has cosine 0."""
    wide, narrow = with_rows(torch.eye(8)), with_rows(torch.eye(8)[:2])
    found = similarity(narrow, wide)
    assert (found.forward, found.backward, found.matched) == (1, 0.25, 1)
    assert similarity(wide, narrow).forward == 0.25


def test_two_rows_cannot_share_a_partner_when_matched() -> None:
    twice = with_rows(torch.tensor([[1.0, 0], [1.0, 0]]))
    found = similarity(twice, with_rows(torch.eye(2)))
    assert (found.forward, found.backward, found.matched) == (1, 0.5, 0.5)
    assert similarity(twice, with_rows(torch.eye(2)), match=False).matched is None


def test_directions_of_different_spaces_are_refused() -> None:
    with pytest.raises(InputError, match="2 and 3"):
        similarity(with_rows(torch.eye(2)), with_rows(torch.eye(3)))
    with pytest.raises(InputError, match="all its decoder rows are zero"):
        similarity(with_rows(torch.eye(2)), with_rows(torch.zeros(2, 2)))
