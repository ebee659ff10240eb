"""Copies between tensors of different layouts whose innermost runs are contiguous, in Triton.

Exchanges between ranks and joint attention rearrange tokens, heads and parts around runs of some thousand contiguous
elements. Torch's kernel for strided copies computes an address for each element and reaches a third of the memory's
bandwidth; here a program copies one run. Elsewhere (CPU, no Triton) torch copies.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

_LARGEST_RUN = 32768
_SMALLEST_RUN = 64


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["second", "third"])
    def copy(  # type: ignore[no-untyped-def]  # Triton gives annotations a meaning of its own
        source, target, second, third, width, s0, s1, s2, t0, t1, t2, BLOCK: tl.constexpr
    ):  # fmt: skip
        # One program: one run. Axes 1 and 2 have `second` and `third` entries.
        run = tl.program_id(0).to(tl.int64)
        k = run % third
        j = (run // third) % second
        i = run // (third * second)
        cols = tl.arange(0, BLOCK)
        inside = cols < width
        value = tl.load(source + i * s0 + j * s1 + k * s2 + cols, mask=inside)
        tl.store(target + i * t0 + j * t1 + k * t2 + cols, value, mask=inside)

    return copy


@functools.cache
def _available() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def _merged(source: torch.Tensor, target: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """Sizes and both tensors' strides with neighbouring axes joined where both allow it and axes of one entry gone."""
    sizes: list[int] = []
    strides: tuple[list[int], list[int]] = ([], [])
    for size, s, t in zip(source.shape, source.stride(), target.stride()):
        if size == 1:
            continue
        if sizes and strides[0][-1] == size * s and strides[1][-1] == size * t:
            sizes[-1] *= size
            strides[0][-1], strides[1][-1] = s, t
        else:
            sizes.append(size)
            strides[0].append(s)
            strides[1].append(t)
    return sizes, *strides


def copy_runs(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target.copy_(source)` for tensors of the same shape, dtype and device, fast where innermost runs are long."""
    if torch.compiler.is_compiling() or not _launch(source, target):
        target.copy_(source)


def _launch(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Copy with the kernel; False where it does not apply."""
    alike = source.is_cuda and target.is_cuda and source.dtype == target.dtype and source.shape == target.shape
    if not alike or not source.numel() or not _available() or (torch.is_grad_enabled() and source.requires_grad):
        return False
    sizes, s, t = _merged(source, target)
    if not sizes or len(sizes) > 4 or s[-1] != 1 or t[-1] != 1 or not _SMALLEST_RUN <= sizes[-1] <= _LARGEST_RUN:
        return False
    pad = 4 - len(sizes)
    sizes, s, t = [1] * pad + sizes, [0] * pad + s, [0] * pad + t
    block = 1 << (sizes[3] - 1).bit_length()
    _kernel()[(sizes[0] * sizes[1] * sizes[2],)](
        source, target, sizes[1], sizes[2], sizes[3], *s[:3], *t[:3], BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return True


def joined_tokens(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[B, H, L1, D] and [B, H, L2, D] -> [B, H, L1 + L2, D], a view of token-major memory [B, L, H, D]."""
    batch, heads, length, size = first.shape
    out = first.new_empty((batch, length + second.shape[2], heads, size))
    copy_runs(first.transpose(1, 2), out[:, :length])
    copy_runs(second.transpose(1, 2), out[:, length:])
    return out.transpose(1, 2)
