"""Rotary positions and attention of Flux (Su et al. 2021, RoFormer; Black Forest Labs' model card)."""

from __future__ import annotations

from typing import Any

import torch

from comfy.ldm.modules import attention as attention_module
from comfy.ldm.stages import stage


def rope(pos: torch.Tensor, dim: int, theta: int) -> torch.Tensor:
    """Rotation matrices of positions: pos [..., L] -> [..., L, dim/2, 2, 2] in fp32 (RoFormer, eq. 15).

    Raises ValueError when `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"rotary axes need an even size, got {dim}")
    exponent = torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64, device=pos.device)
    angle = pos.to(torch.float64).unsqueeze(-1) * (1.0 / theta**exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2).to(torch.float32)


def apply_rope1(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of the last axis: x [B, H, L, D], freqs_cis [B or 1, 1, L, D/2, 2, 2]."""
    # Computed and stored with tokens before heads, as the linears wrote them: attention kernels keep the layout of
    # their queries, so that their output needs no copy before the next linear.
    table = freqs_cis.transpose(1, 2)
    pairs = x.transpose(1, 2).to(freqs_cis.dtype).unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    first = table[..., 0, 0] * even + table[..., 0, 1] * odd
    second = table[..., 1, 0] * even + table[..., 1, 1] * odd
    return torch.stack([first, second], dim=-1).flatten(-2).to(x.dtype).transpose(1, 2)


def apply_rope(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope1` for queries and keys."""
    return apply_rope1(xq, freqs_cis), apply_rope1(xk, freqs_cis)


_rotated = stage(apply_rope)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pe: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    transformer_options: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Rotate whole q and k [B, H, L, D] by `pe` [B or 1, 1, L, D/2, 2, 2] and attend: [B, L, H*D]. For custom nodes."""
    if pe is not None:
        q, k = _rotated(q, k, pe)
    function = attention_module.optimized_attention if mask is None else attention_module.optimized_attention_masked
    return function(q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=transformer_options or {})
