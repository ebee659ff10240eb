"""Nodes that choose a sampler and its options."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_nodes.fields import number, whole
from comfy_nodes.sigmas import precise, sampling_of

SAMPLERS = "sampling/custom_sampling/samplers"
NOISE_DEVICE = (["gpu", "cpu"],)


def eta(high: float = 100.0):
    return precise(1.0, high)


def on_device(name: str, noise_device: str) -> str:
    """The variant of a sampler that draws its noise where it is asked to."""
    return name if noise_device == "cpu" else name + "_gpu"


class KSamplerSelect:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler_name": (comfy.samplers.SAMPLER_NAMES,)}}

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, sampler_name: str):
        return (comfy.samplers.sampler_object(sampler_name),)


class SamplerDPMPP_3M_SDE:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"eta": eta(), "s_noise": eta(), "noise_device": NOISE_DEVICE}}

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, eta: float, s_noise: float, noise_device: str):
        return (comfy.samplers.ksampler(on_device("dpmpp_3m_sde", noise_device), {"eta": eta, "s_noise": s_noise}),)


class SamplerDPMPP_2M_SDE:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "solver_type": (["midpoint", "heun"],),
                "eta": eta(),
                "s_noise": eta(),
                "noise_device": NOISE_DEVICE,
            }
        }

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, solver_type: str, eta: float, s_noise: float, noise_device: str):
        options = {"eta": eta, "s_noise": s_noise, "solver_type": solver_type}
        return (comfy.samplers.ksampler(on_device("dpmpp_2m_sde", noise_device), options),)


class SamplerDPMPP_SDE:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"eta": eta(), "s_noise": eta(), "r": precise(0.5, 100.0), "noise_device": NOISE_DEVICE}}

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, eta: float, s_noise: float, r: float, noise_device: str):
        options = {"eta": eta, "s_noise": s_noise, "r": r}
        return (comfy.samplers.ksampler(on_device("dpmpp_sde", noise_device), options),)


class _EtaSampler:
    """Samplers whose only options are `eta` and `s_noise`."""

    SAMPLER = ""
    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"eta": eta(), "s_noise": eta()}}

    def get_sampler(self, eta: float, s_noise: float):
        return (comfy.samplers.ksampler(self.SAMPLER, {"eta": eta, "s_noise": s_noise}),)


class SamplerDPMPP_2S_Ancestral(_EtaSampler):
    SAMPLER = "dpmpp_2s_ancestral"


class SamplerEulerAncestral(_EtaSampler):
    SAMPLER = "euler_ancestral"


class SamplerEulerAncestralCFGPP(_EtaSampler):
    SAMPLER = "euler_ancestral_cfg_pp"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"eta": eta(1.0), "s_noise": eta(10.0)}}


class SamplerLMS:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"order": whole(4, 1, 100)}}

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, order: int):
        return (comfy.samplers.ksampler("lms", {"order": order}),)


class SamplerDPMAdaptative:
    @classmethod
    def INPUT_TYPES(cls):
        defaults = {
            "rtol": 0.05,
            "atol": 0.0078,
            "h_init": 0.05,
            "pcoeff": 0.0,
            "icoeff": 1.0,
            "dcoeff": 0.0,
            "accept_safety": 0.81,
            "eta": 0.0,
            "s_noise": 1.0,
        }
        return {
            "required": {
                "order": whole(3, 2, 3),
                **{name: precise(default, 100.0) for name, default in defaults.items()},
            }
        }

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, order: int, **tolerances: float):
        return (comfy.samplers.ksampler("dpm_adaptive", {"order": order, **tolerances}),)


class SamplerER_SDE:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "solver_type": ("COMBO", {"options": ["ER-SDE", "Reverse-time SDE", "ODE"]}),
                "max_stage": whole(3, 1, 3),
                "eta": precise(1.0, 100.0),
                "s_noise": precise(1.0, 100.0),
            }
        }

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(self, solver_type: str, max_stage: int, eta: float, s_noise: float):
        """`eta` is the strength of the noise of the reverse-time SDE; without noise both are the ODE."""
        if solver_type == "ODE" or (solver_type == "Reverse-time SDE" and eta == 0):
            eta = s_noise = 0
        scaler = None if solver_type == "ER-SDE" else lambda sigma: sigma ** (eta + 1)
        options = {"s_noise": s_noise, "noise_scaler": scaler, "max_stage": max_stage}
        return (comfy.samplers.ksampler("er_sde", options),)


class SamplerSASolver:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {}),
                "eta": precise(1.0, 10.0),
                "sde_start_percent": number(0.2, 0.0, 1.0, 0.001),
                "sde_end_percent": number(0.8, 0.0, 1.0, 0.001),
                "s_noise": precise(1.0, 100.0),
                "predictor_order": whole(3, 1, 6),
                "corrector_order": whole(4, 0, 6),
                "use_pece": ("BOOLEAN", {}),
                "simple_order_2": ("BOOLEAN", {}),
            }
        }

    RETURN_TYPES = ("SAMPLER",)
    CATEGORY = SAMPLERS
    FUNCTION = "get_sampler"

    def get_sampler(
        self,
        model: Any,
        eta: float,
        sde_start_percent: float,
        sde_end_percent: float,
        s_noise: float,
        predictor_order: int,
        corrector_order: int,
        use_pece: bool,
        simple_order_2: bool,
    ):
        """Noise is drawn only between the two points of the schedule."""
        import comfy.k_diffusion.sa_solver

        sampling = sampling_of(model)
        interval = [sampling.percent_to_sigma(percent) for percent in (sde_start_percent, sde_end_percent)]
        options = {
            "tau_func": comfy.k_diffusion.sa_solver.get_tau_interval_func(*interval, eta=eta),
            "s_noise": s_noise,
            "predictor_order": predictor_order,
            "corrector_order": corrector_order,
            "use_pece": use_pece,
            "simple_order_2": simple_order_2,
        }
        return (comfy.samplers.ksampler("sa_solver", options),)


NODE_CLASSES = (
    KSamplerSelect,
    SamplerEulerAncestral,
    SamplerEulerAncestralCFGPP,
    SamplerLMS,
    SamplerDPMPP_3M_SDE,
    SamplerDPMPP_2M_SDE,
    SamplerDPMPP_SDE,
    SamplerDPMPP_2S_Ancestral,
    SamplerDPMAdaptative,
    SamplerER_SDE,
    SamplerSASolver,
)
