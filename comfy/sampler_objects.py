"""What samples: `KSAMPLER` wraps a solver with initial noise, inpainting and progress.

`comfy.samplers` re-exports these names; solvers are looked up there when they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class KSamplerX0Inpaint:
    """The model as solvers see it: denoises, and keeps what a mask protects.

    Outside the mask (0), x is replaced by the original noised to the current sigma before each call, and the
    prediction by the original after it.
    """

    def __init__(self, model: Any, sigmas: torch.Tensor) -> None:
        self.inner_model = model
        self.sigmas = sigmas
        self.noise: Any = None
        self.latent_image: Any = None

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The denoised prediction for x [B, C, ...] at sigma [B]; `denoise_mask` is 1 where to repaint."""
        model_options = {} if model_options is None else model_options
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if "denoise_mask_function" in model_options:
            extra = {"model": self.inner_model, "sigmas": self.sigmas}
            denoise_mask = model_options["denoise_mask_function"](sigma, denoise_mask, extra_options=extra)
        kept = 1.0 - denoise_mask
        original = self.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
        )
        out = self.inner_model(x * denoise_mask + original * kept, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * kept


class Sampler:
    """Base of samplers: `sample(model_wrap, sigmas, extra_args, callback, noise, ...)` returns a latent."""

    def sample(self) -> Any:
        """Subclasses sample here."""
        raise NotImplementedError(f"{type(self).__name__} has no sample()")

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool:
        """Whether the first sigma is the highest the model knows, so that no trace of a latent is left."""
        highest = float(model_wrap.inner_model.model_sampling.sigma_max)
        first = float(sigmas[0])
        return first > highest or math.isclose(first, highest, rel_tol=1e-05)


class KSAMPLER(Sampler):
    """A solver `f(model, x, sigmas, extra_args=, callback=, disable=, **extra_options)`.

    inpaint_options: {"random": True} noises the protected part with noise of its own (seed + 1) at every call.
    """

    def __init__(
        self,
        sampler_function: Callable[..., torch.Tensor],
        extra_options: dict[str, Any] | None = None,
        inpaint_options: dict[str, Any] | None = None,
    ) -> None:
        self.sampler_function = sampler_function
        self.extra_options = {} if extra_options is None else extra_options
        self.inpaint_options = {} if inpaint_options is None else inpaint_options

    def sample(  # type: ignore[override]
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Denoise `noise` [B, C, ...] (unit variance) added to `latent_image` along `sigmas` [n + 1].

        `callback(step, denoised, x, total_steps)` is called at each step.
        """
        extra_args["denoise_mask"] = denoise_mask
        model = KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image = latent_image
        model.noise = noise
        if self.inpaint_options.get("random", False):
            generator = torch.manual_seed(extra_args.get("seed", 41) + 1)
            fresh = torch.randn(noise.shape, generator=generator, device="cpu")
            model.noise = fresh.to(device=noise.device, dtype=noise.dtype)
        model_sampling = model_wrap.inner_model.model_sampling
        x = model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))

        def report(step: dict[str, Any]) -> None:
            callback(step["i"], step["denoised"], step["x"], len(sigmas) - 1)  # type: ignore[misc]

        samples = self.sampler_function(
            model, x, sigmas, extra_args=extra_args, callback=None if callback is None else report,
            disable=disable_pbar, **self.extra_options,
        )  # fmt: skip
        return model_sampling.inverse_noise_scaling(sigmas[-1], samples)


def _positive_end(sigmas: torch.Tensor) -> torch.Tensor:
    """The last sigma above 0, for solvers in log sigma."""
    return sigmas[-2] if float(sigmas[-1]) == 0 else sigmas[-1]


def _dpm_fast(
    model: Any, noise: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any],
    callback: Callable[..., None] | None, disable: bool | None, **options: Any,
) -> torch.Tensor:  # fmt: skip
    import comfy.samplers

    if len(sigmas) <= 1:
        return noise
    return comfy.samplers.k_diffusion_sampling.sample_dpm_fast(
        model, noise, _positive_end(sigmas), sigmas[0], len(sigmas) - 1,
        extra_args=extra_args, callback=callback, disable=disable, **options,
    )  # fmt: skip


def _dpm_adaptive(
    model: Any, noise: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any],
    callback: Callable[..., None] | None, disable: bool | None, **options: Any,
) -> Any:  # fmt: skip
    import comfy.samplers

    if len(sigmas) <= 1:
        return noise
    return comfy.samplers.k_diffusion_sampling.sample_dpm_adaptive(
        model, noise, _positive_end(sigmas), sigmas[0],
        extra_args=extra_args, callback=callback, disable=disable, **options,
    )  # fmt: skip


def ksampler(
    sampler_name: str, extra_options: dict[str, Any] | None = None, inpaint_options: dict[str, Any] | None = None
) -> KSAMPLER:
    """The sampler around `comfy.k_diffusion.sampling.sample_<sampler_name>`."""
    import comfy.samplers

    by_range = {"dpm_fast": _dpm_fast, "dpm_adaptive": _dpm_adaptive}
    function = by_range.get(sampler_name)
    if function is None:
        function = getattr(comfy.samplers.k_diffusion_sampling, f"sample_{sampler_name}", None)
    if function is None:
        raise ValueError(
            f"no sampler {sampler_name!r}: comfy.k_diffusion.sampling has no sample_{sampler_name}; "
            f"choose one of {', '.join(comfy.samplers.SAMPLER_NAMES)}"
        )
    return KSAMPLER(function, extra_options, inpaint_options)


def sampler_object(name: str) -> KSAMPLER:
    """The sampler that the sampler nodes offer under `name`."""
    import comfy.samplers
    from comfy.extra_samplers import uni_pc

    if name == "uni_pc":
        return KSAMPLER(uni_pc.sample_unipc)
    if name == "uni_pc_bh2":
        return KSAMPLER(uni_pc.sample_unipc_bh2)
    if name == "ddim":
        return comfy.samplers.ksampler("euler", inpaint_options={"random": True})
    return comfy.samplers.ksampler(name)
