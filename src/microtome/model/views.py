"""Views: where an activation lies within the tensor that a module takes or gives.

`read` cuts the activation out, `write` puts a changed one back: `write(t, read(t))` equals `t` bit for bit. Both keep
the autograd graph whole.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class View(Protocol):
    """How to read an activation from a module's tensor, and how to write another one in its place."""

    def read(self, tensor: Tensor) -> Tensor: ...

    def write(self, tensor: Tensor, activation: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """The tensor itself."""

    def read(self, tensor: Tensor) -> Tensor:
        return tensor

    def write(self, tensor: Tensor, activation: Tensor) -> Tensor:
        return activation


@dataclass(frozen=True)
class Columns:
    """`n · width` columns from `start` on; shown as `[…, n, width]`, or as `[…, width]` where n is None (neurons)."""

    start: int
    n: int | None
    width: int

    @property
    def stop(self) -> int:
        return self.start + (1 if self.n is None else self.n) * self.width

    def read(self, tensor: Tensor) -> Tensor:
        columns = tensor[..., self.start : self.stop]
        return columns if self.n is None else columns.unflatten(-1, (self.n, self.width))

    def write(self, tensor: Tensor, activation: Tensor) -> Tensor:
        columns = activation if self.n is None else activation.flatten(-2)
        if columns.shape[-1] == tensor.shape[-1]:
            return columns
        return torch.cat([tensor[..., : self.start], columns, tensor[..., self.stop :]], dim=-1)


@dataclass(frozen=True)
class Grouped:
    """One of q, k, v in a fused projection whose columns are, for each key/value head in turn, its query heads, its key
    and its value: `[…, n_kv_heads, n_heads / n_kv_heads + 2, d_head]` (GPT-NeoX, Bloom, Falcon)."""

    part: Literal["q", "k", "v"]
    n_heads: int
    n_kv_heads: int
    d_head: int

    def _split(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries = self.n_heads // self.n_kv_heads
        grouped = tensor.unflatten(-1, (self.n_kv_heads, queries + 2, self.d_head))
        return grouped[..., :queries, :], grouped[..., queries : queries + 1, :], grouped[..., queries + 1 :, :]

    def read(self, tensor: Tensor) -> Tensor:
        return self._split(tensor)["qkv".index(self.part)].flatten(-3, -2)

    def write(self, tensor: Tensor, activation: Tensor) -> Tensor:
        parts = list(self._split(tensor))
        parts["qkv".index(self.part)] = activation.unflatten(-2, (self.n_kv_heads, -1))
        return torch.cat(parts, dim=-2).flatten(-3)
