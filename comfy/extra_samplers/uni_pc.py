"""UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor of any order with a corrector that costs no model call.

Written in x = latent + sigma * noise with lambda = -log sigma, where the data-prediction update is
x' = (sigma'/sigma) x + (1 - e^-h) m0 + B(h) * sum of rho_k (m_k - m0) / r_k.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch

from comfy.k_diffusion.run import SamplingRun

# The last level when the schedule ends at 0, whose log SNR would be infinite: ComfyUI's 0.001 as its float32 log SNR
# has it, and the nominal value, by which it rescales the results of flows.
LAST_SIGMA = 2.0**-10
NOMINAL_LAST_SIGMA = 0.001


def _phi_targets(order: int, h: float, scale: float) -> list[float]:
    """Right-hand sides of the order conditions: k! phi_{k+1}(-h) * (-h) / B(h) for k = 1 .. order."""
    hh = -h
    phi = math.expm1(hh) / hh - 1
    factorial, targets = 1, []
    for k in range(1, order + 1):
        targets.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return targets


def _coefficients(ratios: list[float], h: float, scale: float) -> list[float]:
    """Weights that satisfy the order conditions at the nodes `ratios` (a Vandermonde system).

    A single weight is the limit 1/2 for any step, as in the paper's implementation notes.
    """
    count = len(ratios)
    if count == 1:
        return [0.5]
    system = numpy.vander(numpy.asarray(ratios), count, increasing=True).T
    return numpy.linalg.solve(system, numpy.asarray(_phi_targets(count, h, scale))).tolist()


class _History:
    """The latest predictions and their levels, latest last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.predictions: list[torch.Tensor] = []
        self.sigmas: list[float] = []

    def add(self, prediction: torch.Tensor, sigma: float) -> None:
        self.predictions = [*self.predictions, prediction][-self.size :]
        self.sigmas = [*self.sigmas, sigma][-self.size :]


def _update(
    run: SamplingRun, x: torch.Tensor, history: _History, target: float, order: int, variant: str, correct: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One step to `target`: (x, the prediction there if it was evaluated)."""
    newest, sigma = history.predictions[-1], history.sigmas[-1]
    h = math.log(sigma / target)
    scale = -h if variant == "bh1" else math.expm1(-h)
    ratios = [math.log(sigma / history.sigmas[-1 - k]) / h for k in range(1, order)]
    changes = [(history.predictions[-1 - k] - newest) / r for k, r in zip(range(1, order), ratios)]
    first = x * (target / sigma) + newest * -math.expm1(-h)
    predicted = first
    for weight, change in zip(_coefficients(ratios, h, scale) if ratios else [], changes):
        predicted = predicted - change * (weight * scale)
    if not correct:
        return predicted, None
    prediction = run.denoise(predicted, target)
    corrected = first
    for weight, change in zip(_coefficients([*ratios, 1.0], h, scale), [*changes, prediction - newest]):
        corrected = corrected - change * (weight * scale)
    return corrected, prediction


def sample_unipc(
    model: Any,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = False,
    variant: str = "bh1",
) -> torch.Tensor:
    """Third order where the history allows, lower at both ends; `variant` is "bh1" (B = h) or "bh2" (B = e^h - 1)."""
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unknown UniPC variant {variant!r}; use 'bh1' or 'bh2'")
    run = SamplingRun(model, noise, sigmas, extra_args, callback, disable)
    levels = list(run.levels)
    ends_at_zero = levels[-1] == 0
    if ends_at_zero:
        levels[-1] = LAST_SIGMA
    steps = len(levels) - 1
    order = min(3, max(steps - 1, 1))
    history = _History(order)
    x, at = noise, levels[0]
    for i, sigma, _ in run.steps():
        if i == 0:
            history.add(run.denoise(x, sigma), sigma)
        else:
            wanted = min(order, i, steps + 1 - i)
            x, prediction = _update(run, x, history, sigma, wanted, variant, correct=True)
            assert prediction is not None  # a corrected step evaluates the model
            history.add(prediction, sigma)
            at = sigma
        if i == steps - 1:
            x, _ = _update(run, x, history, levels[steps], 1, variant, correct=False)
            at = levels[steps]
        # Callbacks get x at unit variance, the scale of the paper.
        run.report(i, x / math.sqrt(1 + at**2), history.predictions[-1])
    if ends_at_zero and run.is_flow:
        x = x / (1 - NOMINAL_LAST_SIGMA)
    return x


def sample_unipc_bh2(
    model: Any,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = False,
) -> torch.Tensor:
    """`sample_unipc` with B(h) = e^h - 1."""
    return sample_unipc(model, noise, sigmas, extra_args, callback, disable, variant="bh2")
