"""Freed memory stays with the process inside `freed_memory_kept`, and goes back to the system behind it."""

import ctypes
from pathlib import Path

import pytest
import torch

from microtome.common import memory
from microtome.common.memory import freed_memory_kept

MIB = 1 << 20


def resident() -> int:
    """This process's resident memory in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def take_and_free() -> None:
    torch.ones(64 * MIB, dtype=torch.uint8)


@pytest.mark.skipif(memory._glibc() is None or not Path("/proc/self/status").is_file(), reason="needs Linux with glibc")
def test_freed_memory_is_kept_until_the_end() -> None:
    before = resident()
    with freed_memory_kept():
        take_and_free()
        assert resident() - before > 50 * MIB
        kept = resident()
        take_and_free()
        assert resident() - kept < 20 * MIB
    assert resident() - before < 20 * MIB
    take_and_free()
    assert resident() - before < 20 * MIB


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: None) -> ctypes.CDLL:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with freed_memory_kept():
        take_and_free()
    assert memory._glibc() is None
