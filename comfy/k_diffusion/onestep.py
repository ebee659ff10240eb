"""Solvers that forget the previous step: Euler, Heun and midpoint methods, ancestral variants, DDPM and LCM.

The probability flow dx/dsigma = (x - denoised) / sigma is Karras et al. 2022 (arXiv 2206.00364).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, flow_ancestral_step, get_ancestral_step, to_d


@torch.no_grad()
def sample_euler(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """First order, with optional churn."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in run.steps():
        x, sigma_hat = run.churn(x, sigma, s_churn, s_tmin, s_tmax, s_noise)
        denoised = run.denoise(x, sigma_hat)
        run.report(i, x, denoised, sigma_hat)
        x = x + to_d(x, sigma_hat, denoised) * (sigma_next - sigma_hat)
    return x


@torch.no_grad()
def sample_euler_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Euler to a lower sigma, then fresh noise up to the next one."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    if run.is_flow:
        return sample_euler_ancestral_RF(
            model, x, sigmas, extra_args, callback, disable, eta=eta, s_noise=s_noise, noise_sampler=noise_sampler
        )
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        down, up = get_ancestral_step(sigma, sigma_next, eta=eta)
        if down == 0:
            x = denoised
            continue
        x = x + to_d(x, sigma, denoised) * (down - sigma) + run.noise(sigma, sigma_next) * (s_noise * up)
    return x


@torch.no_grad()
def sample_euler_ancestral_RF(  # noqa: N802 (ComfyUI's name)
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """`sample_euler_ancestral` for rectified flows, which rescale the signal when noise is added."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        down, scale, noise = flow_ancestral_step(sigma, sigma_next, eta)
        x = torch.lerp(denoised, x, down / sigma)
        if eta > 0:
            x = x * scale + run.noise(sigma, sigma_next) * (s_noise * noise)
    return x


@torch.no_grad()
def sample_heun(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Second order: the mean of the slopes at both ends of the step (Karras et al. 2022, algorithm 2)."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in run.steps():
        x, sigma_hat = run.churn(x, sigma, s_churn, s_tmin, s_tmax, s_noise)
        denoised = run.denoise(x, sigma_hat)
        run.report(i, x, denoised, sigma_hat)
        slope = to_d(x, sigma_hat, denoised)
        step = sigma_next - sigma_hat
        if sigma_next != 0:
            ahead = x + slope * step
            slope = (slope + to_d(ahead, sigma_next, run.denoise(ahead, sigma_next))) / 2
        x = x + slope * step
    return x


@torch.no_grad()
def sample_heunpp2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Heun++ (arXiv 2310.18506): slopes of up to three levels ahead, weighted by their sigma.

    Third order while two more levels follow, second order before the last, Euler at the end.
    """
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    first, last = run.levels[0], run.levels[-1]
    for i, sigma, sigma_next in run.steps():
        x, sigma_hat = run.churn(x, sigma, s_churn, s_tmin, s_tmax, s_noise)
        denoised = run.denoise(x, sigma_hat)
        run.report(i, x, denoised, sigma_hat)
        slopes = [to_d(x, sigma_hat, denoised)]
        position, at = x, sigma_hat
        wanted = 0 if sigma_next == last else (1 if run.levels[i + 2] == last else 2)
        weights = []
        for level in run.levels[i + 1 : i + 1 + wanted]:
            position, at = position + slopes[-1] * (level - at), level
            slopes.append(to_d(position, level, run.denoise(position, level)))
            weights.append(level / ((wanted + 1) * first))
        combined = slopes[0] * (1.0 - sum(weights))
        for weight, slope in zip(weights, slopes[1:]):
            combined = combined + slope * weight
        x = x + combined * (sigma_next - sigma_hat)
    return x


def _geometric_mean(a: float, b: float) -> float:
    return math.exp((math.log(a) + math.log(b)) / 2)


@torch.no_grad()
def sample_dpm_2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = float("inf"), s_noise: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Second order: the slope at the geometric middle of the step."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    for i, sigma, sigma_next in run.steps():
        x, sigma_hat = run.churn(x, sigma, s_churn, s_tmin, s_tmax, s_noise)
        denoised = run.denoise(x, sigma_hat)
        run.report(i, x, denoised, sigma_hat)
        slope = to_d(x, sigma_hat, denoised)
        if sigma_next != 0:
            middle = _geometric_mean(sigma_hat, sigma_next)
            halfway = x + slope * (middle - sigma_hat)
            slope = to_d(halfway, middle, run.denoise(halfway, middle))
        x = x + slope * (sigma_next - sigma_hat)
    return x


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """`sample_dpm_2` to a lower sigma, then fresh noise up to the next one."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    if run.is_flow:
        return sample_dpm_2_ancestral_RF(
            model, x, sigmas, extra_args, callback, disable, eta=eta, s_noise=s_noise, noise_sampler=noise_sampler
        )
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        down, up = get_ancestral_step(sigma, sigma_next, eta=eta)
        x = _midpoint_step(run, x, denoised, sigma, down)
        if down != 0:
            x = x + run.noise(sigma, sigma_next) * (s_noise * up)
    return x


@torch.no_grad()
def sample_dpm_2_ancestral_RF(  # noqa: N802 (ComfyUI's name)
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """`sample_dpm_2_ancestral` for rectified flows."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        down, scale, noise = flow_ancestral_step(sigma, sigma_next, eta)
        x = _midpoint_step(run, x, denoised, sigma, down)
        if down != 0:
            x = x * scale + run.noise(sigma, sigma_next) * (s_noise * noise)
    return x


def _midpoint_step(
    run: SamplingRun, x: torch.Tensor, denoised: torch.Tensor, sigma: float, target: float
) -> torch.Tensor:
    """From `sigma` to `target` by the slope at their geometric middle; Euler when the target is 0."""
    slope = to_d(x, sigma, denoised)
    if target != 0:
        middle = _geometric_mean(sigma, target)
        halfway = x + slope * (middle - sigma)
        slope = to_d(halfway, middle, run.denoise(halfway, middle))
    return x + slope * (target - sigma)


@torch.no_grad()
def sample_ddpm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Ancestral sampling of Ho et al. 2020 (arXiv 2006.11239, algorithm 2), between any two noise levels."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        kept, kept_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        alpha = kept / kept_next
        unit = x * math.sqrt(kept)
        x = (unit - to_d(x, sigma, denoised) * ((1 - alpha) / math.sqrt(1 - kept))) / math.sqrt(alpha)
        if sigma_next > 0:
            deviation = math.sqrt((1 - alpha) * (1 - kept_next) / (1 - kept))
            x = (x + run.noise(sigma, sigma_next) * deviation) * math.sqrt(1 + sigma_next**2)
    return x


@torch.no_grad()
def sample_lcm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Consistency sampling (Luo et al. 2023): jump to the prediction, noise it again to the next level."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        x = denoised
        if sigma_next > 0:
            x = run.model_sampling.noise_scaling(run.sigmas[i + 1], run.noise(sigma, sigma_next), x)
    return x
