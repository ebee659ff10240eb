"""Modulated norms and gated sums of diffusion transformers, written with torch operations.

Shapes: x, y [B, L, C]; shift, scale, gate [B, 1, C] or [B, L, C]. Results are in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without weights of its own (adaLN, Peebles & Xie 2022)."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * y."""
    return x + gate * y


def add_gated_norm_modulate(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """x2 = x + gate * y, and `norm_modulate(x2, scale, shift)`."""
    x = add_gated(x, y, gate)
    return x, norm_modulate(x, scale, shift, eps)
