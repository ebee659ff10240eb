"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): exponential integrators of the denoised prediction in log SNR.

lambda is half the log SNR, log(alpha / sigma). An SDE step of width h with noise strength `eta` decays the latent by
exp(-h (1 + eta)) towards the prediction and adds the noise that decay leaves room for.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, flow_ancestral_step, get_ancestral_step, to_d


@torch.no_grad()
def sample_dpmpp_2m(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """Second order, multistep, deterministic."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    previous = None
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        decay = sigma_next / sigma
        target = denoised
        if previous is not None and sigma_next != 0:
            ratio = math.log(run.levels[i - 1] / sigma) / math.log(sigma / sigma_next)
            target = denoised + (denoised - previous) * (1 / (2 * ratio))
        x = x * decay + target * (1 - decay)
        previous = denoised
    return x


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Second order, single step, ancestral."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    if run.is_flow:
        return sample_dpmpp_2s_ancestral_RF(
            model, x, sigmas, extra_args, callback, disable, eta=eta, s_noise=s_noise, noise_sampler=noise_sampler
        )
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        down, up = get_ancestral_step(sigma, sigma_next, eta=eta)
        if down == 0:
            x = x + to_d(x, sigma, denoised) * (down - sigma)
        else:
            middle = math.sqrt(sigma * down)
            halfway = torch.lerp(denoised, x, middle / sigma)
            x = torch.lerp(run.denoise(halfway, middle), x, down / sigma)
        if sigma_next > 0:
            x = x + run.noise(sigma, sigma_next) * (s_noise * up)
    return x


@torch.no_grad()
def sample_dpmpp_2s_ancestral_RF(  # noqa: N802 (ComfyUI's name)
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_2s_ancestral` for rectified flows; from pure noise the middle is 0.9999."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        down, scale, noise = flow_ancestral_step(sigma, sigma_next, eta)
        middle = 0.9999
        if sigma != 1.0:
            middle = run.sigma_of((run.half_log_snr(sigma) + run.half_log_snr(down)) / 2)
        halfway = torch.lerp(denoised, x, middle / sigma)
        x = torch.lerp(run.denoise(halfway, middle), x, down / sigma)
        if eta > 0:
            x = x * scale + run.noise(sigma, sigma_next) * (s_noise * noise)
    return x


@torch.no_grad()
def sample_dpmpp_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 1 / 2,
) -> torch.Tensor:  # fmt: skip
    """Single-step SDE solver with one evaluation at the fraction `r` of the step (in log SNR)."""
    return _dpmpp_sde(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, r, cpu=True)


@torch.no_grad()
def sample_dpmpp_sde_gpu(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 1 / 2,
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_sde` with noise drawn on the latent's device."""
    return _dpmpp_sde(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, r, cpu=False)


def _dpmpp_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None, callback: Callback | None,
    disable: bool | None, eta: float, s_noise: float, noise_sampler: NoiseSampler | None, r: float, cpu: bool,
) -> torch.Tensor:  # fmt: skip
    if len(sigmas) <= 1:
        return x
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    run.use_brownian_noise(cpu)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        start, end = run.half_log_snr(sigma), run.half_log_snr(sigma_next)
        middle_lambda = start + r * (end - start)
        middle = run.sigma_of(middle_lambda)
        halfway = _sde_leg(run, x, denoised, sigma, start, middle, middle_lambda, eta, s_noise)
        second = run.denoise(halfway, middle)
        mixed = torch.lerp(denoised, second, 1 / (2 * r))
        x = _sde_leg(run, x, mixed, sigma, start, sigma_next, end, eta, s_noise)
    return x


def _sde_leg(
    run: SamplingRun, x: torch.Tensor, denoised: torch.Tensor, sigma: float, start: float, target: float,
    target_lambda: float, eta: float, s_noise: float,
) -> torch.Tensor:  # fmt: skip
    """First-order ancestral step from (sigma, lambda=start) to (target, target_lambda)."""
    down, up = get_ancestral_step(math.exp(-start), math.exp(-target_lambda), eta)
    decay = down * math.exp(start)
    alpha = run.alpha_of(target)
    x = x * (alpha / run.alpha_of(sigma) * decay) + denoised * (alpha * (1 - decay))
    if eta > 0 and s_noise > 0:
        x = x + run.noise(sigma, target) * (alpha * s_noise * up)
    return x


