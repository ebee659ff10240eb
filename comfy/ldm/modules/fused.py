"""Pieces of networks in fewer passes over memory than their modules would take one by one.

Each function computes what the modules it is given say, and calls them as they are whenever they are not exactly what
it knows: layers with weights of another dtype, with patches applied at use, or replaced by somebody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from .eight_bit import BeforeGelu, Rows, product, quantise, reads_rows
from .linear_cut import cut_of, entered, left, outputs_here

_HALF = (torch.bfloat16, torch.float16)


def computes_directly(linear: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Whether a layer is a linear on CUDA in half precision that multiplies by its weight as it is stored.

    Where the linear is cut, x is what it is called with, not what its part multiplies.
    """
    cut = cut_of(linear)
    return (
        isinstance(linear, nn.Linear)
        and (cut is None or (not cut.whole and linear.weight.numel() > 0))
        and linear.bias is not None
        and not getattr(linear, "casts", False)
        and x.is_cuda
        and x.dtype in _HALF
        and linear.weight.dtype == x.dtype
    )


def is_tanh_gelu(activation: nn.Module) -> bool:
    """Whether an activation is torch's GELU in its tanh form."""
    return type(activation) is nn.GELU and activation.approximate == "tanh"


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias), tanh form, for [.., in] -> [.., out], on CUDA in half precision.

    The activation is computed inside the product, on its fp32 sums, which saves writing and reading the widest tensor
    of a block once more.
    """
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)


def first_linear(mlp: nn.Module) -> nn.Module:
    """The layer that gets an MLP's input, or the MLP where it is not a sequence of layers."""
    layers = (
        list(mlp.children())
        if type(mlp) is nn.Sequential and not (mlp._forward_hooks or mlp._forward_pre_hooks)
        else []
    )
    return layers[0] if layers and "forward" not in vars(mlp) else mlp


def mlp_gelu(mlp: nn.Module, x: torch.Tensor | Rows) -> torch.Tensor:
    """`mlp(x)` for [.., C] -> [.., C], where mlp is linear, GELU (tanh), linear."""
    layers = list(mlp.children()) if type(mlp) is nn.Sequential else []
    if len(layers) == 3 and is_tanh_gelu(layers[1]) and reads_rows(layers[2]):
        return layers[2](quantise(layers[0](x), layers[2].eight_bit.form, gelu=True))
    if isinstance(x, Rows):
        return layers[2](layers[1](layers[0](x)))
    if len(layers) != 3 or not is_tanh_gelu(layers[1]) or not computes_directly(layers[0], x):
        return mlp(x)
    return layers[2](gelu_linear(entered(layers[0], x), layers[0].weight, layers[0].bias))


def split_linear(
    linear: nn.Module, activation: nn.Module, x: torch.Tensor | Rows, first: int
) -> tuple[torch.Tensor, torch.Tensor | Rows]:
    """The first `first` outputs of `linear(x)` for x [.., in], and what `split_linear_rest` finishes the others from.

    That is what the linear multiplies where the rest of the product can be computed on its own, else the rest before its
    activation. Of a cut linear it is the outputs that are here.
    """
    first = outputs_here(linear, first)
    if is_tanh_gelu(activation) and reads_rows(linear) and first % linear.eight_bit.form.multiple == 0:
        rows = x if isinstance(x, Rows) else quantise(x, linear.eight_bit.form)
        return _some_outputs(linear, rows, slice(None, first)), rows
    if isinstance(x, torch.Tensor) and is_tanh_gelu(activation) and computes_directly(linear, x):
        x = entered(linear, x)
        return F.linear(x, linear.weight[:first], linear.bias[:first]), x
    out = linear(x)
    return out[..., :first], out[..., first:]


def _some_outputs(linear: nn.Linear, rows: Rows, which: slice) -> torch.Tensor:
    """Some outputs of a linear that multiplies in eight bits."""
    bias = None if linear.bias is None else linear.bias[which]
    return product(rows, linear.weight[which], linear.eight_bit.scale[which], bias)  # type: ignore[union-attr, index]


def split_linear_rest(
    linear: nn.Module, activation: nn.Module, rest: torch.Tensor | Rows, first: int
) -> torch.Tensor | BeforeGelu:
    """The outputs of `linear(x)` from `first` on, through `activation`: [.., out - first].

    In eight bits the activation is left to `linear_of_pair`.
    """
    if isinstance(rest, Rows):
        return BeforeGelu(_some_outputs(linear, rest, slice(first, None)))  # type: ignore[arg-type]
    if is_tanh_gelu(activation) and computes_directly(linear, rest):
        first = outputs_here(linear, first)
        return gelu_linear(rest, linear.weight[first:], linear.bias[first:])
    return activation(rest)


@dataclass(frozen=True)
class SecondPart:
    """What the last inputs of a linear add to its outputs, [.., out]."""

    outputs: torch.Tensor


def linear_of_second(
    linear: nn.Module, first: torch.Tensor, second: torch.Tensor | BeforeGelu
) -> torch.Tensor | BeforeGelu | SecondPart:
    """What `linear_of_pair` can compute of `second` before `first` is known, else `second`.

    first: any tensor of its dtype and device.
    """
    if isinstance(second, BeforeGelu) or reads_rows(linear) or not computes_directly(linear, first):
        return second
    return SecondPart(F.linear(second, linear.weight[:, linear.weight.shape[1] - second.shape[-1] :]))


def linear_of_pair(
    linear: nn.Module, first: torch.Tensor, second: torch.Tensor | BeforeGelu | SecondPart
) -> torch.Tensor:
    """`linear(cat(first, second))` over the last axis, without writing the concatenation."""
    if isinstance(second, SecondPart):
        assert isinstance(linear, nn.Linear)
        bias = linear.bias if cut_of(linear) is None else None  # it is added to the sum over ranks
        out = F.linear(first, linear.weight[:, : first.shape[-1]], bias) + second.outputs
        return left(linear, out)
    gelu = isinstance(second, BeforeGelu)
    second = second.tokens if isinstance(second, BeforeGelu) else second
    if reads_rows(linear):
        return linear(quantise(first, linear.eight_bit.form, second, gelu))
    if gelu:
        second = F.gelu(second, approximate="tanh")
    early = linear_of_second(linear, first, second)
    if isinstance(early, SecondPart):
        return linear_of_pair(linear, first, early)
    return linear(torch.cat((first, second), dim=-1))
