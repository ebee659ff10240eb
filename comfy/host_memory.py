"""Host memory that a prompt needed goes back to the system when the prompt is over.

glibc keeps what is freed in its arenas, for the next allocation: all pieces below its threshold for mapping (up to
32 MiB), so that a process stays as large as its largest prompt. `malloc_trim` gives whole free pages back; it walks
through all arenas, about a tenth of a second for half a gigabyte, so it is called only after much was added.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable

GROWTH = 64 << 20  # bytes of private memory above what was left after the last time


def private_bytes() -> int:
    """Resident memory of this process that is its own, without pages of files; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function; None with other C libraries."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


class HostMemory:
    """Remembers how much this process had after it last gave memory back."""

    def __init__(self) -> None:
        self._left: int | None = None

    def trim(self) -> int:
        """Give back what is free, if the process has grown by `GROWTH`; returns how many bytes became fewer."""
        trim, before = _malloc_trim(), private_bytes()
        if trim is None or before < (self._left or 0) + GROWTH:
            self._left = before if self._left is None else min(self._left, before)
            return 0
        trim(0)
        self._left = private_bytes()
        logging.debug("host memory: %.0f MiB, %.0f MiB given back", self._left / 2**20, (before - self._left) / 2**20)
        return max(before - self._left, 0)


_memory = HostMemory()


def trim() -> int:
    """`HostMemory.trim` of this process, between prompts."""
    return _memory.trim()
