"""Embeddings and patches that diffusion transformers share: times, sizes, places, patches of a latent.

Shapes: B pictures, L tokens, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.modules.fused import computes_directly, gelu_linear
from comfy.ldm.modules.linear_cut import entered

__all__ = [
    "Mlp", "PatchEmbed", "TimestepEmbedder", "heads_of", "timestep_embedding", "to_patches", "to_picture", "waves_1d",
    "waves_2d",
]  # fmt: skip


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a number, then two linears with SiLU between: [B] -> [B, hidden_size]."""

    def __init__(
        self, hidden_size: int, frequency_embedding_size: int = 256, output_size: int | None = None, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            operations.Linear(frequency_embedding_size, hidden_size, **place),
            nn.SiLU(),
            operations.Linear(hidden_size, output_size or hidden_size, **place),
        )

    def forward(self, t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """t [B], taken as it is (no factor of 1000), features in fp32; the result is in `dtype`."""
        features = timestep_embedding(t.float(), self.frequency_embedding_size, time_factor=1.0)
        return self.mlp(features.to(dtype or t.dtype))


class PatchEmbed(nn.Module):
    """Patches of a latent as tokens: [B, in, H, W] -> [B, L, C], row by row; the weight is a convolution's."""

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = operations.Conv2d(
            in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU (tanh form unless told otherwise), linear: [.., C] -> [.., C]."""

    def __init__(
        self, dim: int, hidden: int, approximate: str = "tanh", dtype: Any = None, device: Any = None,
        operations: Any = None, in_features: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fc1 = operations.Linear(in_features or dim, hidden, dtype=dtype, device=device)
        self.fc2 = operations.Linear(hidden, dim, dtype=dtype, device=device)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh" and computes_directly(self.fc1, x):
            return self.fc2(gelu_linear(entered(self.fc1, x), self.fc1.weight, self.fc1.bias))
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def heads_of(x: torch.Tensor, parts: int, size: int) -> tuple[torch.Tensor, ...]:
    """[B, L, parts * H * D] -> `parts` views [B, H, L, D] of as many heads of D = `size` as there are here."""
    return x.unflatten(-1, (parts, x.shape[-1] // (parts * size), size)).permute(2, 0, 3, 1, 4).unbind(0)


def to_patches(x: torch.Tensor, patch: int, channels_first: bool = True) -> torch.Tensor:
    """Latent [B, C, H, W] -> patches [B, L, C*p*p], row by row; within a patch channels come first or last."""
    grid = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B, C, rows, p, cols, p
    order = (0, 2, 4, 1, 3, 5) if channels_first else (0, 2, 4, 3, 5, 1)
    return grid.permute(order).flatten(3).flatten(1, 2)


def to_picture(tokens: torch.Tensor, rows: int, patch: int, channels_first: bool = False) -> torch.Tensor:
    """Patches [B, L, p*p*C] of `rows` rows -> [B, C, rows * p, cols * p]; the inverse of `to_patches`."""
    grid = tokens.unflatten(1, (rows, -1))
    if channels_first:
        return grid.unflatten(3, (-1, patch, patch)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return grid.unflatten(3, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def waves_1d(places: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal table of places [n] -> [n, dim], sines first (Vaswani et al. 2017; computed in fp64, given in fp32)."""
    steps = torch.arange(dim // 2, dtype=torch.float64, device=places.device) / (dim / 2)
    phases = places.double().flatten()[:, None] * 10000.0**-steps
    return torch.cat((phases.sin(), phases.cos()), dim=1).float()


def waves_2d(rows: torch.Tensor, cols: torch.Tensor, dim: int) -> torch.Tensor:
    """Table of a grid with the places `rows` [h] and `cols` [w] -> [h * w, dim]; the column's half comes first."""
    across = waves_1d(cols, dim // 2).unsqueeze(0).expand(len(rows), -1, -1)
    down = waves_1d(rows, dim // 2).unsqueeze(1).expand(-1, len(cols), -1)
    return torch.cat((across, down), dim=2).flatten(0, 1)
