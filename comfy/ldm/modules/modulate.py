"""Layer norm, adaptive modulation and gated residuals of diffusion transformers, each in one pass over memory.

adaLN (Peebles & Xie 2022) surrounds every attention and MLP of a DiT with the same three operations. Written with torch
operations each of them reads and writes the tokens several times; the kernels here (Triton, NVIDIA GPUs) read every
input once and write every output once, compute in fp32 and round once. They need no compilation for new sizes: sizes are
arguments. Where they do not apply (CPU, fp32, training, no Triton) the same is computed with torch operations.

Shapes: tokens x, y [B, L, C]; scale, shift, gate [B or 1, 1 or L, C].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .eight_bit import INT8, SMALLEST_SCALE, Format, Rows, kernels_available, quantise

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_ROW = 16384  # channels that one program holds in registers


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["tokens"])  # a new number of tokens needs no new code
    def modulate(  # type: ignore[no-untyped-def]  # Triton gives annotations a meaning of its own
        x, y, gate, scale, shift, summed, normed, row_scales, tokens, width, x_batch, x_token, y_batch, y_token, gate_batch,
        gate_token, scale_batch, scale_token, shift_batch, shift_token, out_batch, out_token, eps, largest, smallest,
        GATED: tl.constexpr, NORMED: tl.constexpr, EIGHT_BIT: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One program: one token. Rows are contiguous; a modulation without token axis has token stride 0.
        token = tl.program_id(0).to(tl.int64)
        batch = tl.program_id(1).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        inside = cols < width
        row = tl.load(x + batch * x_batch + token * x_token + cols, mask=inside, other=0.0).to(tl.float32)
        out = batch * out_batch + token * out_token + cols
        if GATED:
            other = tl.load(y + batch * y_batch + token * y_token + cols, mask=inside, other=0.0).to(tl.float32)
            factor = tl.load(gate + batch * gate_batch + token * gate_token + cols, mask=inside, other=0.0)
            row += factor.to(tl.float32) * other
            rounded = row.to(summed.dtype.element_ty)
            tl.store(summed + out, rounded, mask=inside)
            row = rounded.to(tl.float32)
        if NORMED:
            mean = tl.sum(row, axis=0) / width
            centred = tl.where(inside, row - mean, 0.0)
            variance = tl.sum(centred * centred, axis=0) / width
            factor = tl.load(scale + batch * scale_batch + token * scale_token + cols, mask=inside, other=0.0)
            offset = tl.load(shift + batch * shift_batch + token * shift_token + cols, mask=inside, other=0.0)
            value = centred * tl.rsqrt(variance + eps) * (1.0 + factor.to(tl.float32)) + offset.to(tl.float32)
            if EIGHT_BIT:
                row_scale = tl.maximum(tl.max(tl.abs(value), axis=0) / largest, smallest)
                tl.store(row_scales + batch * tokens + token, row_scale)
                value = value / row_scale
                if INTEGER:
                    value = tl.floor(value + 0.5)
                value = tl.minimum(tl.maximum(value, -largest), largest)
            tl.store(normed + out, value.to(normed.dtype.element_ty), mask=inside)

    return modulate


def _fits(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the kernel covers these tensors."""
    if torch.compiler.is_compiling():
        return False  # the compiler fuses the torch operations by itself
    if not x.is_cuda or x.dtype not in _HALF or x.ndim != 3 or x.shape[-1] > _LARGEST_ROW or not kernels_available():
        return False
    tensors = (x, *others)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False  # the kernel has no derivative
    batch, tokens, width = x.shape
    return all(
        t.ndim == 3
        and t.is_cuda
        and t.stride(-1) == 1
        and t.shape[-1] == width
        and t.shape[0] in (1, batch)
        and t.shape[1] in (1, tokens)
        for t in tensors
    )


def _strides(tensor: torch.Tensor) -> tuple[int, int]:
    """(batch, token) strides in elements; 0 along an axis of one entry, which is the same for all."""
    return (
        tensor.stride(0) if tensor.shape[0] > 1 else 0,
        tensor.stride(1) if tensor.shape[1] > 1 else 0,
    )


def _modulate(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    form: Format | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + gate * y, its modulated norm, with `form` in eight bits, the scales of its rows); an output that was not asked
    for is an empty tensor."""
    batch, tokens, width = x.shape
    gated, normed = y is not None and gate is not None, scale is not None and shift is not None
    summed = x.new_empty(x.shape if gated else (0,))
    target = x.new_empty(x.shape if normed else (0,), dtype=x.dtype if form is None else form.dtype)
    row_scales = x.new_empty((batch, tokens, 1) if form is not None else (0,), dtype=torch.float32)
    if x.numel() == 0:
        return summed, target, row_scales
    y_, gate_ = (y, gate) if y is not None and gate is not None else (x, x)
    scale_, shift_ = (scale, shift) if scale is not None and shift is not None else (x, x)
    block = 1 << (width - 1).bit_length()
    _kernel()[(tokens, batch)](
        x, y_, gate_, scale_, shift_, summed, target, row_scales, tokens, width, *_strides(x), *_strides(y_), *_strides(gate_),
        *_strides(scale_), *_strides(shift_), tokens * width, width, eps, 1.0 if form is None else form.largest,
        SMALLEST_SCALE, GATED=gated, NORMED=normed, EIGHT_BIT=form is not None, INTEGER=form is INT8, BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return summed, target, row_scales


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm(x) without affine weights, times (1 + scale), plus shift: [B, L, C]."""
    if _fits(x, scale, shift):
        return _modulate(x, None, None, scale, shift, eps)[1]
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * y: [B, L, C]."""
    if _fits(x, y, gate):
        return _modulate(x, y, gate, None, None, 0.0)[0]
    return x + gate * y


def add_gated_norm_modulate(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x2, norm_modulate(x2, scale, shift)) with x2 = x + gate * y: [B, L, C] each."""
    if _fits(x, y, gate, scale, shift):
        return _modulate(x, y, gate, scale, shift, eps)[:2]
    x = x + gate * y
    return x, norm_modulate(x, scale, shift, eps)


def norm_modulate_rows(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, form: Format, eps: float = 1e-6
) -> Rows:
    """`norm_modulate` in eight bits, for a linear that reads them."""
    if _fits(x, scale, shift):
        return Rows(*_modulate(x, None, None, scale, shift, eps, form)[1:], x.dtype)
    return quantise(norm_modulate(x, scale, shift, eps), form)


def add_gated_norm_modulate_rows(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, form: Format,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, Rows]:  # fmt: skip
    """`add_gated_norm_modulate` with the norm in eight bits."""
    if _fits(x, y, gate, scale, shift):
        summed, values, row_scales = _modulate(x, y, gate, scale, shift, eps, form)
        return summed, Rows(values, row_scales, x.dtype)
    x = x + gate * y
    return x, norm_modulate_rows(x, scale, shift, form, eps)


def spread_rows(rows: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Modulation with one row for several tokens [B, n, C] -> by token [B, L, C]; as it is without `places`.

    places: [L], the row of each token.
    """
    return rows if places is None else rows.index_select(1, places)
