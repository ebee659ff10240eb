"""A control network with weights of its own (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import comfy.image_scaling
import comfy.model_management
import comfy.model_patcher
from comfy.ldm import dit

from .base import ControlBase, Residuals, StrengthType


class ControlNet(ControlBase):
    """A network that sees the noisy latent, the prompt and a hint.

    control_model: called with `x`, `hint`, `timesteps`, `context` and the conditionings named in `extra_conds`; has
    `dtype`. Where it has `takes_call`, it is also given `transformer_options` that carry the token plan, and shares its
    tokens with the other ranks.
    compression_ratio: hint pixels for each latent cell, or hint latent cells when `latent_format` is set, in which case
    hints are encoded by a VAE.
    """

    def __init__(
        self,
        control_model: Any = None,
        global_average_pooling: bool = False,
        compression_ratio: int = 8,
        latent_format: Any = None,
        load_device: Any = None,
        manual_cast_dtype: torch.dtype | None = None,
        extra_conds: Sequence[str] = ("y",),
        strength_type: StrengthType = StrengthType.CONSTANT,
        concat_mask: bool = False,
        preprocess_image: Any = None,
    ) -> None:
        super().__init__()
        self.control_model = control_model
        self.load_device = load_device
        self.control_model_wrapped: Any = None
        if control_model is not None:
            self.control_model_wrapped = comfy.model_patcher.ModelPatcher(
                control_model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device()
            )
        self.compression_ratio = compression_ratio
        self.global_average_pooling = global_average_pooling
        self.model_sampling_current: Any = None
        self.manual_cast_dtype = manual_cast_dtype
        self.latent_format = latent_format
        self.extra_conds += extra_conds
        self.strength_type = strength_type
        self.concat_mask = concat_mask
        self.preprocess_image = preprocess_image or self.preprocess_image
        self._hints: dict[tuple[int, int], torch.Tensor] = {}

    def set_cond_hint(self, *args: Any, **kwargs: Any) -> Any:
        """See `ControlBase.set_cond_hint`."""
        super().set_cond_hint(*args, **kwargs)
        if self.latent_format is not None and self.vae is None:
            logging.warning("this ControlNet needs a VAE: connect one to the node that applies it")
        return self

    def compute_dtype(self) -> torch.dtype:
        """The dtype of the network's inputs."""
        return self.control_model.dtype if self.manual_cast_dtype is None else self.manual_cast_dtype

    # --- hints -------------------------------------------------------------------------------------------------------

    def prepare_hint(self, x_noisy: torch.Tensor) -> None:
        """Resize, and encode where the network takes latents. Raises ValueError when it needs a VAE and has none.

        Hints of each size of a run are kept: areas of a picture have sizes of their own.
        """
        size = (x_noisy.shape[-2], x_noisy.shape[-1])
        if size not in self._hints:
            self._hints[size] = self._make_hint(*size).to(device=x_noisy.device, dtype=self.compute_dtype())
        self.cond_hint = self._hints[size]

    def _make_hint(self, rows: int, columns: int) -> torch.Tensor:
        ratio = self.compression_ratio
        if self.latent_format is not None:
            if self.vae is None:
                raise ValueError(
                    "this ControlNet takes latents and has no VAE to encode its picture; use Apply ControlNet and "
                    "connect the model's VAE"
                )
            ratio *= self.vae.spacial_compression_encode()
        upscale = comfy.image_scaling.common_upscale
        hint = upscale(self.cond_hint_original, columns * ratio, rows * ratio, self.upscale_algorithm, "center")
        hint = self.preprocess_image(hint)
        if self.latent_format is not None:
            loaded = comfy.model_management.loaded_models(only_currently_used=True)
            # a VAE for videos would take several pictures for the frames of one
            pictures = hint.movedim(1, -1).split(1 if self.latent_format.latent_dimensions == 3 else len(hint))
            latents = torch.cat([self.vae.encode(part) for part in pictures])
            hint = self.latent_format.process_in(latents)
            comfy.model_management.load_models_gpu(loaded)
        further = []
        for extra in self.extra_concat_orig:
            extra = upscale(extra.to(hint), hint.shape[-1], hint.shape[-2], self.upscale_algorithm, "center")
            if extra.ndim < hint.ndim:
                extra = extra.unsqueeze(2).expand(-1, -1, hint.shape[2], -1, -1)
            further.append(comfy.image_scaling.repeat_to_batch_size(extra, hint.shape[0]))
        return torch.cat([hint, *further], dim=1)

    # --- residuals ---------------------------------------------------------------------------------------------------

    def get_control(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], batched_number: int,
        transformer_options: Mapping[str, Any],
    ) -> Residuals | None:  # fmt: skip
        """See `ControlBase.get_control`."""
        before = self.previous_residuals(x_noisy, t, cond, batched_number, transformer_options)
        if not self.is_active(t):
            return before
        self.prepare_hint(x_noisy)
        dtype = self.compute_dtype()
        arguments = dict(self.extra_args)
        arguments |= {name: cond[name].to(dtype) for name in self.extra_conds if cond.get(name) is not None}
        if getattr(self.control_model, "takes_call", False):
            # the plan only: patches of the diffusion model's blocks are not for these
            arguments["transformer_options"] = dit.DenoiserCall(plan=dit.call_of(transformer_options).plan).within({})
        context = cond.get("crossattn_controlnet", cond["c_crossattn"])
        x = self.model_sampling_current.calculate_input(t, x_noisy)
        control = self.control_model(
            x=x.to(dtype),
            hint=self.hint_rows(self.cond_hint, x.shape[0], batched_number),
            timesteps=self.model_sampling_current.timestep(t).to(dtype),
            context=context.to(dtype),
            **arguments,
        )
        return self.control_merge(control, before, output_dtype=None)

    # --- the object --------------------------------------------------------------------------------------------------

    def copy(self) -> Any:
        """Another use of the same network."""
        other = type(self)(None, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        other.control_model = self.control_model
        other.control_model_wrapped = self.control_model_wrapped
        self.copy_to(other)
        return other

    def get_models(self) -> list[Any]:
        """Patchers of the chain's networks."""
        return [*super().get_models(), self.control_model_wrapped]

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """See `ControlBase.pre_run`."""
        super().pre_run(model, percent_to_timestep_function)
        self.model_sampling_current = model.model_sampling

    def cleanup(self) -> None:
        """See `ControlBase.cleanup`."""
        self.model_sampling_current = None
        self._hints = {}
        super().cleanup()
