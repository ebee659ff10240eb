"""CFG++ solvers (Chung et al. 2024, arXiv 2406.08070): guidance moves the prediction, not the noise.

The slope is taken from the *unconditional* prediction, so these solvers always ask for the negative pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, get_ancestral_step, to_d


@torch.no_grad()
def sample_euler_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Ancestral Euler: the guided prediction plus the unconditional noise at the lower sigma, plus fresh noise."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    seen = run.watch_unconditional()
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        alpha, alpha_next = run.alpha_of(sigma), run.alpha_of(sigma_next)
        noise = to_d(x, sigma, seen["uncond"] * alpha)
        # At the pure noise of a flow there is no signal, hence no finite ratio: take the limit of the step.
        ratio = sigma / alpha if alpha else math.inf
        if math.isinf(ratio):
            up = min(sigma_next / alpha_next, eta * sigma_next / alpha_next)
            down = math.sqrt((sigma_next / alpha_next) ** 2 - up**2)
        else:
            down, up = get_ancestral_step(ratio, sigma_next / alpha_next, eta=eta)
        x = denoised * alpha_next + noise * (alpha_next * down)
        if eta > 0 and s_noise > 0:
            x = x + run.noise(sigma, sigma_next) * (alpha_next * s_noise * up)
    return x


@torch.no_grad()
def sample_euler_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """Euler without fresh noise."""
    return sample_euler_ancestral_cfg_pp(model, x, sigmas, extra_args, callback, disable, eta=0.0, s_noise=0.0)


@torch.no_grad()
def sample_dpmpp_2s_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2S), ancestral: x is first moved by the guidance, then solved with the guided predictions."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    seen = run.watch_unconditional()
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        down, up = get_ancestral_step(sigma, sigma_next, eta=eta)
        if down == 0:
            x = denoised
        else:
            middle = math.sqrt(sigma * down)
            halfway = torch.lerp(denoised, x + (denoised - seen["uncond"]), middle / sigma)
            second = run.denoise(halfway, middle)
            # As in ComfyUI, the full step takes the unconditional prediction of its middle.
            x = torch.lerp(second, x + (denoised - seen["uncond"]), down / sigma)
        if sigma_next > 0:
            x = x + run.noise(sigma, sigma_next) * (s_noise * up)
    return x


@torch.no_grad()
def sample_dpmpp_2m_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver++(2M) whose history is the unconditional prediction."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    seen = run.watch_unconditional()
    previous = None
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        uncond = seen["uncond"]
        decay = sigma_next / sigma
        step = denoised + (x - uncond) * decay
        if previous is not None and sigma_next != 0:
            ratio = math.log(run.levels[i - 1] / sigma) / math.log(sigma / sigma_next)
            step = step + (denoised - previous) * ((1 - decay) / (2 * ratio))
        x = step
        previous = uncond
    return x
