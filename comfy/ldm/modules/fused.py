"""Pieces of networks in fewer passes over memory than their modules would take one by one."""

from __future__ import annotations

import torch
from torch import nn


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is a linear that computes with its weight as it is stored."""
    return isinstance(linear, nn.Linear) and linear.bias is not None and not getattr(linear, "casts", False)


def mlp_gelu(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`mlp(x)` for [.., C] -> [.., C], where mlp is linear, GELU (tanh), linear.

    On CUDA in half precision the activation is computed inside the first product, on its fp32 sums, which saves writing
    and reading the widest tensor of the block once. Anything else in the place of the three layers is called as it is.
    """
    layers = list(mlp.children()) if type(mlp) is nn.Sequential else []
    ours = len(layers) == 3 and _is_plain(layers[0]) and type(layers[1]) is nn.GELU and layers[1].approximate == "tanh"
    if not ours or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or layers[0].weight.dtype != x.dtype:
        return mlp(x)
    first = layers[0]
    rows = x.reshape(-1, x.shape[-1])
    hidden = torch.ops.aten._addmm_activation(first.bias, rows, first.weight.t(), use_gelu=True)
    return layers[2](hidden.view(*x.shape[:-1], -1))
