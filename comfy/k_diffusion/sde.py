"""Reverse-time SDE solvers: ER-SDE (arXiv 2309.06169) and SEEDS (arXiv 2305.14267)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun


def default_er_sde_noise_scaler(x: torch.Tensor) -> torch.Tensor:
    """ER-SDE's noise scale function number 5: x (exp(x^0.3) + 10)."""
    return x * ((x**0.3).exp() + 10.0)


@torch.no_grad()
def sample_er_sde(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, noise_scaler: Callable[[torch.Tensor], torch.Tensor] | None = None,
    max_stage: int = 3,
) -> torch.Tensor:  # fmt: skip
    """ER-SDE-Solver-3 in l = sigma / alpha; orders 2 and 3 need one and two earlier predictions.

    The integrals over 1 / noise_scaler are sums over 200 equal points that start at the step's end.
    """
    points = 200
    scaler = default_er_sde_noise_scaler if noise_scaler is None else noise_scaler
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    ratios = [math.exp(-run.half_log_snr(sigma)) for sigma in run.levels]
    previous = previous_slope = x  # placeholders: they are used from the second and third step on
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        order = min(max_stage, i + 1)
        if sigma_next == 0:
            x = denoised
            previous = denoised
            continue
        start, end = ratios[i], ratios[i + 1]
        alpha, alpha_next = run.alpha_of(sigma), run.alpha_of(sigma_next)
        at_end = float(scaler(torch.tensor(end, dtype=torch.float64)))
        decay = at_end / float(scaler(torch.tensor(start, dtype=torch.float64)))
        x = x * (alpha_next / alpha * decay) + denoised * (alpha_next * (1 - decay))
        if order >= 2:
            width = end - start
            grid = end - torch.arange(points, dtype=torch.float64) * (width / points)
            density = (-width / points) / scaler(grid)
            slope = (denoised - previous) / (start - ratios[i - 1])
            x = x + slope * (alpha_next * (width + float(density.sum()) * at_end))
            if order >= 3:
                bend = (slope - previous_slope) / ((start - ratios[i - 2]) / 2)
                moment = float(((grid - start) * density).sum())
                x = x + bend * (alpha_next * (width**2 / 2 + moment * at_end))
            previous_slope = slope
        if s_noise > 0:
            variance = max(end**2 - (start * decay) ** 2, 0.0)
            x = x + run.noise(sigma, sigma_next) * (alpha_next * s_noise * math.sqrt(variance))
        previous = denoised
    return x


class _SeedsStep:
    """One SEEDS step from `sigma` to `sigma_next` and to points between, which share their noise.

    The noise at a later point is what was drawn before, decayed, plus a fresh part: `parts` holds the draws with the
    fraction of the step at which each was added.
    """

    def __init__(
        self, run: SamplingRun, x: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float, eta: float,
        s_noise: float,
    ) -> None:  # fmt: skip
        self.run, self.x, self.denoised = run, x, denoised
        self.sigma, self.eta, self.s_noise = sigma, eta, s_noise
        self.start = run.half_log_snr(sigma)
        self.h = run.half_log_snr(sigma_next) - self.start
        self.fractions: list[float] = [0.0]
        self.draws: list[torch.Tensor] = []
        self.last_sigma = sigma

    def sigma_at(self, fraction: float) -> float:
        """Sigma at a fraction of the step in log SNR."""
        return self.run.sigma_of(self.start + fraction * self.h)

    def draw(self, fraction: float, sigma: float) -> None:
        """Draw the fresh noise of the piece that ends at `fraction`."""
        if self.eta > 0 and self.s_noise > 0:
            self.draws.append(self.run.noise(self.last_sigma, sigma))
        self.fractions.append(fraction)
        self.last_sigma = sigma

    def decay(self, fraction: float) -> float:
        """exp(-fraction h (1 + eta)) - 1."""
        return math.expm1(-fraction * self.h * (1 + self.eta))

    def reach(
        self, fraction: float, sigma: float, target: torch.Tensor, correction: torch.Tensor | None = None,
        weight: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """x at `fraction`: decayed x, prediction `target`, second-order `correction` and the noise drawn so far."""
        alpha = self.run.alpha_of(sigma)
        kept = sigma / self.sigma * math.exp(-fraction * self.h * self.eta)
        x = self.x * kept - target * (alpha * self.decay(fraction))
        if correction is not None:
            bend = self.decay(fraction) / (fraction * self.h * (1 + self.eta)) + 1
            x = x + correction * (weight * alpha * bend)
        rate = 2 * self.h * self.eta
        for begin, end, noise in zip(self.fractions, self.fractions[1:], self.draws):
            if end <= fraction:
                variance = math.exp(-rate * (fraction - end)) - math.exp(-rate * (fraction - begin))
                x = x + noise * (sigma * self.s_noise * math.sqrt(variance))
        return x


@torch.no_grad()
def sample_seeds_2(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 0.5,
) -> torch.Tensor:  # fmt: skip
    """SEEDS-2: one evaluation within each step."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        step = _SeedsStep(run, x, denoised, sigma, sigma_next, eta, s_noise)
        middle = step.sigma_at(r)
        step.draw(r, middle)
        step.draw(1.0, sigma_next)
        second = run.denoise(step.reach(r, middle, denoised), middle)
        x = step.reach(1.0, sigma_next, torch.lerp(denoised, second, 1 / (2 * r)))
    return x


@torch.no_grad()
def sample_seeds_3(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r_1: float = 1.0 / 3, r_2: float = 2.0 / 3,
) -> torch.Tensor:  # fmt: skip
    """SEEDS-3: two evaluations within each step."""
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(x, sigma)
        run.report(i, x, denoised)
        if sigma_next == 0:
            x = denoised
            continue
        step = _SeedsStep(run, x, denoised, sigma, sigma_next, eta, s_noise)
        first, second = step.sigma_at(r_1), step.sigma_at(r_2)
        for fraction, at in ((r_1, first), (r_2, second), (1.0, sigma_next)):
            step.draw(fraction, at)
        at_first = run.denoise(step.reach(r_1, first, denoised), first)
        halfway = step.reach(r_2, second, denoised, at_first - denoised, r_2 / r_1)
        at_second = run.denoise(halfway, second)
        x = step.reach(1.0, sigma_next, denoised, at_second - denoised, 1 / r_2)
    return x
