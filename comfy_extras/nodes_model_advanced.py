"""Nodes that change how a model's noise levels and predictions are read."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_sampling
import node_helpers
from comfy_nodes.fields import number, pixels

SIGMA_DATA = 0.5


class LCM(comfy.model_sampling.EPS):
    """Consistency models: the prediction blended with the input so that it is exact at sigma 0 (arXiv 2310.04378)."""

    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor):
        shape = sigma.shape[:1] + (1,) * (model_output.ndim - 1)
        scaled = self.timestep(sigma).view(shape) * 10.0
        x0 = model_input - model_output * sigma.view(shape)
        spread = scaled**2 + SIGMA_DATA**2
        return x0 * scaled / spread**0.5 + model_input * SIGMA_DATA**2 / spread


class ModelSamplingDiscreteDistilled(comfy.model_sampling.ModelSamplingDiscrete):
    """The schedule of a model distilled on every 20th of its teacher's timesteps."""

    original_timesteps = 50

    def __init__(self, model_config: Any = None, zsnr: bool | None = None) -> None:
        super().__init__(model_config, zsnr=zsnr)
        self.skip_steps = self.num_timesteps // self.original_timesteps
        kept = torch.arange(self.original_timesteps)
        self.set_sigmas(self.sigmas[self.num_timesteps - 1 - kept.flip(0) * self.skip_steps])

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        nearest = (sigma.log() - self.log_sigmas.to(sigma.device)[:, None]).abs().argmin(dim=0)
        return (nearest.view(sigma.shape) * self.skip_steps + (self.skip_steps - 1)).to(sigma.device)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        position = ((timestep.float().to(self.log_sigmas.device) - (self.skip_steps - 1)) / self.skip_steps).clamp(
            0, len(self.sigmas) - 1
        )
        below = position.floor().long()
        share = position.frac()
        logs = (1 - share) * self.log_sigmas[below] + share * self.log_sigmas[position.ceil().long()]
        return logs.exp().to(timestep.device)


def with_sampling(model: Any, schedule: type, prediction: type, zsnr: bool | None = None, **parameters: Any) -> Any:
    """A clone of a model whose noise schedule and prediction type are replaced."""
    model = model.clone()
    combined = type("ModelSamplingAdvanced", (schedule, prediction), {})
    config = model.model.model_config
    sampling = combined(config) if zsnr is None else combined(config, zsnr=zsnr)
    if parameters:
        sampling.set_parameters(**parameters)
    model.add_object_patch("model_sampling", sampling)
    return model


class ModelSamplingDiscrete:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "sampling": (["eps", "v_prediction", "lcm", "x0", "img_to_img"],),
                "zsnr": ("BOOLEAN", {"default": False}),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, sampling: str, zsnr: bool):
        schedule = comfy.model_sampling.ModelSamplingDiscrete
        if sampling == "lcm":
            schedule, prediction = ModelSamplingDiscreteDistilled, LCM
        else:
            name = {"eps": "EPS", "v_prediction": "V_PREDICTION", "x0": "X0", "img_to_img": "IMG_TO_IMG"}[sampling]
            prediction = getattr(comfy.model_sampling, name)
        return (with_sampling(model, schedule, prediction, zsnr=zsnr),)


class ModelSamplingStableCascade:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "shift": number(2.0, 0.0, 100.0, 0.01)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, shift: float):
        kinds = comfy.model_sampling
        return (with_sampling(model, kinds.StableCascadeSampling, kinds.EPS, shift=shift),)


class ModelSamplingSD3:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "shift": number(3.0, 0.0, 100.0, 0.01)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, shift: float, multiplier: float = 1000):
        kinds = comfy.model_sampling
        return (with_sampling(model, kinds.ModelSamplingDiscreteFlow, kinds.CONST, shift=shift, multiplier=multiplier),)


class ModelSamplingAuraFlow(ModelSamplingSD3):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "shift": number(1.73, 0.0, 100.0, 0.01)}}

    FUNCTION = "patch_aura"

    def patch_aura(self, model: Any, shift: float):
        return self.patch(model, shift, multiplier=1.0)


def flux_shift(width: int, height: int, max_shift: float, base_shift: float) -> float:
    """Shift for a picture of this size: `base_shift` at 256 tokens, `max_shift` at 4096, linear between and beyond."""
    tokens = width * height / (8 * 8 * 2 * 2)
    slope = (max_shift - base_shift) / (4096 - 256)
    return tokens * slope + base_shift - slope * 256


