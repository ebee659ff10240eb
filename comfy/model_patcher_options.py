"""Setters of `model_options`: functions and patches that the sampler and the networks call."""

from __future__ import annotations

import inspect
import uuid
from typing import Any

import torch


def create_model_options_clone(orig_model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy whose nested dicts and lists are its own; functions, tensors and models are shared."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return list(value) if isinstance(value, list) else value

    return copied(orig_model_options)


def set_model_options_patch_replace(
    model_options: dict[str, Any],
    patch: Any,
    name: str,
    block_name: str,
    number: int,
    transformer_index: int | None = None,
) -> dict[str, Any]:
    """Register `patch` for a block in a copy-on-write fashion; returns the changed `model_options`."""
    options = model_options["transformer_options"] = dict(model_options.get("transformer_options", {}))
    replace = options["patches_replace"] = dict(options.get("patches_replace", {}))
    kind = replace[name] = dict(replace.get(name, {}))
    place = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
    kind[place] = patch
    return model_options


def _append(model_options: dict[str, Any], key: str, function: Any, disable_cfg1_optimization: bool) -> dict[str, Any]:
    model_options[key] = [*model_options.get(key, []), function]
    if disable_cfg1_optimization:
        model_options["disable_cfg1_optimization"] = True
    return model_options


def set_model_options_post_cfg_function(
    model_options: dict[str, Any], post_cfg_function: Any, disable_cfg1_optimization: bool = False
) -> dict[str, Any]:
    """Add a function that sees and may replace the guided prediction."""
    return _append(model_options, "sampler_post_cfg_function", post_cfg_function, disable_cfg1_optimization)


def set_model_options_pre_cfg_function(
    model_options: dict[str, Any], pre_cfg_function: Any, disable_cfg1_optimization: bool = False
) -> dict[str, Any]:
    """Add a function that sees and may replace the predictions before guidance."""
    return _append(model_options, "sampler_pre_cfg_function", pre_cfg_function, disable_cfg1_optimization)


class OptionsMixin:
    """`ModelPatcher.set_model_*`."""

    model_options: dict[str, Any]

    def set_model_sampler_cfg_function(
        self, sampler_cfg_function: Any, disable_cfg1_optimization: bool = False
    ) -> None:
        """Replace guidance: `f(args dict)`, or `f(cond, uncond, scale)` when it takes three arguments."""
        function = sampler_cfg_function
        if len(inspect.signature(sampler_cfg_function).parameters) == 3:

            def function(args: dict[str, Any]) -> Any:
                return sampler_cfg_function(args["cond"], args["uncond"], args["cond_scale"])

        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_sampler_post_cfg_function(
        self, post_cfg_function: Any, disable_cfg1_optimization: bool = False
    ) -> None:
        """See `set_model_options_post_cfg_function`."""
        set_model_options_post_cfg_function(self.model_options, post_cfg_function, disable_cfg1_optimization)

    def set_model_sampler_pre_cfg_function(
        self, pre_cfg_function: Any, disable_cfg1_optimization: bool = False
    ) -> None:
        """See `set_model_options_pre_cfg_function`."""
        set_model_options_pre_cfg_function(self.model_options, pre_cfg_function, disable_cfg1_optimization)

    def set_model_sampler_calc_cond_batch_function(self, sampler_calc_cond_batch_function: Any) -> None:
        """Replace the evaluation of all conditionings of a call."""
        self.model_options["sampler_calc_cond_batch_function"] = sampler_calc_cond_batch_function

    def set_model_unet_function_wrapper(self, unet_wrapper_function: Any) -> None:
        """Wrap the denoiser: `f(apply_model, {"input", "timestep", "c", "cond_or_uncond"})`; the last setter wins."""
        self.model_options["model_function_wrapper"] = unet_wrapper_function

    def set_model_denoise_mask_function(self, denoise_mask_function: Any) -> None:
        """Change the inpaint mask at each step."""
        self.model_options["denoise_mask_function"] = denoise_mask_function

    def set_model_patch(self, patch: Any, name: str) -> None:
        """Add a function to the patches of any name."""
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_patch_replace(
        self, patch: Any, name: str, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        """Replace a block or an attention."""
        set_model_options_patch_replace(self.model_options, patch, name, block_name, number, transformer_index)

    def set_model_attn1_patch(self, patch: Any) -> None:
        """Change q, k, v of self-attention."""
        self.set_model_patch(patch, "attn1_patch")

    def set_model_attn2_patch(self, patch: Any) -> None:
        """Change q, k, v of cross-attention."""
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn1_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        """Replace a self-attention."""
        self.set_model_patch_replace(patch, "attn1", block_name, number, transformer_index)

    def set_model_attn2_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        """Replace a cross-attention."""
        self.set_model_patch_replace(patch, "attn2", block_name, number, transformer_index)

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        """Change the output of self-attention."""
        self.set_model_patch(patch, "attn1_output_patch")

    def set_model_attn2_output_patch(self, patch: Any) -> None:
        """Change the output of cross-attention."""
        self.set_model_patch(patch, "attn2_output_patch")

    def set_model_input_block_patch(self, patch: Any) -> None:
        """Change what a UNet's input blocks return."""
        self.set_model_patch(patch, "input_block_patch")

    def set_model_input_block_patch_after_skip(self, patch: Any) -> None:
        """Change it after the skip connection was taken."""
        self.set_model_patch(patch, "input_block_patch_after_skip")

    def set_model_output_block_patch(self, patch: Any) -> None:
        """Change what a UNet's output blocks take."""
        self.set_model_patch(patch, "output_block_patch")

    def set_model_emb_patch(self, patch: Any) -> None:
        """Change a UNet's time embedding."""
        self.set_model_patch(patch, "emb_patch")

    def set_model_forward_timestep_embed_patch(self, patch: Any) -> None:
        """Add a layer kind to a UNet's blocks."""
        self.set_model_patch(patch, "forward_timestep_embed_patch")

    def set_model_double_block_patch(self, patch: Any) -> None:
        """Run after each double block of a DiT."""
        self.set_model_patch(patch, "double_block")

    def set_model_post_input_patch(self, patch: Any) -> None:
        """Run after a DiT's input layers."""
        self.set_model_patch(patch, "post_input")

    def set_model_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype`; weights are cast at use."""
        self.add_object_patch("manual_cast_dtype", dtype)  # type: ignore[attr-defined]
        if dtype is not None:
            self.force_cast_weights = True
            self.patches_uuid = uuid.uuid4()
