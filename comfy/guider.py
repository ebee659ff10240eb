"""Guidance: several conditioned predictions become one, and a guider runs a sampler with them.

`comfy.samplers` re-exports these names, and everything here calls its neighbours through that module, so that custom
nodes can replace them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
from comfy.patcher_extension import WrapperExecutor, WrappersMP


def _samplers() -> Any:
    import comfy.samplers

    return comfy.samplers


def cfg_function(
    model: Any,
    cond_pred: torch.Tensor,
    uncond_pred: torch.Tensor,
    cond_scale: float,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    cond: Any = None,
    uncond: Any = None,
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale (cond - uncond), then the post-cfg functions.

    Predictions and `x` are [B, C, ...]. A `sampler_cfg_function` sees and returns noise (x - prediction).
    """
    options = {} if model_options is None else model_options
    shared = {
        "cond_scale": cond_scale, "sigma": timestep, "input": x, "model": model, "model_options": options,
        "cond_denoised": cond_pred, "uncond_denoised": uncond_pred,
    }  # fmt: skip
    if "sampler_cfg_function" in options:
        args = {**shared, "cond": x - cond_pred, "uncond": x - uncond_pred, "timestep": timestep}
        result = x - options["sampler_cfg_function"](args)
    else:
        result = uncond_pred + (cond_pred - uncond_pred) * cond_scale
    for function in options.get("sampler_post_cfg_function", ()):
        result = function({**shared, "denoised": result, "cond": cond, "uncond": uncond})
    return result


