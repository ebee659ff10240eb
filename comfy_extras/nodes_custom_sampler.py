"""Sampling put together from parts: noise, guider, sampler, sigmas."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
from comfy_nodes import sampler_choice, sigmas
from comfy_nodes.fields import guidance_scale, seed
from comfy_nodes.sampling import check_latent
from comfy_nodes.sigmas import BasicScheduler, FlipSigmas, SplitSigmas, SplitSigmasDenoise  # noqa: F401 - packs

SAMPLING = "sampling/custom_sampling"
GUIDERS = SAMPLING + "/guiders"
NOISE = SAMPLING + "/noise"

Latent = dict[str, Any]


# ---- noise ---------------------------------------------------------------------------------------------------------


class Noise_EmptyNoise:
    """No noise at all."""

    def __init__(self) -> None:
        self.seed = 0

    def generate_noise(self, input_latent: Latent) -> torch.Tensor:
        """Zeros of the latent's shape [B, C, h, w], on the CPU."""
        samples = input_latent["samples"]
        return torch.zeros(samples.shape, dtype=samples.dtype, layout=samples.layout, device="cpu")


class Noise_RandomNoise:
    """Noise of a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, input_latent: Latent) -> torch.Tensor:
        """Noise of the latent's shape [B, C, h, w], on the CPU; `batch_index` chooses which of a batch's."""
        return comfy.sample.prepare_noise(input_latent["samples"], self.seed, input_latent.get("batch_index"))


class DisableNoise:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES = ("NOISE",)
    FUNCTION = "get_noise"
    CATEGORY = NOISE

    def get_noise(self):
        return (Noise_EmptyNoise(),)


class RandomNoise(DisableNoise):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"noise_seed": seed()}}

    def get_noise(self, noise_seed: int):
        return (Noise_RandomNoise(noise_seed),)


class AddNoise:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "noise": ("NOISE",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "add_noise"
    CATEGORY = "_for_testing/custom_sampling/noise"

    def add_noise(self, model: Any, noise: Any, sigmas: torch.Tensor, latent_image: Latent):
        """The latent with the noise of |first sigma - last sigma| (one sigma: of that one)."""
        if len(sigmas) == 0:
            return (latent_image,)
        samples = latent_image["samples"]
        strength = torch.abs(sigmas[0] - sigmas[-1]) if len(sigmas) > 1 else sigmas[0]
        drawn = noise.generate_noise(latent_image)
        if torch.count_nonzero(samples) > 0:
            samples = model.get_model_object("process_latent_in")(samples)
        noisy = model.get_model_object("model_sampling").noise_scaling(strength, drawn, samples)
        noisy = model.get_model_object("process_latent_out")(noisy)
        return ({**latent_image, "samples": torch.nan_to_num(noisy, nan=0.0, posinf=0.0, neginf=0.0)},)


# ---- guiders -------------------------------------------------------------------------------------------------------


class Guider_Basic(comfy.samplers.CFGGuider):
    """One conditioning, no guidance."""

    def set_conds(self, positive: Any) -> None:
        self.inner_set_conds({"positive": positive})


class BasicGuider:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}}

    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"
    CATEGORY = GUIDERS

    def get_guider(self, model: Any, conditioning: Any):
        guider = Guider_Basic(model)
        guider.set_conds(conditioning)
        return (guider,)


class CFGGuider:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "cfg": guidance_scale(),
            }
        }

    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"
    CATEGORY = GUIDERS

    def get_guider(self, model: Any, positive: Any, negative: Any, cfg: float):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return (guider,)


class Guider_DualCFG(comfy.samplers.CFGGuider):
    """Two conditionings with a scale each: regular adds both guidances, nested guides the guided result again."""

    def set_cfg(self, cfg1: float, cfg2: float, nested: bool = False) -> None:
        self.cfg1 = cfg1
        self.cfg2 = cfg2
        self.nested = nested

    def set_conds(self, positive: Any, middle: Any, negative: Any) -> None:
        middle = node_helpers.conditioning_set_values(middle, {"prompt_type": "negative"})
        self.inner_set_conds({"positive": positive, "middle": middle, "negative": negative})

    def predict_noise(self, x: torch.Tensor, timestep: Any, model_options: Any = None, seed: int | None = None):
        options = model_options or {}
        conds = {name: self.conds.get(name) for name in ("negative", "middle", "positive")}
        may_skip = not self.nested and not options.get("disable_cfg1_optimization", False)
        # a scale of 1 leaves the other prediction without weight
        if may_skip and math.isclose(self.cfg2, 1.0):
            conds["negative"] = None
            if math.isclose(self.cfg1, 1.0):
                conds["middle"] = None
        negative, middle, positive = comfy.samplers.calc_cond_batch(
            self.inner_model, list(conds.values()), x, timestep, options
        )
        if self.nested:
            guided = comfy.samplers.cfg_function(
                self.inner_model,
                positive,
                middle,
                self.cfg1,
                x,
                timestep,
                model_options=options,
                cond=conds["positive"],
                uncond=conds["middle"],
            )
            return negative + self.cfg2 * (guided - negative)
        guided = comfy.samplers.cfg_function(
            self.inner_model,
            middle,
            negative,
            self.cfg2,
            x,
            timestep,
            model_options=options,
            cond=conds["middle"],
            uncond=conds["negative"],
        )
        return guided + (positive - middle) * self.cfg1


class DualCFGGuider:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "cond1": ("CONDITIONING",),
                "cond2": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "cfg_conds": guidance_scale(),
                "cfg_cond2_negative": guidance_scale(),
                "style": (["regular", "nested"],),
            }
        }

    RETURN_TYPES = ("GUIDER",)
    FUNCTION = "get_guider"
    CATEGORY = GUIDERS

    def get_guider(
        self, model: Any, cond1: Any, cond2: Any, negative: Any, cfg_conds: float, cfg_cond2_negative: float, style: str
    ):
        guider = Guider_DualCFG(model)
        guider.set_conds(cond1, cond2, negative)
        guider.set_cfg(cfg_conds, cfg_cond2_negative, nested=style == "nested")
        return (guider,)


# ---- sampling ------------------------------------------------------------------------------------------------------


def _both_outputs(latent: Latent, samples: torch.Tensor, x0_output: dict[str, Any], model: Any):
    """The sampled latent, and the one with the last prediction of the denoised picture."""
    result = {**latent, "samples": samples}
    if "x0" not in x0_output:
        return (result, result)
    return (result, {**latent, "samples": model.process_latent_out(x0_output["x0"].cpu())})


class SamplerCustom:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "add_noise": ("BOOLEAN", {"default": True}),
                "noise_seed": seed(),
                "cfg": guidance_scale(),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "sampler": ("SAMPLER",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
            }
        }

    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    FUNCTION = "sample"
    CATEGORY = SAMPLING

    def sample(
        self,
        model: Any,
        add_noise: bool,
        noise_seed: int,
        cfg: float,
        positive: Any,
        negative: Any,
        sampler: Any,
        sigmas: torch.Tensor,
        latent_image: Latent,
    ):
        latent = {**latent_image, "samples": check_latent(model, latent_image)}
        noise = Noise_RandomNoise(noise_seed) if add_noise else Noise_EmptyNoise()
        x0_output: dict[str, Any] = {}
        samples = comfy.sample.sample_custom(
            model,
            noise.generate_noise(latent),
            cfg,
            sampler,
            sigmas,
            positive,
            negative,
            latent["samples"],
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, sigmas.shape[-1] - 1, x0_output),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=noise_seed,
        )
        return _both_outputs(latent, samples, x0_output, model.model)


class SamplerCustomAdvanced:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "noise": ("NOISE",),
                "guider": ("GUIDER",),
                "sampler": ("SAMPLER",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
            }
        }

    RETURN_TYPES = ("LATENT", "LATENT")
    RETURN_NAMES = ("output", "denoised_output")
    FUNCTION = "sample"
    CATEGORY = SAMPLING

    def sample(self, noise: Any, guider: Any, sampler: Any, sigmas: torch.Tensor, latent_image: Latent):
        patcher = guider.model_patcher
        latent = {**latent_image, "samples": check_latent(patcher, latent_image)}
        x0_output: dict[str, Any] = {}
        samples = guider.sample(
            noise.generate_noise(latent),
            latent["samples"],
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(patcher, sigmas.shape[-1] - 1, x0_output),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=noise.seed,
        )
        return _both_outputs(latent, samples.to(comfy.model_management.intermediate_device()), x0_output, patcher.model)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        SamplerCustom,
        *sigmas.NODE_CLASSES,
        *sampler_choice.NODE_CLASSES,
        CFGGuider,
        DualCFGGuider,
        BasicGuider,
        RandomNoise,
        DisableNoise,
        AddNoise,
        SamplerCustomAdvanced,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {"SamplerEulerAncestralCFGPP": "SamplerEulerAncestralCFG++"}
