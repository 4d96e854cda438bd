"""Weights from files, without running anything that is in them: safetensors, pickles with `weights_only`, npz without
pickles.

`TensorFile.take` gives a tensor only in the shape that it has to have and without NaN, so a reader says each shape once
and a file that does not fit is named with what was found.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from microtome.common.errors import ArtifactError


class TensorFile:
    """The tensors of one file (or of several that belong together), each given out as float32."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor], beside: str = "its config") -> None:
        self.file, self.tensors, self._beside = file, dict(tensors), beside
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that has to be there with so many axes."""
        if name not in self.tensors or self.tensors[name].ndim != axes:
            got = tuple(self.tensors[name].shape) if name in self.tensors else None
            raise self.misfit(f"{name} {got}", f"{name} with {axes} axes")
        return tuple(self.tensors[name].shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`. Raises ArtifactError when it is not there, has another shape, or holds NaN or infinity."""
        found = tuple(self.tensors[name].shape) if name in self.tensors else None
        if found != shape:
            raise self.misfit(f"{name} {found}", f"{name} {shape}")
        self._taken.add(name)
        return finite(name, self.tensors[name].detach().float(), self.file)

    def take_if_there(self, name: str, *shape: int) -> Tensor | None:
        """The same, or None when the file has no such tensor."""
        return self.take(name, *shape) if name in self.tensors else None

    def skip(self, *names: str) -> None:
        """Names that may be there and say nothing about the codes."""
        self._taken.update(names)

    def refuse(self, *starts: str) -> None:
        """Raise ArtifactError when a tensor was not asked for whose name begins so: another kind's, so the config is wrong."""
        others = [name for name in self.left if name.startswith(starts)]
        if others:
            raise self.misfit(f"a tensor {others[0]}, which another kind has", "only what this kind has")

    @property
    def left(self) -> list[str]:
        """The tensors that nobody asked for."""
        return sorted(self.tensors.keys() - self._taken)

    def misfit(self, got: str, expected: str) -> ArtifactError:
        return ArtifactError(f"{self.file} does not fit {self._beside}", got=got, expected=expected)


def finite(name: str, tensor: Tensor, file: Path) -> Tensor:
    """The tensor itself, when all its numbers are finite."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise ArtifactError(
            f"{file} is damaged", got=f"{name} with {bad:,} values that are NaN or infinite", expected="finite weights"
        )
    return tensor


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    _there(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error
    return tensors


def read_pickle(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote: tensors and plain values. A pickle that holds anything else, code say, is refused."""
    _there(file)
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{file} is refused: it is damaged, or holds more than tensors and plain values, and reading that could run code",
            got=_first_line(error)[:160],
            fix="Save its state_dict alone, with the library that made it, on a machine where you trust the file",
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{file} is damaged: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} holds no weights", got=type(value).__name__, expected="a dict of tensors")
    return value


def read_npz(file: Path) -> dict[str, Tensor]:
    """All arrays of an npz file; arrays of Python objects, which are pickles, are refused."""
    _there(file)
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is refused: {error}", expected="arrays of numbers") from error
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from error


def only_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the values of a pickle."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _there(file: Path) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file.parent} has no weights", expected=file.name)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
