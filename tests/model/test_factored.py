"""`FactoredMatrix` against the product that it stands for."""

import pytest
import torch
from torch import Tensor

from microtome.common.errors import InputError
from microtome.model.factored import FactoredMatrix

SHAPES = pytest.mark.parametrize(
    ("lead", "m", "r", "n"),
    [((), 9, 3, 9), ((2,), 7, 4, 5), ((3, 2), 6, 6, 6), ((), 3, 8, 3), ((2,), 5, 9, 4), ((0,), 4, 2, 4)],
)


def make(lead: tuple[int, ...], m: int, r: int, n: int) -> FactoredMatrix:
    generator = torch.Generator().manual_seed(m * 100 + r * 10 + n)
    kind = {"generator": generator, "dtype": torch.float64}
    return FactoredMatrix(torch.randn(*lead, m, r, **kind), torch.randn(*lead, r, n, **kind))  # type: ignore[call-overload]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@SHAPES
def test_products(lead: tuple[int, ...], m: int, r: int, n: int) -> None:
    product = make(lead, m, r, n)
    dense = product.A @ product.B
    assert product.shape == dense.shape
    assert product.ndim == dense.ndim
    close(product.AB, dense)
    close(product.T.AB, dense.mT)
    right, left = torch.randn(n, 4, dtype=torch.float64), torch.randn(2, m, dtype=torch.float64)
    assert isinstance(product @ right, FactoredMatrix)
    close((product @ right).AB, dense @ right)
    close((left @ product).AB, left @ dense)
    close(product @ right[:, 0], dense @ right[:, 0])
    close(left[1] @ product, left[1] @ dense)


def test_products_of_products_keep_the_smaller_inner_size() -> None:
    narrow, wide = make((), 6, 2, 7), make((2,), 7, 5, 4)
    for first, second in ((narrow, wide), (wide.T, narrow.T)):
        both = first @ second
        assert both.A.shape[-1] == 2
        close(both.AB, first.AB @ second.AB)


@SHAPES
def test_svd_and_norm(lead: tuple[int, ...], m: int, r: int, n: int) -> None:
    product = make(lead, m, r, n)
    U, S, Vh = product.svd()
    k = min(m, r, n)
    assert (U.shape, S.shape, Vh.shape) == ((*lead, m, k), (*lead, k), (*lead, k, n))
    close(U * S[..., None, :] @ Vh, product.AB)
    close(S, torch.linalg.svdvals(product.AB)[..., :k])
    identity = torch.eye(k, dtype=torch.float64).expand(*lead, k, k)
    close(U.mT @ U, identity)
    close(Vh @ Vh.mT, identity)
    close(product.norm(), torch.linalg.matrix_norm(product.AB))


@pytest.mark.parametrize(("lead", "m", "r"), [((), 9, 3), ((2,), 6, 6), ((3,), 4, 7)])
def test_eigenvalues_and_trace(lead: tuple[int, ...], m: int, r: int) -> None:
    product = make(lead, m, r, m)
    close(product.trace(), product.AB.diagonal(dim1=-2, dim2=-1).sum(-1))
    eigenvalues = product.eigenvalues()
    assert eigenvalues.shape == (*lead, r)
    k = min(m, r)
    powers = range(1, 5)  # two lists of numbers are the same if the sums of their powers are
    for power in powers:
        dense = torch.linalg.eigvals(product.AB)
        close((eigenvalues**power).sum(-1), (dense**power).sum(-1))
    largest = torch.linalg.eigvals(product.AB).abs().sort(-1, descending=True).values[..., :k]
    close(eigenvalues.abs().sort(-1, descending=True).values[..., :k], largest)


def test_only_square_products_have_eigenvalues_and_a_trace() -> None:
    with pytest.raises(InputError, match=r"Only a square matrix has eigenvalues. Got: \[7, 5\]"):
        make((2,), 7, 4, 5).eigenvalues()
    with pytest.raises(InputError, match="trace"):
        make((2,), 7, 4, 5).trace()


@pytest.mark.parametrize(
    "key",
    [
        1,
        (1, 1),
        (slice(None), 0, slice(1, 4)),
        (..., slice(2, 5), [0, 3]),
        (..., 3),
        (0, 1, 4),
        (0, 1, slice(None), 2),
        (0, 1, 4, 2),
        (slice(1), ..., 2, slice(2)),
        (..., torch.tensor([4, 1]), slice(None)),
        (slice(None), 1),
        ...,
    ],
)
def test_indexing_is_that_of_the_product(key: object) -> None:
    product = make((3, 2), 6, 4, 5)
    found = product[key]
    close(found.AB if isinstance(found, FactoredMatrix) else found, product.AB[key])  # type: ignore[index]


def test_what_stays_factored_and_what_does_not() -> None:
    product = make((2,), 6, 3, 5)
    assert isinstance(product[0], FactoredMatrix)
    assert isinstance(product[..., :2, 1:], FactoredMatrix)
    assert isinstance(product[..., 0, :], Tensor)
    assert isinstance(product[0, :, 0], Tensor)
    close(product.corner(3), product.AB[..., :3, :3])
    with pytest.raises(InputError, match="Too many indices. Got: 4. Expected: at most 3"):
        product[0, 0, 0, 0]
    with pytest.raises(InputError, match=r"no such part of a product of shape \[2, 6, 5\]"):
        product[2]
    with pytest.raises(InputError, match="no such part"):
        product[0, 6, 0]


def test_leading_axes_broadcast() -> None:
    A, B = torch.randn(4, 5, 2), torch.randn(2, 5)
    product = FactoredMatrix(A, B)
    assert product.shape == (4, 5, 5)
    torch.testing.assert_close(product.AB, A @ B)
    torch.testing.assert_close(product[3].AB, A[3] @ B)
    torch.testing.assert_close(product.trace(), torch.stack([(a @ B).trace() for a in A]))


def test_half_precision_is_decomposed_in_full() -> None:
    A, B = torch.randn(6, 2).bfloat16(), torch.randn(2, 6).bfloat16()
    dense = A.float() @ B.float()
    product = FactoredMatrix(A, B)
    torch.testing.assert_close(product.svd().S, torch.linalg.svdvals(dense)[:2])
    torch.testing.assert_close(product.norm(), torch.linalg.matrix_norm(dense))
    assert product.eigenvalues().dtype == torch.complex64


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"no factors of a matrix. Got: \[3, 2\] and \[3, 2\]"):
        FactoredMatrix(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(InputError, match="no factors"):
        FactoredMatrix(torch.ones(3), torch.ones(3, 2))
    with pytest.raises(InputError, match="leading axes"):
        FactoredMatrix(torch.ones(4, 3, 2), torch.ones(3, 2, 3))
    with pytest.raises(TypeError):
        make((), 3, 2, 3) @ 2
    assert repr(make((2,), 7, 4, 5)) == "FactoredMatrix(shape=[2, 7, 5], inner=4)"
