"""Freed memory stays with the process inside `freed_memory_kept`, and goes back to the system behind it."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

from microtome.common import memory
from microtome.common.memory import freed_memory_kept

# In a process of its own: what others have freed in this one would be taken first.
SCRIPT = """
import ctypes
import json
from microtome.common.memory import freed_memory_kept

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS:"))

def take_and_free():
    b"x" * (64 << 20)
    return resident()

def is_mapped_anew(mib):
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    address = libc.malloc(mib << 20)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if "[heap]" in line]
    libc.free(address)
    return not any(int(a, 16) <= address < int(b, 16) for a, b in spans)

before = resident()
with freed_memory_kept():
    within = [take_and_free(), take_and_free()]
grown = [mib - before for mib in (*within, resident(), take_and_free())]
print(json.dumps([grown, [is_mapped_anew(mib) for mib in (1, 16, 40)]]))
"""


@pytest.mark.skipif(memory._glibc() is None or not Path("/proc/self/status").is_file(), reason="needs Linux with glibc")
def test_freed_memory_is_kept_until_the_end() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    (once, twice, behind, later), mapped = json.loads(ran.stdout)
    assert 60 < once < 80
    assert twice == pytest.approx(once, abs=4)
    assert behind < 20
    assert later < 20
    # Blocks below 32 MiB come from the heap, as in any process that has freed a large one before.
    assert mapped == [False, False, True]


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: None) -> ctypes.CDLL:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert memory._glibc() is None
    with freed_memory_kept():
        pass
