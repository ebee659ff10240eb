"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) in t = -log sigma: a fixed number of calls, or adaptive steps."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun, get_ancestral_step


class _Denoises(Protocol):
    """A model: latents and a noise level to the denoised latents."""

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """x [B, C, ...] at `sigma` -> denoised."""


class _Step:
    """Exponential steps of order 1 to 3 that start at one x and t and share the model calls they have in common."""

    def __init__(self, run: _Denoises, x: torch.Tensor, t: float, slope: torch.Tensor | None = None) -> None:
        self.run, self.x, self.t = run, x, t
        self.known: dict[float, torch.Tensor] = {}  # slopes by t
        if slope is None:
            self.slope, self.denoised = self._evaluate(x, t)
        else:
            self.slope = slope

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

    def to(self, t: float, order: int, r1: float | None = None, r2: float = 2 / 3) -> torch.Tensor:
        """x at `t`; `r1` places the intermediate evaluation (by default half way, or a third for order 3), `r2` the second."""
        plain = self._first_order(t)
        if order == 1:
            return plain
        h = t - self.t
        first = r1 if r1 is not None else (1 / 3 if order == 3 else 1 / 2)
        change = self._slope_at(self.t + first * h, self._first_order(self.t + first * h)) - self.slope
        if order == 2:
            return plain - change * (math.exp(-t) / (2 * first) * math.expm1(h))
        s2 = self.t + r2 * h
        curve = math.expm1(r2 * h) / (r2 * h) - 1
        at_second = self._first_order(s2) - change * (math.exp(-s2) * (r2 / first) * curve)
        change = self._slope_at(s2, at_second) - self.slope
        return plain - change * (math.exp(-t) / r2 * (math.expm1(h) / h - 1))


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


class PIDStepSizeController:
    """PID control of the step width by the error estimate (Soederlind 2003), limited by 1 + atan(f - 1)."""

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float = 1, accept_safety: float = 0.81,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.h = h
        self.exponents = ((pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order)
        self.accept_safety = accept_safety
        self.eps = eps
        self.errs: list[float] = []  # 1 / error of this step and of the two accepted before it

    def limiter(self, x: float) -> float:
        """A factor for the width near 1 as it is, a large or small one less."""
        return 1 + math.atan(x - 1)

    def propose_step(self, error: float) -> bool:
        """Whether a step with this error (1 is the tolerance) is good enough; `h` is the width to go on with."""
        inverse = 1 / (float(error) + self.eps)
        self.errs = [inverse, *(self.errs[1:] or [inverse, inverse])]
        factor = self.limiter(math.prod(e**k for e, k in zip(self.errs, self.exponents)))
        accepted = factor >= self.accept_safety
        if accepted:
            latest, before, _ = self.errs
            self.errs = [latest, latest, before]
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
    control = PIDStepSizeController(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
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
            if control.propose_step(error):
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


class DPMSolver(torch.nn.Module):
    """The solver's steps one by one, for packs that drive them. t is -log sigma, a tensor or number.

    model: `(x, sigma [B], **extra_args) -> denoised`. Steps return (x at `t_next`, slopes known), and take slopes that an
    earlier step from the same x and t returned. eps_callback: called after each call of the model; info_callback: after
    each step of `dpm_solver_fast` and `dpm_solver_adaptive`, as a sampler's callback.
    """

    def __init__(
        self, model: Any, extra_args: dict[str, Any] | None = None, eps_callback: Any = None, info_callback: Any = None
    ) -> None:
        super().__init__()
        self.model = model
        self.extra_args = {} if extra_args is None else extra_args
        self.eps_callback = eps_callback
        self.info_callback = info_callback

    def t(self, sigma: torch.Tensor) -> torch.Tensor:
        """-log sigma."""
        return -sigma.log()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level of t."""
        return t.neg().exp()

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """x [B, C, ...] at `sigma` -> denoised."""
        denoised: torch.Tensor = self.model(x, sigma * x.new_ones([x.shape[0]]), **self.extra_args)
        if self.eps_callback is not None:
            self.eps_callback()
        return denoised

    def eps(
        self, eps_cache: dict[str, torch.Tensor], key: str, x: torch.Tensor, t: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The slope (x - denoised) / sigma at t, from `eps_cache[key]` if it is there, and the cache with it."""
        if key not in eps_cache:
            sigma = math.exp(-float(t))
            eps_cache = {key: (x - self.denoise(x, sigma)) / sigma, **eps_cache}
        return eps_cache[key], eps_cache

    def _step(
        self, x: torch.Tensor, t: Any, t_next: Any, order: int, places: dict[str, float], eps_cache: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        slope, slopes = self.eps(eps_cache or {}, "eps", x, t)
        step = _Step(self, x, float(t), slope)
        h = float(t_next) - step.t
        step.known = {step.t + r * h: slopes[name] for name, r in places.items() if name in slopes}
        result = step.to(float(t_next), order, *places.values())
        known = {name: step.known[step.t + r * h] for name, r in places.items()}
        return result, {**slopes, **known}

    def dpm_solver_1_step(self, x: torch.Tensor, t: Any, t_next: Any, eps_cache: Any = None) -> Any:
        """A step of first order."""
        return self._step(x, t, t_next, 1, {}, eps_cache)

    def dpm_solver_2_step(self, x: torch.Tensor, t: Any, t_next: Any, r1: float = 1 / 2, eps_cache: Any = None) -> Any:
        """A step of second order with an evaluation at the share `r1` of the way."""
        return self._step(x, t, t_next, 2, {"eps_r1": r1}, eps_cache)

    def dpm_solver_3_step(
        self, x: torch.Tensor, t: Any, t_next: Any, r1: float = 1 / 3, r2: float = 2 / 3, eps_cache: Any = None
    ) -> Any:
        """A step of third order with evaluations at the shares `r1` and `r2` of the way."""
        return self._step(x, t, t_next, 3, {"eps_r1": r1, "eps_r2": r2}, eps_cache)

    def dpm_solver_fast(
        self, x: torch.Tensor, t_start: Any, t_end: Any, nfe: int, eta: float = 0.0, s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`sample_dpm_fast` from t_start to t_end."""
        ends = math.exp(-float(t_end)), math.exp(-float(t_start))
        return sample_dpm_fast(
            self.model, x, *ends, nfe, self.extra_args, self.info_callback, True, eta, s_noise, noise_sampler
        )

    def dpm_solver_adaptive(self, x: torch.Tensor, t_start: Any, t_end: Any, **settings: Any) -> Any:
        """`sample_dpm_adaptive` from t_start to t_end: (x, counts of steps)."""
        ends = math.exp(-float(t_end)), math.exp(-float(t_start))
        return sample_dpm_adaptive(
            self.model, x, *ends, self.extra_args, self.info_callback, True, return_info=True, **settings
        )
