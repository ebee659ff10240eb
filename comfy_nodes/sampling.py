"""KSampler and KSampler (Advanced)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_nodes.fields import guidance_scale, number, seed, whole


def check_latent(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a latent, fit for the model: an empty one is given its channels.

    Raises ValueError when a latent with content has another number of channels than the model works on.
    """
    import comfy.sample

    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    wanted = getattr(model.get_model_object("latent_format"), "latent_channels", None)
    if wanted is not None and samples.ndim >= 4 and samples.shape[1] != wanted:
        raise ValueError(
            f"latent_image has {samples.shape[1]} channels but this model works on {wanted}; it was made with the VAE "
            "of another model: encode the picture with the matching VAE"
        )
    return samples


def common_ksampler(
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    denoise: float = 1.0,
    disable_noise: bool = False,
    start_step: int | None = None,
    last_step: int | None = None,
    force_full_denoise: bool = False,
) -> tuple[dict[str, Any]]:
    """Denoise a latent: `({"samples": [B, C, h, w], ...},)` with the other keys of `latent` kept."""
    import comfy.sample
    import comfy.utils
    import latent_preview

    samples = check_latent(model, latent)
    if disable_noise:
        noise = torch.zeros(samples.size(), dtype=samples.dtype, layout=samples.layout, device="cpu")
    else:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    result = comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        samples,
        denoise=denoise,
        disable_noise=disable_noise,
        start_step=start_step,
        last_step=last_step,
        force_full_denoise=force_full_denoise,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return ({**latent, "samples": result},)


class KSampler:
    @classmethod
    def INPUT_TYPES(cls):
        import comfy.samplers

        sampler = comfy.samplers.KSampler
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that denoises."}),
                "seed": seed(),
                "steps": whole(20, 1, 10000, tooltip="Number of denoising steps."),
                "cfg": guidance_scale(),
                "sampler_name": (sampler.SAMPLERS, {"tooltip": "How a step is made from the model's prediction."}),
                "scheduler": (sampler.SCHEDULERS, {"tooltip": "How the noise decreases over the steps."}),
                "positive": ("CONDITIONING", {"tooltip": "What should be in the picture."}),
                "negative": ("CONDITIONING", {"tooltip": "What should not."}),
                "latent_image": ("LATENT", {"tooltip": "The latent to start from."}),
                "denoise": number(1.0, 0.0, 1.0, 0.01, tooltip="Below 1 the latent's structure is partly kept."),
            }
        }

    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    FUNCTION = "sample"
    CATEGORY = "sampling"
    DESCRIPTION = "Denoises the latent image with the model, guided by the positive and negative conditioning."

    def sample(self, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0):
        import nodes

        return nodes.common_ksampler(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )


class KSamplerAdvanced:
    @classmethod
    def INPUT_TYPES(cls):
        import comfy.samplers

        sampler = comfy.samplers.KSampler
        return {
            "required": {
                "model": ("MODEL",),
                "add_noise": (["enable", "disable"],),
                "noise_seed": seed(),
                "steps": whole(20, 1, 10000),
                "cfg": guidance_scale(),
                "sampler_name": (sampler.SAMPLERS,),
                "scheduler": (sampler.SCHEDULERS,),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "start_at_step": whole(0, 0, 10000),
                "end_at_step": whole(10000, 0, 10000),
                "return_with_leftover_noise": (["disable", "enable"],),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"
    CATEGORY = "sampling"

    def sample(
        self,
        model,
        add_noise,
        noise_seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        start_at_step,
        end_at_step,
        return_with_leftover_noise,
        denoise=1.0,
    ):
        import nodes

        return nodes.common_ksampler(
            model,
            noise_seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise != "enable",
        )


NODE_CLASS_MAPPINGS = {"KSampler": KSampler, "KSamplerAdvanced": KSamplerAdvanced}
NODE_DISPLAY_NAME_MAPPINGS = {"KSampler": "KSampler", "KSamplerAdvanced": "KSampler (Advanced)"}
