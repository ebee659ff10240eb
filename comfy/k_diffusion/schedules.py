"""Sigma schedules that need no model: `n` decreasing sigmas followed by 0."""

from __future__ import annotations

import math
from typing import Any

import torch


def append_zero(x: torch.Tensor) -> torch.Tensor:
    """`x` [n] followed by a zero."""
    return torch.nn.functional.pad(x, (0, 1))


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Any = "cpu"
) -> torch.Tensor:
    """Equal steps of sigma^(1/rho) (Karras et al. 2022, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Any = "cpu") -> torch.Tensor:
    """Equal steps of log sigma."""
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), n)
    return append_zero(logs.exp()).to(device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Any = "cpu"
) -> torch.Tensor:
    """log sigma follows a ramp raised to `rho`."""
    share = torch.linspace(1, 0, n) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    return append_zero((share * (high - low) + low).exp()).to(device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Any = "cpu"
) -> torch.Tensor:
    """The variance-preserving SDE's sigma at equal steps of its time (Song et al. 2021)."""
    time = torch.linspace(1, eps_s, n)
    integral = beta_d * time**2 / 2 + beta_min * time
    return append_zero(torch.special.expm1(integral).sqrt()).to(device)


def get_sigmas_laplace(
    n: int, sigma_min: float, sigma_max: float, mu: float = 0.0, beta: float = 0.5, device: Any = "cpu"
) -> torch.Tensor:
    """Quantiles of a Laplace distribution of log sigma (arXiv 2407.03297)."""
    x = torch.linspace(0, 1, n)
    offset = 0.5 - x
    # 1e-5 keeps the logarithm finite at both ends.
    quantile = mu - beta * torch.sign(offset) * torch.log(1 - 2 * offset.abs() + 1e-5)
    return quantile.exp().clamp(min=sigma_min, max=sigma_max).to(device)
