"""`ArraySource`: rows that are already there, in memory or in a file. For synthetic data, other tools' files, and tests."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microtome.activations.source import ActivationSource
from microtome.common.artifacts import sha256
from microtome.common.config import JsonObject, require
from microtome.common.device import dtype_name
from microtome.common.errors import ArtifactError, InputError, unknown_name


class ArraySource(ActivationSource):
    """Blocks of `rows_per_block` rows of a matrix `[n, d]`: a tensor, or a `.npy` or `.safetensors` file.

    A `.npy` file is mapped, not read whole; of a `.safetensors` file `key` says which tensor, if it has several.
    `hook_names` and `widths` say which columns belong to which point: one point of all columns, unless said otherwise.
    Raises InputError for what is no floating matrix, ConfigError for widths that are not its columns, ArtifactError for
    a file that cannot be read.
    """

    def __init__(
        self,
        rows: Float[Tensor, "row d"] | str | Path,
        *,
        hook_names: str | Sequence[str] = "rows",
        widths: Sequence[int] | None = None,
        model_name: str = "unknown",
        key: str | None = None,
        rows_per_block: int = 2048,
    ) -> None:
        self.file = None if isinstance(rows, Tensor) else Path(rows)
        self.rows = rows if isinstance(rows, Tensor) else _opened(Path(rows), key)
        if self.rows.ndim != 2 or not self.rows.is_floating_point() or not len(self.rows):
            raise InputError(
                "The rows must be a floating matrix [n, d]", got=f"{self.rows.dtype} {list(self.rows.shape)}"
            )
        self.model_name, self.rows_per_block = model_name, rows_per_block
        self.hook_names = (hook_names,) if isinstance(hook_names, str) else tuple(hook_names)
        self.widths = (self.rows.shape[1],) if widths is None else tuple(widths)
        require(len(set(self.hook_names)) == len(self.widths), "Each hook point needs a width", got=self.widths)
        require(sum(self.widths) == self.rows.shape[1], "The widths must add up to d", got=self.widths)
        self.n_blocks = -(-len(self.rows) // rows_per_block)

    @property
    def block_rows(self) -> Int[np.ndarray, " block"]:
        sizes = np.full(self.n_blocks, self.rows_per_block)
        sizes[-1] = len(self.rows) - self.rows_per_block * (self.n_blocks - 1)
        return sizes

    def read(self, block: int) -> Float[Tensor, "row d"]:
        return self.rows[block * self.rows_per_block : (block + 1) * self.rows_per_block]

    def describe(self) -> JsonObject:
        return {
            "kind": "array",
            "hook_names": list(self.hook_names),
            "model": {"name": self.model_name},
            "dataset": {"fingerprint": self.fingerprint, "n_rows": len(self.rows), "context": None, "special_ids": []},
            "dtype": dtype_name(self.rows.dtype),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the content: of the file, or of the rows in memory."""
        if self.file is not None:
            return sha256(self.file)[:16]
        digest = hashlib.sha256(repr((str(self.rows.dtype), tuple(self.rows.shape))).encode())
        for block in range(self.n_blocks):
            digest.update(self.read(block).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _opened(file: Path, key: str | None) -> Tensor:
    if not file.is_file():
        raise ArtifactError(f"There is no file {file}", expected="a .npy or .safetensors file of rows [n, d]")
    try:
        if file.suffix == ".npy":
            # copy-on-write: the pages stay the file's, and torch gets memory that it may write to
            return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
        if file.suffix == ".safetensors":
            return _tensor(file, key)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    raise ArtifactError(f"{file} is of no known kind", expected="a .npy or .safetensors file")


def _tensor(file: Path, key: str | None) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        wanted = keys[0] if key is None and len(keys) == 1 else key
        if wanted is None:
            raise InputError(f"{file} holds several tensors", got=", ".join(keys), fix="Say which one: key=…")
        if wanted not in keys:
            raise unknown_name(f"tensor in {file}", wanted, keys, InputError)
        tensor: Tensor = opened.get_tensor(wanted)
        return tensor