class ModelSamplingFlux:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "max_shift": number(1.15, 0.0, 100.0, 0.01),
                "base_shift": number(0.5, 0.0, 100.0, 0.01),
                "width": pixels(1024, 16),
                "height": pixels(1024, 16),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, max_shift: float, base_shift: float, width: int, height: int):
        kinds = comfy.model_sampling
        shift = flux_shift(width, height, max_shift, base_shift)
        return (with_sampling(model, kinds.ModelSamplingFlux, kinds.CONST, shift=shift),)


class ModelSamplingContinuousEDM:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "sampling": (["v_prediction", "edm", "edm_playground_v2.5", "eps", "cosmos_rflow"],),
                "sigma_max": number(120.0, 0.0, 1000.0, 0.001, round=False),
                "sigma_min": number(0.002, 0.0, 1000.0, 0.001, round=False),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, sampling: str, sigma_max: float, sigma_min: float):
        kinds = comfy.model_sampling
        schedule = kinds.ModelSamplingContinuousEDM
        sigma_data = SIGMA_DATA if sampling.startswith("edm") else 1.0
        if sampling == "cosmos_rflow":
            schedule, prediction = kinds.ModelSamplingCosmosRFlow, kinds.COSMOS_RFLOW
        else:
            names = {"eps": "EPS", "edm": "EDM", "edm_playground_v2.5": "EDM", "v_prediction": "V_PREDICTION"}
            prediction = getattr(kinds, names[sampling])
        changed = with_sampling(
            model, schedule, prediction, sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data
        )
        if sampling == "edm_playground_v2.5":
            from comfy.latent_formats import SDXL_Playground_2_5

            changed.add_object_patch("latent_format", SDXL_Playground_2_5())
        return (changed,)


class ModelSamplingContinuousV:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "sampling": (["v_prediction"],),
                "sigma_max": number(500.0, 0.0, 1000.0, 0.001, round=False),
                "sigma_min": number(0.03, 0.0, 1000.0, 0.001, round=False),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, sampling: str, sigma_max: float, sigma_min: float):
        kinds = comfy.model_sampling
        changed = with_sampling(
            model,
            kinds.ModelSamplingContinuousV,
            kinds.V_PREDICTION,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=1.0,
        )
        return (changed,)


def rescaled_guidance(arguments: dict[str, Any], multiplier: float) -> torch.Tensor:
    """Guidance brought back to the spread of the positive prediction, in v space (arXiv 2305.08891, section 3.4)."""
    cond, uncond, scale, x_in = (arguments[key] for key in ("cond", "uncond", "cond_scale", "input"))
    sigma = arguments["sigma"]
    sigma = sigma.view(sigma.shape[:1] + (1,) * (cond.ndim - 1))
    norm = sigma**2 + 1.0
    x = x_in / norm
    positive, negative = (((x - (x_in - part)) * norm**0.5) / sigma for part in (cond, uncond))
    guided = negative + scale * (positive - negative)
    per_sample = tuple(range(1, cond.ndim))
    rescaled = guided * (positive.std(dim=per_sample, keepdim=True) / guided.std(dim=per_sample, keepdim=True))
    final = multiplier * rescaled + (1.0 - multiplier) * guided
    return x_in - (x - final * sigma / norm**0.5)


class RescaleCFG:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "multiplier": number(0.7, 0.0, 1.0, 0.01)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/model"

    def patch(self, model: Any, multiplier: float):
        model = model.clone()
        model.set_model_sampler_cfg_function(lambda arguments: rescaled_guidance(arguments, multiplier))
        return (model,)


class ModelComputeDtype:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "dtype": (["default", "fp32", "fp16", "bf16"],)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "advanced/debug/model"

    def patch(self, model: Any, dtype: str):
        model = model.clone()
        model.set_model_compute_dtype(node_helpers.string_to_torch_dtype(dtype))
        return (model,)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        ModelSamplingDiscrete,
        ModelSamplingContinuousEDM,
        ModelSamplingContinuousV,
        ModelSamplingStableCascade,
        ModelSamplingSD3,
        ModelSamplingAuraFlow,
        ModelSamplingFlux,
        RescaleCFG,
        ModelComputeDtype,
    )
}
