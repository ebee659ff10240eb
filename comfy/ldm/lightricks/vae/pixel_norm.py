"""The norm of LTX-Video's VAE."""

from __future__ import annotations

import torch
from torch import nn


class PixelNorm(nn.Module):
    """Each place of [B, C, ...] divided by the root mean square of its channels; there are no weights."""

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=self.dim, keepdim=True) + self.eps)
