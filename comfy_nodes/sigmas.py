"""Nodes that make and cut noise schedules: a SIGMAS value is a 1-D tensor, falling, usually ending in 0."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.samplers
from comfy_nodes.fields import number, whole

SCHEDULERS = "sampling/custom_sampling/schedulers"
SIGMAS = "sampling/custom_sampling/sigmas"


def steps(default: int = 20, high: int = 10000):
    return whole(default, 1, high)


def precise(default: float, high: float = 5000.0, low: float = 0.0, step: float = 0.01):
    """A FLOAT that the page does not round."""
    return number(default, low, high, step, round=False)


def sampling_of(model: Any) -> Any:
    return model.get_model_object("model_sampling")


class BasicScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "scheduler": (comfy.samplers.SCHEDULER_NAMES,),
                "steps": steps(),
                "denoise": number(1.0, 0.0, 1.0, 0.01),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, model: Any, scheduler: str, steps: int, denoise: float):
        """The last `steps` steps of a schedule of steps / denoise; empty when nothing is to be denoised."""
        if denoise <= 0.0:
            return (torch.FloatTensor([]),)
        total = steps if denoise >= 1.0 else int(steps / denoise)
        return (comfy.samplers.calculate_sigmas(sampling_of(model), scheduler, total).cpu()[-(steps + 1) :],)


def _k_schedule(function: str, **parameters: Any) -> tuple[torch.Tensor]:
    import comfy.k_diffusion.sampling

    return (getattr(comfy.k_diffusion.sampling, function)(**parameters),)


class KarrasScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "steps": steps(),
                "sigma_max": precise(14.614642),
                "sigma_min": precise(0.0291675),
                "rho": precise(7.0, 100.0),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, steps: int, sigma_max: float, sigma_min: float, rho: float):
        return _k_schedule("get_sigmas_karras", n=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


class ExponentialScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": steps(), "sigma_max": precise(14.614642), "sigma_min": precise(0.0291675)}}

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, steps: int, sigma_max: float, sigma_min: float):
        return _k_schedule("get_sigmas_exponential", n=steps, sigma_min=sigma_min, sigma_max=sigma_max)


class PolyexponentialScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "steps": steps(),
                "sigma_max": precise(14.614642),
                "sigma_min": precise(0.0291675),
                "rho": precise(1.0, 100.0),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, steps: int, sigma_max: float, sigma_min: float, rho: float):
        return _k_schedule("get_sigmas_polyexponential", n=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


class LaplaceScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "steps": steps(),
                "sigma_max": precise(14.614642),
                "sigma_min": precise(0.0291675),
                "mu": precise(0.0, 10.0, -10.0, 0.1),
                "beta": precise(0.5, 10.0, 0.0, 0.1),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, steps: int, sigma_max: float, sigma_min: float, mu: float, beta: float):
        return _k_schedule("get_sigmas_laplace", n=steps, sigma_min=sigma_min, sigma_max=sigma_max, mu=mu, beta=beta)


class VPScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "steps": steps(),
                "beta_d": precise(19.9),
                "beta_min": precise(0.1),
                "eps_s": precise(0.001, 1.0, 0.0, 0.0001),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, steps: int, beta_d: float, beta_min: float, eps_s: float):
        return _k_schedule("get_sigmas_vp", n=steps, beta_d=beta_d, beta_min=beta_min, eps_s=eps_s)


class BetaSamplingScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "steps": steps(),
                "alpha": precise(0.6, 50.0),
                "beta": precise(0.6, 50.0),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, model: Any, steps: int, alpha: float, beta: float):
        return (comfy.samplers.beta_scheduler(sampling_of(model), steps, alpha=alpha, beta=beta),)


class SDTurboScheduler:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "steps": steps(1, 10), "denoise": number(1.0, 0, 1.0, 0.01)}}

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SCHEDULERS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, model: Any, steps: int, denoise: float):
        """Turbo models know ten timesteps, 999, 899, ..., 99."""
        first = 10 - int(10 * denoise)
        timesteps = torch.arange(999, 0, -100)[first : first + steps]
        sigmas = sampling_of(model).sigma(timesteps)
        return (torch.cat([sigmas, sigmas.new_zeros(1)]),)


class SplitSigmas:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",), "step": whole(0, 0, 10000)}}

    RETURN_TYPES = ("SIGMAS", "SIGMAS")
    RETURN_NAMES = ("high_sigmas", "low_sigmas")
    CATEGORY = SIGMAS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas: torch.Tensor, step: int):
        return (sigmas[: step + 1], sigmas[step:])


class SplitSigmasDenoise:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",), "denoise": number(1.0, 0.0, 1.0, 0.01)}}

    RETURN_TYPES = ("SIGMAS", "SIGMAS")
    RETURN_NAMES = ("high_sigmas", "low_sigmas")
    CATEGORY = SIGMAS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas: torch.Tensor, denoise: float):
        """The last `denoise` share of the steps is the second part."""
        kept = round(max(len(sigmas) - 1, 0) * denoise)
        return (sigmas[:-kept] if kept else sigmas[:0], sigmas[-(kept + 1) :])


class FlipSigmas:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",)}}

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SIGMAS
    FUNCTION = "get_sigmas"

    def get_sigmas(self, sigmas: torch.Tensor):
        """Rising; a first 0 becomes 0.0001, which samplers can start from."""
        flipped = sigmas.flip(0)
        if len(flipped) > 0 and flipped[0] == 0:
            flipped[0] = 0.0001
        return (flipped,)


class SetFirstSigma:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",), "sigma": precise(136.0, 20000.0, 0.0, 0.001)}}

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SIGMAS
    FUNCTION = "set_first_sigma"

    def set_first_sigma(self, sigmas: torch.Tensor, sigma: float):
        sigmas = sigmas.clone()
        sigmas[0] = sigma
        return (sigmas,)


class ExtendIntermediateSigmas:
    _SPACINGS = {
        "linear": lambda x: x,
        "cosine": lambda x: torch.sin(x * math.pi / 2),
        "sine": lambda x: 1 - torch.cos(x * math.pi / 2),
    }

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "sigmas": ("SIGMAS",),
                "steps": steps(2, 100),
                "start_at_sigma": precise(-1.0, 20000.0, -1.0),
                "end_at_sigma": precise(12.0, 20000.0),
                "spacing": (list(cls._SPACINGS),),
            }
        }

    RETURN_TYPES = ("SIGMAS",)
    CATEGORY = SIGMAS
    FUNCTION = "extend"

    def extend(self, sigmas: torch.Tensor, steps: int, start_at_sigma: float, end_at_sigma: float, spacing: str):
        """Put `steps - 1` values into every interval that begins between the two sigmas (-1: no upper limit)."""
        upper = float("inf") if start_at_sigma < 0 else start_at_sigma
        inner = self._SPACINGS[spacing](torch.linspace(0, 1, steps + 1, device=sigmas.device)[1:-1])
        extended: list[float] = []
        for here, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            extended.append(here.item())
            if end_at_sigma <= here <= upper:
                extended += (inner * (following - here) + here).tolist()
        extended += sigmas[-1:].tolist()
        return (torch.FloatTensor(extended),)


class SamplingPercentToSigma:
    @classmethod
    def INPUT_TYPES(cls):
        actual = {"default": False, "tooltip": "Answer the first and last sigma instead of the values for intervals."}
        return {
            "required": {
                "model": ("MODEL", {}),
                "sampling_percent": number(0.0, 0.0, 1.0, 0.0001),
                "return_actual_sigma": ("BOOLEAN", actual),
            }
        }

    RETURN_TYPES = ("FLOAT",)
    RETURN_NAMES = ("sigma_value",)
    CATEGORY = SIGMAS
    FUNCTION = "get_sigma"

    def get_sigma(self, model: Any, sampling_percent: float, return_actual_sigma: bool):
        sampling = sampling_of(model)
        if return_actual_sigma and sampling_percent in (0.0, 1.0):
            return ((sampling.sigma_max if sampling_percent == 0.0 else sampling.sigma_min).item(),)
        return (sampling.percent_to_sigma(sampling_percent),)


NODE_CLASSES = (
    BasicScheduler,
    KarrasScheduler,
    ExponentialScheduler,
    PolyexponentialScheduler,
    LaplaceScheduler,
    VPScheduler,
    BetaSamplingScheduler,
    SDTurboScheduler,
    SplitSigmas,
    SplitSigmasDenoise,
    FlipSigmas,
    SetFirstSigma,
    ExtendIntermediateSigmas,
    SamplingPercentToSigma,
)
