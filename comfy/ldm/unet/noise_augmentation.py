"""Noise on picture embeddings (unCLIP, Ramesh et al. 2022): the level of noise says how closely a picture is followed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from comfy.ldm.modules.diffusionmodules.util import Timestep
from comfy.sigma_schedules import make_beta_schedule


class CLIPEmbeddingNoiseAugmentation(nn.Module):
    """Noises embeddings [B, timestep_dim] by a cosine schedule (Nichol & Dhariwal 2021), and encodes the level."""

    signal: torch.Tensor
    noise: torch.Tensor

    def __init__(
        self, noise_schedule_config: dict[str, Any] | None = None, max_noise_level: int = 1000, timestep_dim: int = 256
    ) -> None:
        super().__init__()
        steps = (noise_schedule_config or {}).get("timesteps", 1000)
        kept = torch.cumprod(1.0 - make_beta_schedule("cosine", steps), dim=0)
        self.register_buffer("signal", kept.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1.0 - kept).sqrt().float(), persistent=False)
        self.max_noise_level = max_noise_level
        self.time_embed = Timestep(timestep_dim)

    def forward(
        self, x: torch.Tensor, noise_level: torch.Tensor | None = None, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, D], noise_level [1] or [B] in 0 .. max_noise_level - 1 -> (noised x, features of the level [B, D])."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (x.shape[0],))
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed & 0xFFFF_FFFF_FFFF_FFFF)
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
        signal, amount = (table[noise_level.to(table.device)].to(x)[:, None] for table in (self.signal, self.noise))
        return x * signal + noise * amount, self.time_embed(noise_level.to(x.device))


def unclip_vector(
    conditionings: Sequence[dict[str, Any]],
    device: Any,
    augmentor: CLIPEmbeddingNoiseAugmentation,
    merge_level: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """[1, 2 * D] of pictures: their embeddings with noise, beside features of its level, times their strengths.

    conditionings: of each picture (or several), clip_vision_output, strength, noise_augmentation. Vectors of more than one
    are added and noised again at `merge_level` (0..1).
    """

    def noised(embedding: torch.Tensor, amount: float, with_seed: int | None) -> torch.Tensor:
        level = torch.tensor([round((augmentor.max_noise_level - 1) * amount)], device=device)
        return torch.cat(augmentor(embedding.to(device), noise_level=level, seed=with_seed), dim=1)

    vectors = [
        noised(embedding, given["noise_augmentation"], seed) * given["strength"]
        for given in conditionings
        for embedding in given["clip_vision_output"].image_embeds.split(1)
    ]
    if len(vectors) == 1:
        return vectors[0]
    merged = torch.stack(vectors).sum(dim=0)
    return noised(merged[:, : augmentor.time_embed.dim], merge_level, None)
