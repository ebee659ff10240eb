"""Layers of Chroma: Flux's blocks without modulations of their own, which one small network makes for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from comfy.ldm import dit
from comfy.ldm.flux import layers
from comfy.ldm.flux.layers import MLPEmbedder, ModulationOut, RMSNorm

__all__ = ["Approximator", "DoubleStreamBlock", "LastLayer", "SingleStreamBlock", "modulation_from"]


def modulation_from(rows: torch.Tensor, first: int) -> ModulationOut:
    """Three of the network's rows [B, n, C] as shift, scale and gate, [B, 1, C] each."""
    return ModulationOut(*(rows[:, first + place : first + place + 1] for place in range(3)))


class Approximator(nn.Module):
    """The small network: [B, n, in_dim] -> [B, n, out_dim], each row by itself."""

    def __init__(
        self, in_dim: int, out_dim: int, hidden_dim: int, n_layers: int = 5, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.in_proj = operations.Linear(in_dim, hidden_dim, **place)
        self.layers = nn.ModuleList(
            MLPEmbedder(hidden_dim, hidden_dim, operations=operations, **place) for _ in range(n_layers)
        )
        self.norms = nn.ModuleList(RMSNorm(hidden_dim, operations=operations, **place) for _ in range(n_layers))
        self.out_proj = operations.Linear(hidden_dim, out_dim, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x)


class DoubleStreamBlock(layers.DoubleStreamBlock):
    """Flux's, with the modulations of this block in the state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "modulation": False})

    def modulations(self, state: dit.DiTState, call: dit.DenoiserCall) -> dict[str, Any]:
        """((attention's, MLP's) of the picture, the same of the text), from the small network."""
        return dict(zip(("img", "txt"), _mine(state, call)))


class SingleStreamBlock(layers.SingleStreamBlock):
    """Flux's, with the modulation of this block in the state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "modulation": False})

    def modulations(self, state: dit.DiTState, call: dit.DenoiserCall) -> Any:
        """The block's one, from the small network."""
        return _mine(state, call)


def _mine(state: dit.DiTState, call: dit.DenoiserCall) -> Any:
    """What is in the state for the running block; where foreign code called it, what that gave as `vec`."""
    return state.sample["vec"] if call.layer is None or "vec" in state.sample else state.sample[call.layer]


class LastLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch_size^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_final = operations.LayerNorm(
            hidden_size, elementwise_affine=False, eps=1e-6, dtype=dtype, device=device
        )
        self.linear = operations.Linear(hidden_size, out_channels, bias=True, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, vec: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [B, L, C], vec (shift, scale) [B, 1, C] each."""
        shift, scale = vec
        return self.linear(layers.apply_mod(self.norm_final(x), 1 + scale, shift))
