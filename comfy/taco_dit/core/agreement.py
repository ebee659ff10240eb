"""Ranks must start sampling from the same tensors: checksums are compared, and rank 0's tensors replace others."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from comfy_execution.lockstep import Lockstep


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor inside nested dicts, lists and tuples, with its path, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key in value:
            if isinstance(key, (str, int)):
                yield from tensors_of(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{i}]")


def checksum(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and a CRC-32 of the bytes."""
    dense = tensor.detach()
    if dense.device.type == "meta":
        return tuple(dense.shape), str(dense.dtype), 0
    flat = dense.to("cpu").contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return tuple(dense.shape), str(dense.dtype), zlib.crc32(raw)


def patch_summary(patcher: Any) -> list[tuple[Any, ...]]:
    """What identifies a patcher's weight patches across processes: keys, strengths, kinds."""
    return [
        (key, *((float(p[0]), float(p[2]), type(p[1]).__name__, p[3]) for p in patches))
        for key, patches in sorted(getattr(patcher, "patches", {}).items())
    ]


def agree_on(lockstep: Lockstep, inputs: dict[str, Any], patcher: Any) -> bool:
    """Compare the tensors in `inputs` over all ranks; where ranks differ, overwrite with rank 0's, in place.

    Returns True when something differed. Raises RuntimeError when the number, shapes or weight patches differ: then
    ranks run different workflows and no picture can be right.
    """
    if lockstep.world_size == 1:
        return False
    found = list(tensors_of(inputs))
    mine = ([(path, checksum(tensor)) for path, tensor in found], patch_summary(patcher))
    everyone = lockstep.gather("checksums", mine)
    first_sums, first_patches = everyone[0]
    for rank, (sums, patches) in enumerate(everyone):
        if patches != first_patches:
            raise RuntimeError(
                f"rank {rank} has other LoRA or weight patches than rank 0; a custom node differs by rank"
            )
        shapes = [(path, value[:2]) for path, value in sums]
        if shapes != [(path, value[:2]) for path, value in first_sums]:
            raise RuntimeError(
                f"rank {rank} would sample tensors of other shapes than rank 0; a custom node differs by rank"
            )
    differing = sorted(
        {path for sums, _ in everyone for (path, value), (_, first) in zip(sums, first_sums) if value != first}
    )
    if not differing:
        return False
    if lockstep.is_first:  # all ranks have the same list; one line is enough
        logging.warning(
            "TACO-DiT: ranks disagreed about %s (a node draws random numbers of its own?); all use rank 0's",
            ", ".join(differing),
        )
    by_path = dict(found)
    shared = lockstep.share("tensors", lambda: [by_path[path].cpu() for path in differing])
    for path, tensor in zip(differing, shared):
        target = by_path[path]
        if not target.is_inference() or torch.is_inference_mode_enabled():
            target.copy_(tensor)
    return True
