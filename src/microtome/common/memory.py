"""Memory that is freed and soon wanted again.

glibc gives large blocks back to the system as soon as they are freed. A loop that frees and takes the same matrices in each
round then waits for the system to map and zero their pages anew, which takes longer than the arithmetic on them: a step of
training a ReLU dictionary (d_sae 16,384, batches of 2,048) takes 920 ms so, and 640 ms with its memory kept.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h: what mallopt sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
# Where glibc's own rules for the thresholds end in a process that uses large blocks (the first call of mallopt ends the rules
# for good), and its default for the third.
_USUAL_TRIM_THRESHOLD, _USUAL_MMAP_THRESHOLD, _USUAL_MMAP_MAX = 64 << 20, 32 << 20, 65_536


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """As long as it lasts, this process keeps the memory that it frees, and takes it again. At the end what is free goes back
    to the system, and blocks below 32 MiB are taken as in any process that has used large ones. It does not nest: the first
    that ends, ends it for all. Does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.malloc_trim(0)  # what was freed before lies in pieces
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD)
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP_THRESHOLD)
        libc.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the process
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
