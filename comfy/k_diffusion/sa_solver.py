"""SA-Solver (Xue et al. 2023, arXiv 2309.05019): stochastic Adams predictor and corrector in log SNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from comfy.k_diffusion.polynomials import lagrange_basis
from comfy.k_diffusion.run import Callback, NoiseSampler, SamplingRun


def get_tau_interval_func(start_sigma: float, end_sigma: float, eta: float = 1.0) -> Callable[[Any], float]:
    """tau(sigma): `eta` between two sigmas, 0 outside."""

    def tau(sigma: Any) -> float:
        return eta if eta > 0 and start_sigma >= float(sigma) >= end_sigma else 0.0

    return tau


def _exponential_moments(count: int, start: float, end: float, rate: float) -> list[float]:
    """rate * integral of exp(rate (l - end)) (l - end)^n dl from `start` to `end`, for n = 0 .. count - 1.

    By parts: M_n = -(start - end)^n exp(rate (start - end)) - n / rate M_{n-1}, and M_0 = 1 - exp(rate (start - end)).
    """
    distance = start - end
    decay = math.exp(rate * distance)
    moments = [-math.expm1(rate * distance)]
    for n in range(1, count):
        moments.append(-(distance**n) * decay - n / rate * moments[-1])
    return moments


def adams_weights(nodes: Sequence[float], start: float, end: float, tau: float) -> list[float]:
    """Weights of the predictions at log SNRs `nodes` for a step from `start` to `end` with noise strength `tau`.

    (1 + tau^2) * integral of exp((1 + tau^2) (l - end)) * l_j(l) dl with the Lagrange polynomials l_j
    (equations 14 and 17, without the factor alpha).
    """
    basis = lagrange_basis([node - end for node in nodes])
    moments = _exponential_moments(len(nodes), start, end, 1 + tau**2)
    return [sum(float(c) * m for c, m in zip(coefficients, moments)) for coefficients in basis]


def _combine(
    run: SamplingRun, predictions: list[torch.Tensor], nodes: list[float], i_from: int, tau: float
) -> torch.Tensor:
    """The predictions' share of x after the step from level `i_from` to the next."""
    start, end = (run.half_log_snr(run.levels[k]) for k in (i_from, i_from + 1))
    alpha = run.alpha_of(run.levels[i_from + 1])
    terms = [p * (alpha * weight) for weight, p in zip(adams_weights(nodes, start, end, tau), predictions)]
    return sum(terms[1:], start=terms[0])


def _carried(run: SamplingRun, i_from: int, tau: float) -> float:
    """The factor of x in the step from level `i_from` to the next."""
    sigma, sigma_next = run.levels[i_from : i_from + 2]
    h = run.half_log_snr(sigma_next) - run.half_log_snr(sigma)
    return sigma_next / sigma * math.exp(-(tau**2) * h)


@torch.no_grad()
def sample_sa_solver(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = False, tau_func: Callable[[Any], float] | None = None,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4,
    use_pece: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Predict, evaluate, correct; with `use_pece` evaluate again after the correction.

    `tau_func(sigma)` is the noise strength; by default 1 between 20% and 80% of the progress, 0 elsewhere.
    """
    if len(sigmas) <= 1:
        return x
    run = SamplingRun(model, x, sigmas, extra_args, callback, disable, noise_sampler, offset_first=True)
    if tau_func is None:
        tau_func = get_tau_interval_func(
            run.model_sampling.percent_to_sigma(0.2), run.model_sampling.percent_to_sigma(0.8)
        )
    lambdas = [run.half_log_snr(sigma) for sigma in run.levels]
    # Towards an end at sigma 0 the order is lowered, so that the last step is the prediction itself.
    left = len(run.levels) - 2 if run.levels[-1] == 0 else math.inf
    predicted, noise, tau = x, None, 0.0
    predictions: list[torch.Tensor] = []
    for i, sigma, sigma_next in run.steps():
        denoised = run.denoise(predicted, sigma)
        run.report(i, predicted, denoised)
        predictions = [*predictions, denoised][-max(predictor_order, corrector_order) :]
        predict = int(min(predictor_order, len(predictions), left - i))
        correct = 0
        if i > 0 and (sigma_next != 0 or use_pece):
            correct = int(min(corrector_order, len(predictions), left + 1 - i))
        if correct == 0:
            x = predicted
        else:
            nodes = lambdas[i + 1 - correct : i + 1]
            x = x * _carried(run, i - 1, tau) + _combine(run, predictions[-correct:], nodes, i - 1, tau)
            if noise is not None:
                x = x + noise
            if use_pece:
                denoised = predictions[-1] = run.denoise(x, sigma)
        if sigma_next == 0:
            predicted = denoised
            continue
        tau, noise = tau_func(run.host_sigmas[i + 1]), None
        nodes = lambdas[i + 1 - predict : i + 1]
        predicted = x * _carried(run, i, tau) + _combine(run, predictions[-predict:], nodes, i, tau)
        if tau > 0 and s_noise > 0:
            spread = math.sqrt(-math.expm1(-2 * tau**2 * (lambdas[i + 1] - lambdas[i])))
            noise = run.noise(sigma, sigma_next) * (sigma_next * spread * s_noise)
            predicted = predicted + noise
    return predicted


@torch.no_grad()
def sample_sa_solver_pece(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None, disable: bool | None = False, tau_func: Callable[[Any], float] | None = None,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, predictor_order: int = 3, corrector_order: int = 4,
) -> torch.Tensor:  # fmt: skip
    """`sample_sa_solver` with a second evaluation in every step."""
    return sample_sa_solver(
        model, x, sigmas, extra_args, callback, disable, tau_func, s_noise, noise_sampler,
        predictor_order, corrector_order, use_pece=True,
    )  # fmt: skip
