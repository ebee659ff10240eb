"""Solvers that reuse slopes or predictions of earlier steps: Adams-Bashforth family, DEIS, RES, gradient estimation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from comfy.k_diffusion.polynomials import lagrange_basis, lagrange_integrals
from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, get_ancestral_step, to_d


def _weighted(weights: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of weight * tensor."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:]):
        total = total + tensor * weight
    return total


@torch.no_grad()
def sample_lms(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Adams-Bashforth in sigma: the polynomial through the latest slopes is integrated over the step."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    slopes: list[torch.Tensor] = []
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        slopes = [to_d(x, sigma, denoised), *slopes][:order]
        if sigma_next == 0:
            x = denoised
            continue
        nodes = run.levels[i + 1 - len(slopes) : i + 1][::-1]
        x = x + _weighted(lagrange_integrals(nodes, sigma, sigma_next), slopes)
    return x


# Adams-Bashforth weights of the latest slope, the one before, ... (Zhang & Chen 2022, arXiv 2204.13902, iPNDM).
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def sample_ipndm(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Improved PNDM: Adams-Bashforth with the weights of equal steps."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    slopes: list[torch.Tensor] = []
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        slopes = [to_d(x, sigma, denoised), *slopes][:max_order]
        if sigma_next == 0:
            x = denoised
        else:
            x = x + _weighted(_ADAMS_BASHFORTH[len(slopes)], slopes) * (sigma_next - sigma)
    return x


def _ipndm_v_weights(widths: list[float]) -> list[float]:
    """Weights of the slopes, latest first, for the coming step width and those before it (latest first).

    Written as Newton's interpolation: slope + D1 * first + D2 * second + ..., D_k the backward differences of the
    slopes scaled by their widths. The factor of the third-order term is ComfyUI's, which departs from the exact
    Adams-Bashforth integral: 1 minus the whole product, not (1 minus the quotient) times it.
    """
    order = len(widths)
    if order == 1:
        return [1.0]
    h, h1 = widths[:2]
    weights = [1.0 + h / h1 / 2, -h / h1 / 2]
    if order >= 3:
        h2 = widths[2]
        product = h * (h + h1) / (h1 * (h1 + h2))
        second = (1.0 - h / (3 * (h + h1)) * product) / 2
        step = h1 / h2
        weights = [weights[0] + second, weights[1] - (1 + step) * second, step * second]
    if order >= 4:
        h3 = widths[3]
        share = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        third = share * (h * (h + h1) * (h + h1 + h2)) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        outer = h1 * (h1 + h2) / (h2 * (h2 + h3))
        weights = [
            weights[0] + third,
            weights[1] - (1 + step + outer) * third,
            weights[2] + (step + outer * (1 + h2 / h3)) * third,
            -third * outer * step,
        ]
    return weights


@torch.no_grad()
def sample_ipndm_v(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """iPNDM with weights for the actual step widths."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    slopes: list[torch.Tensor] = []
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        slopes = [to_d(x, sigma, denoised), *slopes][:max_order]
        if sigma_next == 0:
            x = denoised
            continue
        widths = [run.levels[k + 1] - run.levels[k] for k in range(i, i - len(slopes), -1)]
        x = x + _weighted(_ipndm_v_weights(widths), slopes) * (sigma_next - sigma)
    return x


class _VpTime:
    """Time of the variance-preserving SDE whose sigma runs over EDM's range 0.002 to 80 (t from 0.001 to 1).

    sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) (Song et al. 2021).
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, epsilon: float = 1e-3) -> None:
        low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
        self.beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
        self.beta_min = high - self.beta_d / 2

    def of_sigma(self, sigma: float) -> float:
        """The time at which the SDE has this sigma."""
        root = math.sqrt(self.beta_min**2 + 2 * self.beta_d * math.log(sigma**2 + 1))
        return (root - self.beta_min) / self.beta_d

    def sigma_rate(self, time: numpy.ndarray) -> numpy.ndarray:
        """d sigma / dt."""
        growth = numpy.exp(self.beta_d * time**2 / 2 + self.beta_min * time)
        return (self.beta_d * time + self.beta_min) * growth / (2 * numpy.sqrt(growth - 1))


def _deis_weights(levels: list[float], i: int, order: int, points: int = 10000) -> list[float]:
    """tAB-DEIS: integrals over step `i` of the Lagrange basis in VP time, d sigma (arXiv 2204.13902, equation 15).

    The sum over `points` equal nodes, both ends included, is the reference's quadrature (its error is part of it).
    """
    vp = _VpTime()
    times = [vp.of_sigma(sigma) for sigma in levels[i + 1 - order : i + 2]]
    start, end = times[-2], times[-1]
    grid = numpy.linspace(start, end, points)
    rate = vp.sigma_rate(grid)
    width = (end - start) / points
    basis = lagrange_basis(times[-2::-1])
    return [float((rate * numpy.polynomial.polynomial.polyval(grid, b)).sum() * width) for b in basis]


@torch.no_grad()
def sample_deis(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, max_order: int = 3, deis_mode: str = "tab",
) -> torch.Tensor:  # fmt: skip
    """DEIS: as `sample_lms`, but slopes are interpolated in the SDE's time. Only the mode "tab" exists."""
    if deis_mode != "tab":
        raise ValueError(f"unknown deis_mode {deis_mode!r}; use 'tab'")
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    slopes: list[torch.Tensor] = []
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        slopes = [to_d(x, sigma, denoised), *slopes][:max_order]
        if len(slopes) == 1 or sigma_next <= 0:
            x = x + slopes[0] * (sigma_next - sigma)
        else:
            x = x + _weighted(_deis_weights(run.levels, i, len(slopes)), slopes)
    return x


