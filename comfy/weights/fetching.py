"""Originals to a device, all of them or the parts that are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from comfy import accounting

from .records import Weight
from .staging import Pair, copy_all

BATCH_BYTES = 1 << 30  # of weights that are copied together: parts that are gathered in host memory first take so much


def pairs_of(weight: Weight, target: torch.Tensor) -> Iterator[Pair]:
    """What is copied from a weight's original to `target`, which has the shape of what is held."""
    held = weight.held
    if held is None:
        yield weight.source, target
    elif held.axis in (0, None) or not target.is_cuda:
        yield from held.views(weight.source, target)
    else:  # the copy engine takes contiguous memory
        yield held.take(weight.source.detach()), target


def fetch(pairs: Iterable[Pair]) -> None:
    """Copy originals to the device."""
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += pair[1].nbytes
        accounting.count("weight_bytes", pair[1].nbytes)
        if size >= BATCH_BYTES:
            copy_all(batch)
            batch, size = [], 0
    copy_all(batch)


def has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes can be spent on speed: a fifth of the device stays free for computing."""
    if device.type != "cuda":
        return True
    import comfy.model_management as management

    return management.get_free_memory(device) - size > management.get_total_memory(device) // 5
