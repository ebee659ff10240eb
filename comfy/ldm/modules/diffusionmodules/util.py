"""Small helpers of latent diffusion that packs import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from comfy.ldm.flux.layers import timestep_embedding as _features
from comfy.missing import missing_class

AlphaBlender = missing_class("AlphaBlender", "the time axis of Stable Video Diffusion's UNet")


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False
) -> torch.Tensor:
    """Sinusoidal features of timesteps [B] -> [B, dim] float32, cosines first; the bare timesteps with `repeat_only`."""
    if repeat_only:
        return timesteps[:, None].expand(-1, dim)
    return _features(timesteps.float(), dim, max_period, time_factor=1.0)


class Timestep(nn.Module):
    """`timestep_embedding` of a fixed width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, dim]."""
        return timestep_embedding(t, self.dim)


def checkpoint(func: Callable[..., Any], inputs: Any, params: Any, flag: bool) -> Any:
    """`func(*inputs)`; activations are computed again in the backward pass where `flag` is set."""
    if not flag:
        return func(*inputs)
    return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all weights set to 0."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Mean pooling over 1, 2 or 3 axes."""
    kinds: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    if dims not in kinds:
        raise ValueError(f"pictures have 1 to 3 axes, not {dims}")
    return kinds[dims](*args, **kwargs)
