"""`FactoredMatrix`: a product A B of low rank that is never formed.

An attention head's circuits are d_model × d_model (or vocabulary × vocabulary) matrices of rank d_head. Everything here works
on the factors: with A = Q_A R_A and Bᵀ = Q_B R_B, the small matrix R_A R_Bᵀ has the product's singular values and norm, and
B A its eigenvalues and trace.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from microtome.common.errors import InputError


class SVD(NamedTuple):
    """U diag(S) Vh of a product `[…, m, n]` of inner size r; k is the least of m, n and r."""

    U: Float[Tensor, "*lead m k"]
    S: Float[Tensor, "*lead k"]
    Vh: Float[Tensor, "*lead k n"]


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """The product of A `[…, m, r]` and B `[…, r, n]`, kept as its factors; leading axes broadcast.

    Raises InputError for factors that do not fit.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        fits = self.A.ndim >= 2 and self.B.ndim >= 2 and self.A.shape[-1] == self.B.shape[-2]
        if not fits:
            raise InputError(
                "These are no factors of a matrix",
                got=f"{list(self.A.shape)} and {list(self.B.shape)}",
                expected="[…, m, r] and [… , r, n]",
            )
        try:
            lead = torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        except RuntimeError as error:
            shapes = f"{list(self.A.shape)} and {list(self.B.shape)}"
            raise InputError("The leading axes of the factors differ", got=shapes) from error
        object.__setattr__(self, "A", self.A.expand(*lead, *self.A.shape[-2:]))
        object.__setattr__(self, "B", self.B.expand(*lead, *self.B.shape[-2:]))

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={list(self.shape)}, inner={self.A.shape[-1]})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product."""
        return (*self.A.shape[:-1], self.B.shape[-1])

    @property
    def ndim(self) -> int:
        return self.A.ndim

    @property
    def AB(self) -> Float[Tensor, "*lead m n"]:  # noqa: N802 - the field's name
        """The product itself, formed."""
        return self.A @ self.B

    @property
    def T(self) -> "FactoredMatrix":  # noqa: N802 - the field's name
        return FactoredMatrix(self.B.mT, self.A.mT)

    # ---- products ---------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        """With a matrix `[…, n, k]` or another product: a FactoredMatrix. With a vector `[n]`: a tensor `[…, m]`."""
        if isinstance(other, FactoredMatrix):
            middle = self.B @ other.A
            if self.A.shape[-1] <= other.A.shape[-1]:
                return FactoredMatrix(self.A, middle @ other.B)
            return FactoredMatrix(self.A @ middle, other.B)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            return (self.A @ (self.B @ other)[..., None])[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Any) -> Any:
        """A matrix `[…, k, m]` from the left: a FactoredMatrix. A vector `[m]`: a tensor `[…, n]`."""
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            return ((other @ self.A)[..., None, :] @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        """Index as if it were the product. Rows and columns given as slices or lists leave it factored; a single row or
        column gives the tensor."""
        keys = list(key) if isinstance(key, tuple) else [key]
        for at in [i for i, k in enumerate(keys) if k is ...][:1]:
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        if len(keys) > self.ndim:
            raise InputError("Too many indices", got=len(keys), expected=f"at most {self.ndim}, for {list(self.shape)}")
        keys += [slice(None)] * (self.ndim - len(keys))
        try:
            return self._part(tuple(keys[:-2]), keys[-2], keys[-1])
        except IndexError as error:
            raise InputError(f"There is no such part of a product of shape {list(self.shape)}", got=key) from error

    def _part(self, lead: tuple[Any, ...], row: Any, column: Any) -> Any:
        A, B = self.A[lead], self.B[lead]
        if isinstance(row, int) and isinstance(column, int):
            return (A[..., row, :] * B[..., :, column]).sum(-1)
        if isinstance(row, int):
            return (A[..., row, None, :] @ B[..., :, column])[..., 0, :]
        if isinstance(column, int):
            return (A[..., row, :] @ B[..., :, column, None])[..., 0]
        return FactoredMatrix(A[..., row, :], B[..., :, column])

    def corner(self, n: int = 4) -> Float[Tensor, "*lead rows columns"]:
        """The first n rows and columns, to look at."""
        return self.A[..., :n, :] @ self.B[..., :n]

    # ---- figures ----------------------------------------------------------------------------------------------------

    def svd(self) -> SVD:
        """The singular value decomposition of the product, largest value first; in float32 at least."""
        q_a, r_a = torch.linalg.qr(_full(self.A))
        q_b, r_b = torch.linalg.qr(_full(self.B).mT)
        U, S, Vh = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
        return SVD(q_a @ U, S, Vh @ q_b.mT)

    def norm(self) -> Float[Tensor, "*lead"]:
        """The Frobenius norm of the product."""
        r_a, r_b = torch.linalg.qr(_full(self.A)).R, torch.linalg.qr(_full(self.B).mT).R
        small: Tensor = r_a @ r_b.mT
        return small.square().sum((-2, -1)).sqrt()

    def eigenvalues(self) -> Complex[Tensor, "*lead r"]:
        """Those of B A `[r, r]`: of the product A B they are all that are not zero. Raises InputError unless m = n."""
        self._need_square("eigenvalues")
        values: Tensor = torch.linalg.eigvals(_full(self.B) @ _full(self.A))
        return values

    def trace(self) -> Float[Tensor, "*lead"]:
        """The sum of the product's diagonal. Raises InputError unless m = n."""
        self._need_square("trace")
        trace: Tensor = (self.A * self.B.mT).sum((-2, -1))
        return trace

    def _need_square(self, what: str) -> None:
        if self.shape[-1] != self.shape[-2]:
            raise InputError(f"Only a square matrix has {what}", got=list(self.shape[-2:]))


def _full(tensor: Tensor) -> Tensor:
    """Half precision has no decompositions."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
