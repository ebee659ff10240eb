"""Pictures, masks, latents and sound between nodes, for annotations."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

ImageInput = torch.Tensor
MaskInput = torch.Tensor
LatentInput = dict[str, Any]


class AudioInput(TypedDict):
    """`waveform` [B, C, samples], `sample_rate` in Hz."""

    waveform: torch.Tensor
    sample_rate: int