def _res_weights(run: SamplingRun, i: int, sigma: float, down: float, previous_down: float) -> tuple[float, float]:
    """Second-order exponential weights of the current and the previous prediction (arXiv 2308.02157, equation 20)."""
    h = math.log(sigma / down)
    c2 = math.log(previous_down / run.levels[i - 1]) / h
    phi1 = math.expm1(-h) / -h
    phi2 = (phi1 - 1.0) / -h
    if c2 == 0:
        return 0.0, 0.0
    return phi1 - phi2 / c2, phi2 / c2


def _res_multistep(run: SamplingRun, x: torch.Tensor, s_noise: float, eta: float, cfg_pp: bool) -> torch.Tensor:
    """RES: a two-step exponential integrator in log sigma; `cfg_pp` as in `comfy.k_diffusion.cfg_pp`."""
    seen = run.watch_unconditional() if cfg_pp else {}
    previous: torch.Tensor | None = None
    previous_down = 0.0
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        history = seen["uncond"] if cfg_pp else denoised
        down, up = get_ancestral_step(sigma, sigma_next, eta=eta)
        if down == 0 or previous is None:
            slope = to_d(x, sigma, history)
            x = denoised + slope * down if cfg_pp else x + slope * (down - sigma)
        else:
            current, earlier = _res_weights(run, i, sigma, down, previous_down)
            moved = x + (denoised - history) if cfg_pp else x
            h = math.log(sigma / down)
            x = moved * math.exp(-h) + (history * current + previous * earlier) * h
        if sigma_next > 0 and up > 0:
            x = x + run.noise(sigma, sigma_next) * (s_noise * up)
        previous, previous_down = history, down
    return x


@torch.no_grad()
def sample_res_multistep(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Deterministic RES."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    return _res_multistep(run, x, s_noise, eta=0.0, cfg_pp=False)


@torch.no_grad()
def sample_res_multistep_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """Deterministic RES with CFG++."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    return _res_multistep(run, x, s_noise, eta=0.0, cfg_pp=True)


@torch.no_grad()
def sample_res_multistep_ancestral(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """RES with fresh noise at each step."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    return _res_multistep(run, x, s_noise, eta=eta, cfg_pp=False)


@torch.no_grad()
def sample_res_multistep_ancestral_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """RES with fresh noise and CFG++."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    return _res_multistep(run, x, s_noise, eta=eta, cfg_pp=True)


@torch.no_grad()
def sample_gradient_estimation(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, ge_gamma: float = 2.0, cfg_pp: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Gradient estimation (Permenter & Yuan 2023, arXiv 2306.04848): the slope is pushed on along its last change."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable)
    seen = run.watch_unconditional() if cfg_pp else {}
    previous = None
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        slope = to_d(x, sigma, seen["uncond"] if cfg_pp else denoised)
        step = sigma_next - sigma
        if sigma_next == 0:
            x = denoised
        else:
            x = denoised + slope * sigma_next if cfg_pp else x + slope * step
            if previous is not None:
                x = x + (slope - previous) * ((ge_gamma - 1) * step)
        previous = slope
    return x


@torch.no_grad()
def sample_gradient_estimation_cfg_pp(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, ge_gamma: float = 2.0,
) -> torch.Tensor:  # fmt: skip
    """`sample_gradient_estimation` with CFG++."""
    return sample_gradient_estimation(model, x, sigmas, extra_args, callback, disable, ge_gamma=ge_gamma, cfg_pp=True)
