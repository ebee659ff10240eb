"""Sampling by ComfyUI's names: samplers, schedulers, guidance and the classes that nodes use.

The parts live in `sigma_schedules`, `cond_processing`, `cond_batching`, `guider` and `sampler_objects`. They call each
other through this module, so a function that a custom node replaces here is the one that is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

import comfy.extra_samplers.uni_pc as uni_pc
import comfy.k_diffusion.sampling as k_diffusion_sampling
from comfy.cond_batching import (
    CondObj,
    add_area_dims,
    calc_cond_batch,
    can_concat_cond,
    cond_cat,
    cond_equal_size,
    get_area_and_mult,
)
from comfy.cond_processing import (
    apply_empty_x_to_equal_area,
    calculate_start_end_timesteps,
    create_cond_with_same_area_if_none,
    encode_model_conds,
    get_mask_aabb,
    pre_run_control,
    process_conds,
    resolve_areas_and_cond_masks,
    resolve_areas_and_cond_masks_multidim,
)
from comfy.guider import CFGGuider, cfg_function, sample, sampling_function
from comfy.sampler_objects import KSAMPLER, KSamplerX0Inpaint, Sampler, ksampler, sampler_object
from comfy.sigma_schedules import (
    SchedulerHandler,
    beta_scheduler,
    ddim_scheduler,
    kl_optimal_scheduler,
    linear_quadratic_schedule,
    normal_scheduler,
    scheduler_table,
    simple_scheduler,
)

__all__ = [
    "CFGGuider", "CondObj", "KSAMPLER", "KSAMPLER_NAMES", "KSampler", "KSamplerX0Inpaint", "SAMPLER_NAMES",
    "SCHEDULER_HANDLERS", "SCHEDULER_NAMES", "Sampler", "SchedulerHandler", "add_area_dims",
    "apply_empty_x_to_equal_area", "beta_scheduler", "calc_cond_batch", "calc_cond_uncond_batch", "calculate_sigmas",
    "calculate_start_end_timesteps", "can_concat_cond", "cfg_function", "cond_cat", "cond_equal_size",
    "create_cond_with_same_area_if_none", "ddim_scheduler", "encode_model_conds", "get_area_and_mult",
    "get_mask_aabb", "k_diffusion_sampling", "kl_optimal_scheduler", "ksampler", "linear_quadratic_schedule",
    "normal_scheduler", "pre_run_control", "process_conds", "resolve_areas_and_cond_masks",
    "resolve_areas_and_cond_masks_multidim", "sample", "sampler_object", "sampling_function", "simple_scheduler",
    "uni_pc",
]  # fmt: skip

# Names of `comfy.k_diffusion.sampling.sample_<name>`.
KSAMPLER_NAMES = [
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2",
    "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm",
    "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "sa_solver_pece",
]  # fmt: skip
SAMPLER_NAMES = [*KSAMPLER_NAMES, "ddim", "uni_pc", "uni_pc_bh2"]
SCHEDULER_HANDLERS: dict[str, SchedulerHandler] = scheduler_table()
SCHEDULER_NAMES = list(SCHEDULER_HANDLERS)


def calculate_sigmas(model_sampling: Any, scheduler_name: str, steps: int) -> torch.Tensor:
    """The scheduler's sigmas, float32 on the CPU: decreasing, the last one 0, usually `steps + 1` of them."""
    handler = SCHEDULER_HANDLERS.get(scheduler_name)
    if handler is None:
        message = f"unknown scheduler {scheduler_name!r}; choose one of {', '.join(SCHEDULER_NAMES)}"
        logging.error(message)
        raise ValueError(message)
    if handler.use_ms:
        return handler.handler(model_sampling, steps)
    sigma_min, sigma_max = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    return handler.handler(n=steps, sigma_min=sigma_min, sigma_max=sigma_max)


def calc_cond_uncond_batch(
    model: Any, cond: Any, uncond: Any, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """`calc_cond_batch` for two conditionings; the older name."""
    return tuple(calc_cond_batch(model, [cond, uncond], x_in, timestep, model_options))


class KSampler:
    """A model with a sampler, a scheduler and a number of steps: what the sampler nodes run."""

    SCHEDULERS = SCHEDULER_NAMES
    SAMPLERS = SAMPLER_NAMES
    # These compute one level more than asked for and drop the last but one.
    DISCARD_PENULTIMATE_SIGMA_SAMPLERS = {"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"}

    def __init__(
        self,
        model: Any,
        steps: int,
        device: Any,
        sampler: str | None = None,
        scheduler: str | None = None,
        denoise: float | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        """Unknown sampler or scheduler names become the first of their list, as in ComfyUI."""
        self.model = model
        self.device = device
        self.scheduler = scheduler if scheduler in self.SCHEDULERS else self.SCHEDULERS[0]
        self.sampler = sampler if sampler in self.SAMPLERS else self.SAMPLERS[0]
        self.set_steps(steps, denoise)
        self.denoise = denoise
        self.model_options = {} if model_options is None else model_options

    def calculate_sigmas(self, steps: int) -> torch.Tensor:
        """The schedule for this sampler."""
        discards = self.sampler in self.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
        model_sampling = self.model.get_model_object("model_sampling")
        sigmas = calculate_sigmas(model_sampling, self.scheduler, steps + 1 if discards else steps)
        return torch.cat([sigmas[:-2], sigmas[-1:]]) if discards else sigmas

    def set_steps(self, steps: int, denoise: float | None = None) -> None:
        """Choose `self.sigmas`: with `denoise` d, the last `steps` of int(steps / d)."""
        self.steps = steps
        if denoise is None or denoise > 0.9999:
            self.sigmas = self.calculate_sigmas(steps).to(self.device)
        elif denoise <= 0.0:
            self.sigmas = torch.FloatTensor([])
        else:
            self.sigmas = self.calculate_sigmas(int(steps / denoise)).to(self.device)[-(steps + 1) :]

    def sample(
        self, noise: torch.Tensor, positive: Any, negative: Any, cfg: float, latent_image: torch.Tensor | None = None,
        start_step: int | None = None, last_step: int | None = None, force_full_denoise: bool = False,
        denoise_mask: torch.Tensor | None = None, sigmas: torch.Tensor | None = None,
        callback: Callable[..., None] | None = None, disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Sample from `start_step` to `last_step`; `force_full_denoise` goes to sigma 0 even when stopping early."""
        if sigmas is None:
            sigmas = self.sigmas
        if last_step is not None and last_step < len(sigmas) - 1:
            sigmas = sigmas[: last_step + 1]
            if force_full_denoise:
                sigmas = sigmas.clone()
                sigmas[-1] = 0
        if start_step is not None:
            if start_step >= len(sigmas) - 1:
                return torch.zeros_like(noise) if latent_image is None else latent_image
            sigmas = sigmas[start_step:]
        return sample(
            self.model, noise, positive, negative, cfg, self.device, sampler_object(self.sampler), sigmas,
            self.model_options, latent_image=latent_image, denoise_mask=denoise_mask, callback=callback,
            disable_pbar=disable_pbar, seed=seed,
        )  # fmt: skip
