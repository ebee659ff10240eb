"""Sampling for nodes: initial noise, empty latents of the right shape, one call that does it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import comfy.model_management
import comfy.samplers
import comfy.utils


def prepare_noise(latent_image: torch.Tensor, seed: int, noise_inds: Any = None) -> torch.Tensor:
    """Unit noise shaped like the latent [B, C, ...], from the global CPU generator seeded with `seed`.

    `noise_inds` [B] gives each sample the noise it would have at that place of a larger batch.
    """
    generator = torch.manual_seed(seed)

    def draw(size: Any) -> torch.Tensor:
        return torch.randn(
            size, dtype=latent_image.dtype, layout=latent_image.layout, generator=generator, device="cpu"
        )

    if noise_inds is None:
        return draw(latent_image.size())
    places, where = np.unique(np.asarray(noise_inds), return_inverse=True)
    drawn = [draw([1, *latent_image.size()[1:]]) for _ in range(int(places[-1]) + 1)]
    return torch.cat([drawn[places[i]] for i in where.reshape(-1)])


def fix_empty_latent_channels(model: Any, latent_image: torch.Tensor) -> torch.Tensor:
    """An all-zero latent brought to the model's number of channels and, for video models, to five axes."""
    latent_format = model.get_model_object("latent_format")
    channels = latent_format.latent_channels
    if latent_image.shape[1] != channels and torch.count_nonzero(latent_image) == 0:
        latent_image = comfy.utils.repeat_to_batch_size(latent_image, channels, dim=1)
    if getattr(latent_format, "latent_dimensions", 2) == 3 and latent_image.ndim == 4:
        latent_image = latent_image.unsqueeze(2)
    return latent_image


def prepare_sampling(
    model: Any, noise_shape: Any, positive: Any, negative: Any, noise_mask: torch.Tensor | None
) -> tuple[Any, Any, Any, Any, list[Any]]:
    """The older way to load a model for sampling; kept for custom nodes, does nothing."""
    return model, positive, negative, noise_mask, []


def cleanup_additional_models(models: Any) -> None:
    """The older counterpart of `prepare_sampling`; does nothing."""


def sample(
    model: Any, noise: torch.Tensor, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any,
    negative: Any, latent_image: torch.Tensor, denoise: float = 1.0, disable_noise: bool = False,
    start_step: int | None = None, last_step: int | None = None, force_full_denoise: bool = False,
    noise_mask: torch.Tensor | None = None, sigmas: torch.Tensor | None = None,
    callback: Callable[..., None] | None = None, disable_pbar: bool = False, seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sample with a named sampler and scheduler; the result [B, C, ...] is on the intermediate device."""
    sampler = comfy.samplers.KSampler(
        model, steps=steps, device=model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise,
        model_options=model.model_options,
    )  # fmt: skip
    samples = sampler.sample(
        noise, positive, negative, cfg=cfg, latent_image=latent_image, start_step=start_step, last_step=last_step,
        force_full_denoise=force_full_denoise, denoise_mask=noise_mask, sigmas=sigmas, callback=callback,
        disable_pbar=disable_pbar, seed=seed,
    )  # fmt: skip
    return samples.to(comfy.model_management.intermediate_device())


def sample_custom(
    model: Any, noise: torch.Tensor, cfg: float, sampler: Any, sigmas: torch.Tensor, positive: Any, negative: Any,
    latent_image: torch.Tensor, noise_mask: torch.Tensor | None = None, callback: Callable[..., None] | None = None,
    disable_pbar: bool = False, seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sample with a sampler object and given sigmas."""
    samples = comfy.samplers.sample(
        model, noise, positive, negative, cfg, model.load_device, sampler, sigmas, model_options=model.model_options,
        latent_image=latent_image, denoise_mask=noise_mask, callback=callback, disable_pbar=disable_pbar, seed=seed,
    )  # fmt: skip
    return samples.to(comfy.model_management.intermediate_device())
