"""The steps between noise and picture: schedulers, and the tables they start from.

A scheduler turns a number of steps into decreasing sigmas that end with 0. Some choose from a model's trained levels
(`use_ms`: called with `model_sampling, steps`), others only need the limits (`n, sigma_min, sigma_max`).
`comfy.samplers` re-exports everything here; custom nodes add to `SCHEDULER_HANDLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import comfy.k_diffusion.schedules as k_schedules


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> torch.Tensor:
    """Betas [n_timestep], float64.

    "linear" is linear in sqrt(beta), "sqrt_linear" in beta, "sqrt" is the root of a linear one, "cosine" is Nichol &
    Dhariwal 2021 (arXiv 2102.09672, equation 17).
    """
    f64 = torch.float64
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=f64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, n_timestep, dtype=f64)
    if schedule == "sqrt":
        return torch.linspace(linear_start, linear_end, n_timestep, dtype=f64) ** 0.5
    if schedule == "cosine":
        time = torch.arange(n_timestep + 1, dtype=f64) / n_timestep + cosine_s
        kept = torch.cos(time / (1 + cosine_s) * math.pi / 2) ** 2
        return (1 - kept[1:] / kept[:-1]).clamp(min=0, max=0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}; known: linear, sqrt_linear, sqrt, cosine")


def rescale_zero_terminal_snr_sigmas(sigmas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha_bar) so that the table ends without signal (Lin et al. 2023, algorithm 1).

    The last entry is set to the smallest alpha_bar for which sigma stays finite in float32 arithmetic (~4518.8).
    """
    root = (1 / (sigmas**2 + 1)).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    alpha_bar[-1] = 4.8973451890853435e-08
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _with_end(sigmas: list[float]) -> torch.Tensor:
    return torch.FloatTensor([*sigmas, 0.0])


def simple_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    """Every (table length / steps)-th trained level, counted from the noisiest."""
    table = model_sampling.sigmas
    stride = len(table) / steps
    return _with_end([float(table[-1 - int(step * stride)]) for step in range(steps)])


def ddim_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    """Levels at a whole stride from the table's second entry upwards; may give more steps than asked for."""
    table = model_sampling.sigmas
    stride = max(len(table) // steps, 1)
    chosen = [float(sigma) for sigma in table[1::stride]]
    if math.isclose(float(table[1]), 0.0, abs_tol=1e-5):
        # The table itself ends in (nearly) nothing: it closes the schedule, and one level more is taken.
        stride = max(len(table) // (steps + 1), 1)
        chosen = [float(sigma) for sigma in table[1::stride]]
        return torch.FloatTensor(chosen[::-1])
    return _with_end(chosen[::-1])


def normal_scheduler(model_sampling: Any, steps: int, sgm: bool = False, floor: bool = False) -> torch.Tensor:
    """Equal steps in network time; `sgm` leaves out the last one, so that the final step starts higher."""
    start = model_sampling.timestep(model_sampling.sigma_max)
    end = model_sampling.timestep(model_sampling.sigma_min)
    ends_by_itself = False
    if sgm:
        times = torch.linspace(float(start), float(end), steps + 1)[:-1]
    else:
        ends_by_itself = math.isclose(float(model_sampling.sigma(torch.as_tensor(end))), 0.0, abs_tol=1e-5)
        times = torch.linspace(float(start), float(end), steps + 1 if ends_by_itself else steps)
    sigmas = [float(model_sampling.sigma(time)) for time in times]
    return torch.FloatTensor(sigmas) if ends_by_itself else _with_end(sigmas)


def sgm_scheduler(model_sampling: Any, steps: int) -> torch.Tensor:
    """`normal_scheduler` without its last level."""
    return normal_scheduler(model_sampling, steps, sgm=True)


def beta_scheduler(model_sampling: Any, steps: int, alpha: float = 0.6, beta: float = 0.6) -> torch.Tensor:
    """Levels at quantiles of a beta distribution: dense at both ends (arXiv 2407.12173).

    Repeated levels are dropped.
    """
    import numpy
    import scipy.stats

    table = model_sampling.sigmas
    quantiles = 1 - numpy.linspace(0, 1, steps, endpoint=False)
    positions = numpy.rint(scipy.stats.beta.ppf(quantiles, alpha, beta) * (len(table) - 1)).astype(int)
    distinct = list(dict.fromkeys(positions.tolist()))
    return _with_end([float(table[position]) for position in distinct])


def linear_quadratic_schedule(
    model_sampling: Any, steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> torch.Tensor:
    """A first half in tiny equal steps up to `threshold_noise`, then a quadratic run (Movie Gen, arXiv 2410.13720).

    The quadratic piece joins the linear one in value and slope at t = linear_steps, and is 1 at t = steps.
    """
    highest = float(model_sampling.sigma_max)
    if steps == 1:
        return torch.FloatTensor([1.0, 0.0]) * highest
    joint = steps // 2 if linear_steps is None else linear_steps
    slope = threshold_noise / joint
    rest = steps - joint
    curvature = (1.0 - slope * steps) / rest**2
    progress = [slope * t + curvature * max(t - joint, 0) ** 2 for t in range(steps)]
    return torch.FloatTensor([1.0 - p for p in progress] + [0.0]) * highest


def kl_optimal_scheduler(n: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """Equal steps of atan(sigma) (Align Your Steps, arXiv 2404.14507, equation 9)."""
    share = torch.arange(n, dtype=torch.float32).div_(n - 1)
    sigmas = torch.zeros(n + 1)
    sigmas[:-1] = (share * math.atan(sigma_min) + (1 - share) * math.atan(sigma_max)).tan()
    return sigmas


class SchedulerHandler(NamedTuple):
    """How a scheduler is called: with `(model_sampling, steps)`, or with `n=, sigma_min=, sigma_max=`."""

    handler: Callable[..., torch.Tensor]
    use_ms: bool = True


def scheduler_table() -> dict[str, SchedulerHandler]:
    """ComfyUI's schedulers in its order."""
    return {
        "simple": SchedulerHandler(simple_scheduler),
        "sgm_uniform": SchedulerHandler(sgm_scheduler),
        "karras": SchedulerHandler(k_schedules.get_sigmas_karras, use_ms=False),
        "exponential": SchedulerHandler(k_schedules.get_sigmas_exponential, use_ms=False),
        "ddim_uniform": SchedulerHandler(ddim_scheduler),
        "beta": SchedulerHandler(beta_scheduler),
        "normal": SchedulerHandler(normal_scheduler),
        "linear_quadratic": SchedulerHandler(linear_quadratic_schedule),
        "kl_optimal": SchedulerHandler(kl_optimal_scheduler, use_ms=False),
    }