def sampling_function(
    model: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    uncond: Any,
    cond: Any,
    cond_scale: float,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """The guided prediction for x [B, C, ...] at sigma `timestep` [B]. At scale 1 the negative pass is skipped."""
    options = {} if model_options is None else model_options
    needless = math.isclose(cond_scale, 1.0) and not options.get("disable_cfg1_optimization", False)
    uncond_ = None if needless else uncond
    conds = [cond, uncond_]
    shared = {"sigma": timestep, "input": x, "model": model, "model_options": options}
    if "sampler_calc_cond_batch_function" in options:
        out = options["sampler_calc_cond_batch_function"]({**shared, "conds": conds})
    else:
        out = _samplers().calc_cond_batch(model, conds, x, timestep, options)
    for function in options.get("sampler_pre_cfg_function", ()):
        args = {**shared, "conds": conds, "conds_out": out, "cond_scale": cond_scale, "timestep": timestep}
        out = function(args)
    return _samplers().cfg_function(
        model, out[0], out[1], cond_scale, x, timestep, model_options=options, cond=cond, uncond=uncond_
    )


def _wrapped(kind: str, function: Callable[..., Any], owner: Any, options: dict[str, Any]) -> WrapperExecutor:
    wrappers = comfy.patcher_extension.get_all_wrappers(kind, options, is_model_options=True)
    return WrapperExecutor.new_class_executor(function, owner, wrappers)


class CFGGuider:
    """Runs a sampler on a model with a positive and a negative conditioning.

    Subclasses override `set_conds` and `predict_noise`. While sampling, `inner_model` is the loaded model, `conds` the
    processed conditionings, and the guider itself is the function that solvers call.
    """

    inner_model: Any  # these three exist while sampling
    conds: dict[str, Any]
    loaded_models: list[Any]

    def __init__(self, model_patcher: Any) -> None:
        self.model_patcher = model_patcher
        self.model_options = model_patcher.model_options
        self.original_conds: dict[str, list[dict[str, Any]]] = {}
        self.cfg = 1.0

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Set both conditionings, as nodes pass them."""
        self.inner_set_conds({"positive": positive, "negative": negative})

    def set_cfg(self, cfg: float) -> None:
        """Set the guidance scale."""
        self.cfg = cfg

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        """Set conditionings of any names."""
        for name in conds:
            self.original_conds[name] = comfy.sampler_helpers.convert_cond(conds[name])

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What solvers call: (x [B, C, ...], sigma [B], model_options=, seed=) -> prediction."""
        return self.outer_predict_noise(*args, **kwargs)

    def outer_predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """`predict_noise` inside its wrappers."""
        options = {} if model_options is None else model_options
        executor = _wrapped(WrappersMP.PREDICT_NOISE, self.predict_noise, self, self.model_options)
        return executor.execute(x, timestep, options, seed)

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006 (subclasses repeat this signature)
        seed: int | None = None,
    ) -> torch.Tensor:
        """The guided prediction (of the denoised latent, despite the name)."""
        return _samplers().sampling_function(
            self.inner_model, x, timestep, self.conds.get("negative"), self.conds.get("positive"), self.cfg,
            model_options=model_options, seed=seed,
        )  # fmt: skip

    def inner_sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, device: torch.device, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None, callback: Callable[..., None] | None, disable_pbar: bool, seed: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Sample with the loaded model; tensors are on `device`, latents in the file's scale."""
        # A latent of zeros is "nothing there", not grey: it keeps its value.
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = self.inner_model.process_latent_in(latent_image)
        self.conds = _samplers().process_conds(
            self.inner_model, noise, self.conds, device, latent_image, denoise_mask, seed
        )
        options = comfy.model_patcher.create_model_options_clone(self.model_options)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        extra_args = {"model_options": options, "seed": seed}
        executor = _wrapped(WrappersMP.SAMPLER_SAMPLE, sampler.sample, sampler, options)
        samples = executor.execute(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
        return self.inner_model.process_latent_out(samples.to(torch.float32))

    def outer_sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None, callback: Callable[..., None] | None = None,
        disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Load the models, sample, and let go of them."""
        helpers = comfy.sampler_helpers
        self.inner_model, self.conds, self.loaded_models = helpers.prepare_sampling(
            self.model_patcher, noise.shape, self.conds, self.model_options
        )
        device = self.model_patcher.load_device
        if denoise_mask is not None:
            denoise_mask = helpers.prepare_mask(denoise_mask, noise.shape, device)
        noise, latent_image, sigmas = noise.to(device), latent_image.to(device), sigmas.to(device)
        helpers.cast_to_load_options(self.model_options, device=device, dtype=self.model_patcher.model_dtype())
        try:
            self.model_patcher.pre_run()
            samples = self.inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
            )
            comfy.model_management.check_weight_files([self.model_patcher, *self.loaded_models])
            return samples
        finally:
            self.model_patcher.cleanup()
            helpers.cleanup_models(self.conds, self.loaded_models)
            del self.inner_model
            del self.loaded_models

    def sample(
        self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None = None, callback: Callable[..., None] | None = None,
        disable_pbar: bool = False, seed: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Sample `latent_image` [B, C, ...] with unit `noise` of the same shape along `sigmas` [n + 1].

        An empty schedule returns the latent unchanged. The result is float32 on the model's device.
        """
        if sigmas.shape[-1] == 0:
            return latent_image
        helpers = comfy.sampler_helpers
        patcher = self.model_patcher
        self.conds = {name: [dict(cond) for cond in conds] for name, conds in self.original_conds.items()}
        helpers.preprocess_conds_hooks(self.conds)
        model_options, hook_mode = self.model_options, patcher.hook_mode
        try:
            self.model_options = comfy.model_patcher.create_model_options_clone(model_options)
            # Weights of a single group never alternate, so keeping them would only cost memory.
            if helpers.get_total_hook_groups_in_conds(self.conds) <= 1:
                patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
            helpers.prepare_model_patcher(patcher, self.conds, self.model_options)
            helpers.filter_registered_hooks_on_conds(self.conds, self.model_options)
            executor = _wrapped(WrappersMP.OUTER_SAMPLE, self.outer_sample, self, self.model_options)
            return executor.execute(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        finally:
            helpers.cast_to_load_options(self.model_options, device=patcher.offload_device)
            self.model_options = model_options
            patcher.hook_mode = hook_mode
            patcher.restore_hook_patches()
            del self.conds


def sample(
    model: Any, noise: torch.Tensor, positive: Any, negative: Any, cfg: float, device: torch.device, sampler: Any,
    sigmas: torch.Tensor, model_options: dict[str, Any] | None = None, latent_image: Any = None,
    denoise_mask: torch.Tensor | None = None, callback: Callable[..., None] | None = None, disable_pbar: bool = False,
    seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sample with a plain `CFGGuider`; `device` and `model_options` are ComfyUI's, the patcher has its own."""
    guider = _samplers().CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider.sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