def _sde_noise(
    run: SamplingRun, x: torch.Tensor, sigma: float, sigma_next: float, h: float, eta: float, s_noise: float
) -> torch.Tensor:
    """Add the noise that belongs to an SDE step of width `h`."""
    if eta > 0 and s_noise > 0:
        x = x + run.noise(sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise)
    return x


def _dpmpp_2m_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None, callback: Callback | None,
    disable: bool | None, eta: float, s_noise: float, noise_sampler: NoiseSampler | None, solver_type: str, cpu: bool,
) -> torch.Tensor:  # fmt: skip
    if len(sigmas) <= 1:
        return x
    if solver_type not in ("heun", "midpoint"):
        raise ValueError(f"unknown solver_type {solver_type!r}; use 'heun' or 'midpoint'")
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    run.use_brownian_noise(cpu)
    previous, previous_h = None, 0.0
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        h = run.half_log_snr(sigma_next) - run.half_log_snr(sigma)
        total = h * (1 + eta)
        alpha = run.alpha_of(sigma_next)
        gain = -math.expm1(-total)
        x = x * (sigma_next / sigma * math.exp(-h * eta)) + denoised * (alpha * gain)
        if previous is not None:
            weight = gain / 2 if solver_type == "midpoint" else 1 - gain / total
            x = x + (denoised - previous) * (alpha * weight * h / previous_h)
        x = _sde_noise(run, x, sigma, sigma_next, h, eta, s_noise)
        previous, previous_h = denoised, h
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "midpoint",
) -> torch.Tensor:  # fmt: skip
    """Second order, multistep, SDE."""
    args = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)
    return _dpmpp_2m_sde(*args, cpu=True)


@torch.no_grad()
def sample_dpmpp_2m_sde_gpu(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "midpoint",
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_2m_sde` with noise drawn on the latent's device."""
    args = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)
    return _dpmpp_2m_sde(*args, cpu=False)


@torch.no_grad()
def sample_dpmpp_2m_sde_heun(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "heun",
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_2m_sde` with Heun weights."""
    args = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)
    return _dpmpp_2m_sde(*args, cpu=True)


@torch.no_grad()
def sample_dpmpp_2m_sde_heun_gpu(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "heun",
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_2m_sde_heun` with noise drawn on the latent's device."""
    args = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)
    return _dpmpp_2m_sde(*args, cpu=False)


def _dpmpp_3m_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None, callback: Callback | None,
    disable: bool | None, eta: float, s_noise: float, noise_sampler: NoiseSampler | None, cpu: bool,
) -> torch.Tensor:  # fmt: skip
    if len(sigmas) <= 1:
        return x
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    run.use_brownian_noise(cpu)
    history: list[tuple[torch.Tensor, float]] = []  # (prediction, width of the step it made), latest first
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        h = run.half_log_snr(sigma_next) - run.half_log_snr(sigma)
        total = h * (1 + eta)
        alpha = run.alpha_of(sigma_next)
        x = x * (sigma_next / sigma * math.exp(-h * eta)) + denoised * (-alpha * math.expm1(-total))
        phi_2 = math.expm1(-total) / total + 1
        if history:
            (one, h1), *older = history
            r0 = h1 / h
            slope = (denoised - one) / r0
            if older:
                two, h2 = older[0]
                r1 = h2 / h
                bend = (slope - (one - two) / r1) / (r0 + r1)
                slope = slope + bend * r0
                x = x - bend * (alpha * (phi_2 / total - 0.5))
            x = x + slope * (alpha * phi_2)
        x = _sde_noise(run, x, sigma, sigma_next, h, eta, s_noise)
        history = [(denoised, h), *history][:2]
    return x


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Third order, multistep, SDE."""
    return _dpmpp_3m_sde(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, cpu=True)


@torch.no_grad()
def sample_dpmpp_3m_sde_gpu(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """`sample_dpmpp_3m_sde` with noise drawn on the latent's device."""
    return _dpmpp_3m_sde(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, cpu=False)
