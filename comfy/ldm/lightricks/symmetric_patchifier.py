"""Where the cells of LTX-Video's latents are in the video."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def latent_to_pixel_coords(
    latent_coords: torch.Tensor, scale_factors: Sequence[int], causal_fix: bool = False
) -> torch.Tensor:
    """Frames, rows and columns of cells [B, 3, L] -> of the video, where each cell begins.

    scale_factors: frames, rows and columns of the video to a cell. causal_fix: the first cell is one frame.
    """
    frames, *others = (latent_coords[:, axis] * factor for axis, factor in enumerate(scale_factors))
    if causal_fix:
        frames = (frames + 1 - scale_factors[0]).clamp(min=0)
    return torch.stack((frames, *others), dim=1)
