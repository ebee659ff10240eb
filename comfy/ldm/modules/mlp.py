"""The MLP of transformers whose weights have diffusers' names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from comfy.ldm.modules.fused import computes_directly, gelu_linear
from comfy.ldm.modules.linear_cut import entered


class _GELU(nn.Module):
    """A linear and GELU (tanh): [.., C] -> [.., M]."""

    def __init__(self, dim: int, inner: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(dim, inner, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if computes_directly(self.proj, x):
            return gelu_linear(entered(self.proj, x), self.proj.weight, self.proj.bias)
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """[.., C] -> [.., C] through `mult` times as many channels; weights are `net.0.proj` and `net.2`."""

    def __init__(self, dim: int, mult: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        linear = operations.Linear(dim * mult, dim, **place)
        self.net = nn.ModuleList([_GELU(dim, dim * mult, place, operations), nn.Identity(), linear])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](self.net[0](x))


class TimestepEmbedding(nn.Module):
    """Features of a time [.., width] -> [.., C]; weights are `linear_1` and `linear_2`."""

    def __init__(self, width: int, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(width, dim, **place)
        self.linear_2 = operations.Linear(dim, dim, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(x)))
