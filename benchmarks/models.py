"""Sizes of the models that benchmarks build with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A network and one denoising step of it."""

    network: dict[str, Any]
    height: int
    width: int
    text_tokens: int

    @property
    def image_tokens(self) -> int:
        """Patches of the picture: VAE factor 8, patch size 2."""
        return (self.height // 16) * (self.width // 16)

    @property
    def tokens(self) -> int:
        """Tokens of joint attention."""
        return self.image_tokens + self.text_tokens

    def tera_flop(self) -> float:
        """Work of one step: matrix products of linears and attention (facts: 24 h^2 N and 4 N^2 h per block).

        A double block has two streams with weights of their own but each token passes one of them; a single block's
        linears have the same cost per token.
        """
        hidden = self.network["hidden_size"]
        blocks = self.network["depth"] + self.network["depth_single_blocks"]
        linears = 24 * hidden**2 * self.tokens * blocks
        return (linears + 4 * self.tokens**2 * hidden * blocks) / 1e12


_FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip

_SMALL = {
    **_FLUX, "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 256, "num_heads": 8, "depth": 2,
    "depth_single_blocks": 4, "axes_dim": [4, 14, 14],
}  # fmt: skip

# 32 billion parameters, 64 GB in bf16: more than one 80 GB card holds beside its activations and text encoders.
_LARGE = {**_FLUX, "hidden_size": 5120, "num_heads": 40, "depth": 18}

CASES = {
    "flux-dev": Case(_FLUX, 1024, 1024, 512),
    "flux-32b": Case(_LARGE, 1024, 1024, 512),
    "flux-small": Case(_SMALL, 256, 256, 77),
}
