"""FLUX.1 Redux: image tokens of SigLIP as prompt tokens (Black Forest Labs, 2024)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.ops


class ReduxImageEncoder(torch.nn.Module):
    """Two linears with SiLU between, three times as wide as the prompt's tokens."""

    def __init__(
        self, redux_dim: int = 1152, txt_in_features: int = 4096, device: Any = None, dtype: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.redux_dim = redux_dim
        self.redux_up = operations.Linear(redux_dim, 3 * txt_in_features, **place)
        self.redux_down = operations.Linear(3 * txt_in_features, txt_in_features, **place)

    def forward(self, sigclip_embeds: torch.Tensor) -> torch.Tensor:
        """SigLIP's last hidden states [B, L, redux_dim] -> prompt tokens [B, L, txt_in_features]."""
        return self.redux_down(torch.nn.functional.silu(self.redux_up(sigclip_embeds)))
