"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) in t = -log sigma: a fixed number of calls, or adaptive steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from tqdm.auto import tqdm

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, get_ancestral_step


class _Step:
    """Exponential steps of order 1 to 3 that start at one x and t and share the model calls they have in common."""

    def __init__(self, run: SamplingRun, x: torch.Tensor, t: float) -> None:
        self.run, self.x, self.t = run, x, t
        self.known: dict[float, torch.Tensor] = {}
        self.slope, self.denoised = self._evaluate(x, t)

    def _evaluate(self, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = math.exp(-t)
        denoised = self.run.denoise(x, sigma)
        return (x - denoised) / sigma, denoised

    def _first_order(self, t: float) -> torch.Tensor:
        return self.x - self.slope * (math.exp(-t) * math.expm1(t - self.t))

    def _slope_at(self, t: float, x: torch.Tensor) -> torch.Tensor:
        if t not in self.known:
            self.known[t] = self._evaluate(x, t)[0]
        return self.known[t]

    def to(self, t: float, order: int, r1: float = 0.5) -> torch.Tensor:
        """x at `t`; `r1` places the intermediate evaluation of order 2 (order 3 uses 1/3 and 2/3)."""
        plain = self._first_order(t)
        if order == 1:
            return plain
        h = t - self.t
        first = 1 / 3 if order == 3 else r1
        change = self._slope_at(self.t + first * h, self._first_order(self.t + first * h)) - self.slope
        if order == 2:
            return plain - change * (math.exp(-t) / (2 * first) * math.expm1(h))
        second = 2 / 3
        s2 = self.t + second * h
        curve = math.expm1(second * h) / (second * h) - 1
        at_second = self._first_order(s2) - change * (math.exp(-s2) * (second / first) * curve)
        change = self._slope_at(s2, at_second) - self.slope
        return plain - change * (math.exp(-t) / second * (math.expm1(h) / h - 1))


def _ancestral(t: float, t_next: float, t_end: float, eta: float) -> tuple[float, float]:
    """(t to solve to, sigma of the noise added then)."""
    if not eta:
        return t_next, 0.0
    down, _ = get_ancestral_step(math.exp(-t), math.exp(-t_next), eta)
    target = min(t_end, -math.log(down))
    return target, math.sqrt(math.exp(-2 * t_next) - math.exp(-2 * target))


def _report(run: SamplingRun, i: int, x: torch.Tensor, t: float, t_up: float, **more: Any) -> None:
    if run.callback is not None:
        sigma, sigma_hat = torch.tensor(math.exp(-t)), torch.tensor(math.exp(-t_up))
        run.callback({"sigma": sigma, "sigma_hat": sigma_hat, "x": x, "i": i, "t": t, "t_up": t_up, **more})


def _run(
    model: Any, x: torch.Tensor, sigma_max: float | torch.Tensor, sigma_min: float | torch.Tensor,
    extra_args: dict[str, Any] | None, callback: Callback | None, disable: bool | None,
    noise_sampler: NoiseSampler | None,
) -> SamplingRun:  # fmt: skip
    if sigma_min <= 0 or sigma_max <= 0:
        raise ValueError(f"DPM-Solver needs positive sigmas, not {float(sigma_max)} to {float(sigma_min)}")
    sigmas = torch.tensor([float(sigma_max), float(sigma_min)])
    return SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler)


@torch.no_grad()
def sample_dpm_fast(
    model: Any, x: torch.Tensor, sigma_min: float | torch.Tensor, sigma_max: float | torch.Tensor, n: int,
    extra_args: dict[str, Any] | None = None, callback: Callback | None = None, disable: bool | None = None,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:  # fmt: skip
    """DPM-Solver-Fast: exactly `n` model calls, as third-order steps and a lower order at the end."""
    run = _run(model, x, sigma_max, sigma_min, extra_args, callback, disable, noise_sampler)
    t_start, t_end = (-math.log(sigma) for sigma in run.levels)
    orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
    times = torch.linspace(t_start, t_end, len(orders) + 1).tolist()
    with tqdm(total=n, disable=disable) as progress:
        for i, (order, t, t_next) in enumerate(zip(orders, times, times[1:])):
            target, noise = _ancestral(t, t_next, t_end, eta)
            step = _Step(run, x, t)
            _report(run, i, x, t, t, denoised=step.denoised)
            x = step.to(target, order)
            if noise:
                x = x + run.noise(math.exp(-t), math.exp(-t_next)) * (noise * s_noise)
            progress.update(order)
    return x


class _StepSizeController:
    """PID control of the step width by the error estimate (Soederlind 2003), limited by 1 + atan(f - 1)."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, safety: float) -> None:
        self.h = h
        self.exponents = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.safety = safety
        self.inverse_errors: list[float] = []

    def accept(self, error: float) -> bool:
        """Judge a step by its error (1 is the tolerance) and choose the next width."""
        inverse = 1 / (error + 1e-8)
        self.inverse_errors = [inverse, *(self.inverse_errors[1:] or [inverse, inverse])]
        raw = math.prod(e**k for e, k in zip(self.inverse_errors, self.exponents))
        factor = 1 + math.atan(raw - 1)
        accepted = factor >= self.safety
        if accepted:
            latest, before, _ = self.inverse_errors
            self.inverse_errors = [latest, latest, before]
        self.h *= factor
        return accepted


@torch.no_grad()
def sample_dpm_adaptive(
    model: Any, x: torch.Tensor, sigma_min: float | torch.Tensor, sigma_max: float | torch.Tensor,
    extra_args: dict[str, Any] | None = None, callback: Callback | None = None, disable: bool | None = None,
    order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05, pcoeff: float = 0.0,
    icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, return_info: bool = False,
) -> Any:  # fmt: skip
    """DPM-Solver-12 or -23 with step widths from the difference of both orders (one host synchronisation a step)."""
    if order not in (2, 3):
        raise ValueError(f"the order of dpm_adaptive is 2 or 3, not {order}")
    run = _run(model, x, sigma_max, sigma_min, extra_args, callback, disable, noise_sampler)
    t, t_end = (-math.log(sigma) for sigma in run.levels)
    control = _StepSizeController(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    previous = x
    with tqdm(disable=disable) as progress:
        while t < t_end - 1e-5:
            t_next = min(t_end, t + control.h)
            target, noise = _ancestral(t, t_next, t_end, eta)
            step = _Step(run, x, t)
            low = step.to(target, order - 1, r1=1 / 3)
            high = step.to(target, order)
            tolerance = torch.clamp(torch.maximum(low.abs(), previous.abs()) * rtol, min=atol)
            error = float(torch.linalg.norm((low - high) / tolerance)) / math.sqrt(x.numel())
            if control.accept(error):
                previous, x = low, high
                if noise:
                    x = x + run.noise(math.exp(-t), math.exp(-t_next)) * (noise * s_noise)
                t = t_next
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            counters = {**info, "error": error, "h": control.h}
            _report(run, info["steps"] - 1, x, t, t, denoised=step.denoised, **counters)
            progress.update()
    return (x, info) if return_info else x
