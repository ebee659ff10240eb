"""RMS norm of queries and keys and their rotation in one pass, on NVIDIA GPUs, in Triton.

Families norm by head (`norm_and_rotate`) or over all heads of a token together (`norm_together_and_rotate`).

Compiled from torch operations the same takes about four times as long: the reduction and the pairwise rotation want
different tilings, and the rotary table is read again for each head. Without Triton, without a GPU or for shapes the
kernel does not cover, `norm_and_rotate` says so with None and the caller uses torch operations.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from comfy.ldm.common_dit import rms_norm

_HEADS_PER_PROGRAM = 8
_LARGEST_TOKEN = 8192  # channels of all heads that one program holds in registers


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens", "heads"])  # a new number of tokens needs no new code
    def norm_rotate(  # type: ignore[no-untyped-def]  # Triton gives annotations a meaning of its own
        source, scale, table, means, target, tokens, heads, source_batch, source_token, target_batch, target_token,
        table_batch, table_token, table_head, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
        GIVEN: tl.constexpr, BY_HEAD: tl.constexpr,
    ):  # fmt: skip
        # One program: one token, BLOCK heads (all of them if TOGETHER). Rows are [heads, SIZE] at stride SIZE.
        token, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        rows = block * BLOCK + tl.arange(0, BLOCK)[:, None]
        cols = tl.arange(0, SIZE)[None, :]
        inside = rows < heads
        start = source + batch.to(tl.int64) * source_batch + token.to(tl.int64) * source_token
        x = tl.load(start + rows * SIZE + cols, mask=inside, other=0.0).to(tl.float32)
        if TOGETHER:
            if GIVEN:
                mean_square = tl.load(means + batch.to(tl.int64) * tokens + token)
            else:
                mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / (heads * SIZE)
            factor = tl.load(scale + rows * SIZE + cols, mask=inside, other=0.0).to(tl.float32)
        else:
            mean_square = tl.sum(x * x, axis=1)[:, None] / SIZE
            factor = tl.load(scale + cols).to(tl.float32)
        x = x * tl.rsqrt(mean_square + eps) * factor
        even, odd = tl.split(tl.reshape(x, (BLOCK, SIZE // 2, 2)))
        pair = tl.arange(0, SIZE // 2)[None, :] * 4
        matrix = table + batch.to(tl.int64) * table_batch + token.to(tl.int64) * table_token + pair
        if BY_HEAD:
            matrix += tl.minimum(rows, heads - 1) * table_head
        first = tl.load(matrix) * even + tl.load(matrix + 1) * odd
        second = tl.load(matrix + 2) * even + tl.load(matrix + 3) * odd
        out = tl.reshape(tl.join(first, second), (BLOCK, SIZE))
        place = target + batch.to(tl.int64) * target_batch + token.to(tl.int64) * target_token
        tl.store(place + rows * SIZE + cols, out.to(target.dtype.element_ty), mask=inside)

    return norm_rotate


def _norm_rotate(
    x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, eps: float, together: bool = False,
    means: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [B, L, H, D] (rows of a token contiguous), table [B or 1, H or 1, L, D/2, 2, 2] -> [B, L, H, D].

    scale: [D], or [H*D] with `together`, where the mean squares of tokens may be given: means [B, L, 1] fp32.
    """
    batch, tokens, heads, size = x.shape
    out = torch.empty((batch, tokens, heads, size), dtype=x.dtype, device=x.device)
    block = 1 << (heads - 1).bit_length()
    block = block if together else min(_HEADS_PER_PROGRAM, block)
    table, given = table.contiguous(), means is not None
    means = table if means is None else means.contiguous()  # the kernel reads them only if they are GIVEN
    _kernel()[(tokens, -(-heads // block), batch)](
        x, scale, table, means, out, tokens, heads, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        table.stride(0) if table.shape[0] > 1 else 0, table.stride(2), table.stride(1) if table.shape[1] > 1 else 0, eps,
        SIZE=size, BLOCK=block, TOGETHER=together, GIVEN=given, BY_HEAD=table.shape[1] > 1,
        num_warps=8 if together else 4,
    )  # fmt: skip
    return out


@functools.cache
def _available() -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


def _fits(x: torch.Tensor, size: int, table: torch.Tensor) -> bool:
    """Whether the kernel covers heads of `size` in x."""
    if torch.compiler.is_compiling():  # the compiler fuses the torch operations by itself
        return False
    fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and size >= 16 and size & (size - 1) == 0
    trains = torch.is_grad_enabled() and x.requires_grad  # the kernel has no derivative
    return fits and not trains and x.numel() > 0 and table.dtype == torch.float32 and _available()


def norm_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    table: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Normed and rotated q and k, or None where this kernel does not apply.

    q, k: [B, H, L, D] views of token-major memory, half precision on CUDA, D a power of two. scales [D].
    table: [B or 1, 1, L, D/2, 2, 2] fp32. Returns [B, H, L, D] views of token-major memory. Sums and rotation are in
    fp32 and rounded once, where the separate operations round after the norm too.
    """
    if not _fits(q, q.shape[-1], table):
        return None
    size = q.shape[-1]
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if any(t.stride(-1) != 1 or t.stride(-2) != size for t in (q, k)):
        return None
    return _norm_rotate(q, q_scale, table, eps).transpose(1, 2), _norm_rotate(k, k_scale, table, eps).transpose(1, 2)


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of the last axis turned: x [B, H, L, D], table [B or 1, H or 1, L, D/2, 2, 2] -> as x.

    Computed in the table's dtype, with tokens before heads as the linears wrote them.
    """
    matrices = table.transpose(1, 2)
    even, odd = x.transpose(1, 2).to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = (matrices[..., 0] * even.unsqueeze(-1)).addcmul(matrices[..., 1], odd.unsqueeze(-1))
    return turned.flatten(-2).to(x.dtype).transpose(1, 2)


def norm_together_and_rotate(
    x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor | None, size: int, eps: float = 1e-6,
    means: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """RMS norm over all heads of a token, then the rotation of each head of D = `size`: x [B, L, H*D] -> [B, H, L, D].

    scale [H*D]; table [B or 1, H or 1, L, D/2, 2, 2] fp32, None for no rotation. means [B, L, 1] fp32: the mean squares
    of tokens of which x has only some heads. The result is a view of token-major memory. On GPUs in half precision sums
    and rotation are in fp32 and rounded once.
    """
    heads = (x.shape[-1] // size, size)
    if table is not None and x.shape[-1] <= _LARGEST_TOKEN and x.stride(-1) == 1 and _fits(x, size, table):
        return _norm_rotate(x.unflatten(-1, heads), scale, table, eps, together=True, means=means).transpose(1, 2)
    if means is None:
        normed = rms_norm(x, scale, eps)
    else:
        normed = (x.float() * torch.rsqrt(means + eps) * scale.float()).to(x.dtype)
    normed = normed.unflatten(-1, heads).transpose(1, 2)
    return normed if table is None else rotated(normed, table)


def norm_by_head_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    table: torch.Tensor | None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_and_rotate` with torch operations where the kernel does not apply; no rotation without a table."""
    fused = None if table is None else norm_and_rotate(q, k, q_scale, k_scale, table, eps)
    if fused is not None:
        return fused
    q, k = rms_norm(q, q_scale, eps), rms_norm(k, k_scale, eps)
    return (q, k) if table is None else (rotated(q, table), rotated(k, table))
