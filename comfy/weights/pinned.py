"""Copies of host tensors in pinned memory, from which the copy engine reads at the speed of the link.

Pinning is slow when the system has to find the pages first; memory that was written to is registered at about 13 GB/s.
Pages of memory-mapped files cannot be registered.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence

import psutil
import torch

from .staging import copy_threads

_ALIGNMENT = 256
BUDGET = 0.4  # of the memory that is available, for all ranks of this host together


def may_pin(size: int) -> bool:
    """Whether `size` bytes may be pinned by each rank of this host."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return size * ranks <= BUDGET * psutil.virtual_memory().available


def pinned_copies(sources: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """A pinned copy of each host tensor; None where memory or the driver does not allow it."""
    sizes = [-(-source.nbytes // _ALIGNMENT) * _ALIGNMENT for source in sources]
    total = sum(sizes)
    if total == 0 or not may_pin(total):
        return None
    memory = mmap.mmap(-1, total)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    copies, position, threads = [], 0, torch.get_num_threads()
    torch.set_num_threads(copy_threads())
    try:
        with torch.inference_mode(False):
            for source, size in zip(sources, sizes):
                flat = whole[position : position + source.nbytes]
                copies.append(flat.view(source.dtype).view(source.shape).copy_(source.detach()))
                position += size
    finally:
        torch.set_num_threads(threads)
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(whole.data_ptr(), total, 0)) != 0:
        return None
    # The mapping lives as long as a tensor refers to it; it is unregistered first.
    weakref.finalize(whole.untyped_storage(), runtime.cudaHostUnregister, whole.data_ptr())
    return copies
