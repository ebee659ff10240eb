"""USO's style projector for Flux (Wu et al. 2025, arXiv 2508.18966): SigLIP's features of three depths as prompt tokens."""

from __future__ import annotations

from typing import Any

import torch

import comfy.ops

DEPTHS = {"low": -20, "mid": -11, "high": -2}
"""Which hidden states of SigLIP each part takes."""


class SigLIPMultiFeatProjModel(torch.nn.Module):
    """For each depth: a linear over the tokens with SiLU, a norm, and a linear to Flux's width."""

    def __init__(
        self, siglip_token_nums: int = 729, style_token_nums: int = 64, siglip_token_dims: int = 1152,
        hidden_size: int = 3072, device: Any = None, dtype: Any = None, operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"device": device, "dtype": dtype}
        for depth in DEPTHS:
            fewer = operations.Linear(siglip_token_nums, style_token_nums, **place)
            setattr(self, f"{depth}_embedding_linear", torch.nn.Sequential(fewer, torch.nn.SiLU()))
            setattr(self, f"{depth}_layer_norm", operations.LayerNorm(siglip_token_dims, **place))
            setattr(self, f"{depth}_projection", operations.Linear(siglip_token_dims, hidden_size, **place))

    def forward(self, siglip_outputs: torch.Tensor) -> torch.Tensor:
        """Hidden states [3, B, L, C], low to high -> tokens [B, 3 * style tokens, hidden], high to low."""
        parts = []
        for depth, hidden in reversed(list(zip(DEPTHS, siglip_outputs))):
            tokens = getattr(self, f"{depth}_embedding_linear")(hidden.transpose(1, 2)).transpose(1, 2)
            parts.append(getattr(self, f"{depth}_projection")(getattr(self, f"{depth}_layer_norm")(tokens)))
        return torch.cat(parts, dim=1)


def sizes_of(sd: dict[str, torch.Tensor]) -> dict[str, int]:
    """The arguments of `SigLIPMultiFeatProjModel` for weights with its names."""
    styles, tokens = sd["high_embedding_linear.0.weight"].shape
    hidden, width = sd["high_projection.weight"].shape
    return {
        "siglip_token_nums": tokens, "style_token_nums": styles, "siglip_token_dims": width, "hidden_size": hidden,
    }  # fmt: skip
