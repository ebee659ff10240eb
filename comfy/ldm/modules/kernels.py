"""Attention kernels: softmax(q k^T / sqrt(D) + mask) v on this process, with log-sum-exp when asked for.

With the log-sum-exp of each query, attentions over parts of the keys can be merged exactly (Milakov & Gimelshein 2018;
Liu et al. 2023, ring attention).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import comfy.model_management

if TYPE_CHECKING:
    from .attention_choice import Kernel

LONGEST_CPU_CALL = 1 << 37  # multiplications and additions in one piece: a few seconds of one core
MOST_SCORES = 1 << 28  # scores that are written out at a time on a GPU: 1 GiB in fp32
_CPU_BLOCK = 256  # queries that torch's kernel for the CPU takes together
_fused = True
_chosen: dict[int, Kernel] = {}  # by head size
_why = ""
_HALF = (torch.bfloat16, torch.float16)


def use_fused_attention(enabled: bool) -> None:
    """Whether attention runs on fused kernels; without them scores are written out, for comparing and for old GPUs."""
    global _fused
    _fused = enabled


def lossy_kernel() -> str | None:
    """The kernel in use that computes another attention than exact ones, beyond rounding."""
    return next((kernel.name for kernel in _chosen.values() if kernel.lossy), None)


def use_kernels(chosen: Mapping[int, Kernel], why: str = "") -> None:
    """Use these kernels where they fit, by head size: for each head the next larger one. None: what is known of GPUs."""
    global _why
    _chosen.clear()
    _chosen.update(chosen)
    _why = why


def _kernel_for(size: int) -> Kernel | None:
    return _chosen.get(next((known for known in sorted(_chosen) if size <= known), 0))


def describe_backend(device: torch.device) -> str:
    """Which attention kernel is used on `device`, and why; one line for the log."""
    if not _fused:
        return "attention: written out (optimization.use_flash_attention is false)"
    if device.type == "cuda" and _chosen:
        names = " and ".join(dict.fromkeys(kernel.name for kernel in _chosen.values()))
        return f"attention: {names} where it fits{' (lossy)' if lossy_kernel() else ''}, else torch's choice ({_why})"
    if device.type == "cuda" and _prefers_cudnn(device.index):
        return "attention: cuDNN where it fits (twice as fast on Hopper as torch's flash kernel), else torch's choice"
    return f"attention: torch's fused kernels ({device.type})"


@functools.cache
def _prefers_cudnn(index: int | None) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(index)[0] >= 9
    )


def repeat_heads(q: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values [B, KV, L, D] with each head repeated for the queries [B, H, L, D] that share it.

    Raises ValueError when H is not a multiple of KV.
    """
    heads, shared = q.shape[1], tensors[0].shape[1]
    if heads == shared:
        return tensors
    if shared == 0 or heads % shared:
        raise ValueError(f"{heads} query heads cannot share {shared} key heads; the first must be a multiple")
    return tuple(t.repeat_interleave(heads // shared, dim=1) for t in tensors)


def scaled_dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`run` without log-sum-exp. Tensors that carry how they are spread over processes compute it in their own way."""
    if torch.overrides.has_torch_function((q, k, v)):
        found: torch.Tensor = torch.overrides.handle_torch_function(scaled_dot_product, (q, k, v), q, k, v, mask)
        return found
    return run(q, k, v, mask)[0]


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, need_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q [B, H, Lq, D] to k, v [B, KV, Lk, D], KV a divisor of H (grouped queries).

    mask [B or 1, H or 1, Lq, Lk]: boolean (True = attend) or added to the scores. Returns the output [B, H, Lq, D] and,
    with `need_lse`, the natural logarithm of the sum of exponentials of each query's scores, [B, H, Lq] fp32. A query for
    which every key is masked gets zeros, and -inf as its log-sum-exp.
    cuDNN is asked for by name on Hopper and newer: torch prefers its flash backend, which reaches less than half of
    cuDNN's rate there.
    """
    written_out = need_lse and not (_fused and _fits_half_kernels(q, k, v, mask))
    rows = _rows_at_once(q, k, written_out)
    if rows < q.shape[2]:
        return _in_parts(rows, q, k, v, mask, need_lse)
    return _run(q, k, v, mask, need_lse)


def run_by(
    kernel: Kernel | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`scaled_dot_product` on this kernel where it takes such tensors, else on the kernels in use."""
    if kernel is None or not _fits_half_kernels(q, k, v, mask):
        return scaled_dot_product(q, k, v, mask)
    return kernel.run(q, *repeat_heads(q, k, v))


def _rows_at_once(q: torch.Tensor, k: torch.Tensor, written_out: bool = False) -> int:
    """Queries that are attended at a time: on the CPU as many as take a few seconds, a multiple of torch's block.

    On a GPU all of them, or as many as memory allows where their scores are written out.
    """
    if q.is_cuda:
        return max(1, MOST_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2])) if written_out else q.shape[2]
    operations = 4 * q.shape[0] * q.shape[1] * q.shape[3] * k.shape[2]  # for each query
    return max(_CPU_BLOCK, LONGEST_CPU_CALL // max(operations, 1) // _CPU_BLOCK * _CPU_BLOCK)


def _in_parts(
    rows: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`run`, `rows` queries at a time; between them a cancelled prompt ends."""
    parts = []
    for start in range(0, q.shape[2], rows):
        comfy.model_management.throw_exception_if_processing_interrupted()
        seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., start : start + rows, :]
        parts.append(_run(q[:, :, start : start + rows], k, v, seen, need_lse))
    sums = [lse for _, lse in parts if lse is not None]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat(sums, dim=2) if sums else None


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`run` in one piece."""
    if not _fused:
        return _written_out(q, k, v, mask, need_lse)
    fits = _fits_half_kernels(q, k, v, mask)
    # Derivatives need the sums of exponentials, and kernels that have them.
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    kernel = _kernel_for(q.shape[-1]) if fits else None
    if kernel is not None and not trains and not need_lse:
        return kernel.run(q, *repeat_heads(q, k, v)), None
    if fits and (kernel is None or kernel.name != "sdpa") and _prefers_cudnn(q.device.index):
        k, v = repeat_heads(q, k, v)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, trains or need_lse)
        return found[0], found[1].reshape(q.shape[:-1]) if need_lse else None
    if need_lse:
        return _with_lse(q, k, v, mask, fits)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped), None


def _fits_half_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the GPU kernels that give a log-sum-exp can do it, cuDNN's and torch's flash: half precision, no mask."""
    fits = mask is None and q.is_cuda and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and q.dtype in _HALF
    return fits and all(t.stride(-1) == 1 for t in (q, k, v))


def _with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, flash: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = repeat_heads(q, k, v)
    if flash:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    elif mask is None and not q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = _written_out(q, k, v, mask, True)
        assert lse is not None
        return out, lse
    return found[0], found[1][..., : q.shape[2]].float()


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, need_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    k, v = repeat_heads(q, k, v)
    if not need_lse:
        scores = masked(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), mask)
        return scores.softmax(-1).to(v.dtype) @ v, None
    scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # merging needs more than half precision
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - finite.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention to some keys, and one to others of the same queries, as one to both: (output, log-sum-exp).

    out [B, H, Lq, D] and lse [B, H, Lq] in fp32, as is the result; part in any precision. Each output is weighted with its
    share of the sum of exponentials, which the difference of the logarithms gives without overflow.
    """
    share = torch.sigmoid(part_lse - lse).masked_fill(part_lse == float("-inf"), 0.0)
    return torch.lerp(out, part.float(), share.unsqueeze(-1)), torch.logaddexp(lse, part_lse)


def masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, H, Lq, Lk] under a mask that is boolean (True = attend) or added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.finfo(scores.dtype).max) if mask.dtype == torch.bool else scores + mask
