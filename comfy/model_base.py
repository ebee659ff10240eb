"""A diffusion network with its sampling type, latent format and conditioning: what samplers call."""

from __future__ import annotations

import enum
import importlib
import logging
import math
from typing import Any

import torch

import comfy.conds
import comfy.families
import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.utils


class ModelType(enum.Enum):
    """What a network predicts, and its noise schedule."""

    EPS = 1
    V_PREDICTION = 2
    V_PREDICTION_EDM = 3
    STABLE_CASCADE = 4
    EDM = 5
    FLOW = 6
    V_PREDICTION_CONTINUOUS = 7
    FLUX = 8
    IMG_TO_IMG = 9
    FLOW_COSMOS = 10


# (name of the prediction, name of the schedule) in comfy.model_sampling
_SAMPLING_PARTS = {
    ModelType.EPS: ("EPS", "ModelSamplingDiscrete"),
    ModelType.V_PREDICTION: ("V_PREDICTION", "ModelSamplingDiscrete"),
    ModelType.V_PREDICTION_EDM: ("V_PREDICTION", "ModelSamplingContinuousEDM"),
    ModelType.STABLE_CASCADE: ("EPS", "StableCascadeSampling"),
    ModelType.EDM: ("EDM", "ModelSamplingContinuousEDM"),
    ModelType.FLOW: ("CONST", "ModelSamplingDiscreteFlow"),
    ModelType.V_PREDICTION_CONTINUOUS: ("V_PREDICTION", "ModelSamplingContinuousV"),
    ModelType.FLUX: ("CONST", "ModelSamplingFlux"),
    ModelType.IMG_TO_IMG: ("IMG_TO_IMG", "ModelSamplingDiscrete"),
    ModelType.FLOW_COSMOS: ("COSMOS_RFLOW", "ModelSamplingCosmosRFlow"),
}


def model_sampling(model_config: Any, model_type: ModelType) -> Any:
    """The sampling object of a model type, with the model's settings."""
    prediction, schedule = (getattr(comfy.model_sampling, name) for name in _SAMPLING_PARTS[model_type])
    return type("ModelSampling", (schedule, prediction), {})(model_config)


def convert_tensor(extra: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """A conditioning tensor in the network's dtype; whole numbers stay as they are."""
    if extra.dtype not in (torch.int, torch.long):
        return extra.to(device=device, dtype=dtype)
    return extra if device is None else extra.to(device=device)


class BaseModel(torch.nn.Module):
    """Base of all model families."""

    def __init__(
        self,
        model_config: Any,
        model_type: ModelType = ModelType.EPS,
        device: torch.device | None = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__()
        self.latent_format = model_config.latent_format
        self.model_config = model_config
        self.manual_cast_dtype = model_config.manual_cast_dtype
        self.device = device
        self.current_patcher: Any = None
        self.network_runner: Any = None  # called instead of the network when an engine has a faster way
        unet_config = model_config.unet_config
        if not unet_config.get("disable_unet_model_creation", False):
            operations = model_config.custom_operations or comfy.ops.pick_operations(
                unet_config.get("dtype"),
                self.manual_cast_dtype,
                fp8_optimizations=model_config.optimizations.get("fp8", False),
                scaled_fp8=model_config.scaled_fp8,
            )
            self.diffusion_model = unet_model(**unet_config, device=device, operations=operations)
            self.diffusion_model.eval()
        self.model_type = model_type
        self.model_sampling = model_sampling(model_config, model_type)
        self.adm_channels = unet_config.get("adm_in_channels") or 0
        self.concat_keys: tuple[str, ...] = ()
        self.memory_usage_factor = model_config.memory_usage_factor
        self.memory_usage_factor_conds: tuple[str, ...] = ()

    # --- prediction ------------------------------------------------------------------------------------------------

    def apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the denoised latent of x [B, C, ...] at sigmas t [B]; returns fp32 [B, C, ...]."""
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._apply_model,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.APPLY_MODEL, transformer_options
            ),
        ).execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        sigma = t
        network_input = self.model_sampling.calculate_input(sigma, x)
        if c_concat is not None:
            network_input = torch.cat([network_input, c_concat.to(network_input)], dim=1)
        dtype = self.get_dtype_inference()
        network_input = network_input.to(dtype)
        timestep = self.model_sampling.timestep(t).float()
        context = None if c_crossattn is None else convert_tensor(c_crossattn, dtype, network_input.device)
        extra = {}
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                value = convert_tensor(value, dtype, network_input.device)
            elif isinstance(value, list):
                value = [convert_tensor(v, dtype, network_input.device) if torch.is_tensor(v) else v for v in value]
            extra[name] = value
        timestep = self.process_timestep(timestep, x=x, **extra)
        output = (self.network_runner or self.diffusion_model)(
            network_input, timestep, context=context, control=control, transformer_options=transformer_options, **extra
        ).float()
        return self.model_sampling.calculate_denoised(sigma, output, x)

    def process_timestep(self, timestep: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A family's own change of the time."""
        return timestep

    def get_dtype(self) -> torch.dtype | None:
        """The dtype of the network's weights."""
        return self.diffusion_model.dtype

    def get_dtype_inference(self) -> torch.dtype:
        """The dtype in which the network computes."""
        return self.manual_cast_dtype or self.get_dtype() or torch.float32

    # --- conditioning ----------------------------------------------------------------------------------------------

    def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
        """The per-picture vector of a conditioning, [1, n], or None."""
        return None

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        """Channels to append to the latent, or None."""
        return None

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Conditioning fields -> named `comfy.conds` objects, which become keyword arguments of `apply_model`."""
        out: dict[str, Any] = {}
        concat = self.concat_cond(**kwargs)
        if concat is not None:
            out["c_concat"] = comfy.conds.CONDNoiseShape(concat)
        adm = self.encode_adm(**kwargs)
        if adm is not None:
            out["y"] = comfy.conds.CONDRegular(adm)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDCrossAttn(cross)
        cross_controlnet = kwargs.get("cross_attn_controlnet")
        if cross_controlnet is not None:
            out["crossattn_controlnet"] = comfy.conds.CONDCrossAttn(cross_controlnet)
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        """Shapes of conditionings that count towards memory, before they exist."""
        return {}

    # --- weights ---------------------------------------------------------------------------------------------------

    def load_model_weights(self, sd: dict[str, torch.Tensor], unet_prefix: str = "") -> BaseModel:
        """Take the diffusion model's tensors out of `sd` (below `unet_prefix`) as they are, without copies.

        Raises ValueError when a tensor's shape does not fit the network.
        """
        weights = {key[len(unet_prefix) :]: sd.pop(key) for key in list(sd) if key.startswith(unet_prefix)}
        weights = self.model_config.process_unet_state_dict(weights)
        try:
            missing, unexpected = self.diffusion_model.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:]]
            raise ValueError(
                f"the file's weights do not fit {type(self).__name__}: {reasons[0] if reasons else error}"
            ) from error
        empty = [name for name, p in self.diffusion_model.named_parameters() if p.is_meta]
        if empty:
            raise ValueError(
                f"the file lacks {len(empty)} of {type(self).__name__}'s weights, first {empty[0]}; it is incomplete"
            )
        if missing:
            logging.warning("unet missing: %s", missing)
        if unexpected:
            logging.warning("unet unexpected: %s", unexpected)
        return self

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        """VAE latent -> the network's range."""
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        """The network's range -> VAE latent."""
        return self.latent_format.process_out(latent)

    def scale_latent_inpaint(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The known picture at noise level sigma [B], for the places an inpaint mask keeps."""
        column = sigma.reshape([sigma.shape[0]] + [1] * (noise.ndim - 1))
        return self.model_sampling.noise_scaling(column, noise, latent_image)

    def state_dict_for_saving(
        self,
        clip_state_dict: dict[str, torch.Tensor] | None = None,
        vae_state_dict: dict[str, torch.Tensor] | None = None,
        clip_vision_state_dict: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """All weights under the keys of a checkpoint file."""
        out = self.model_config.process_unet_state_dict_for_saving(self.diffusion_model.state_dict())
        if clip_state_dict is not None:
            out.update(self.model_config.process_clip_state_dict_for_saving(clip_state_dict))
        if vae_state_dict is not None:
            out.update(self.model_config.process_vae_state_dict_for_saving(vae_state_dict))
        if clip_vision_state_dict is not None:
            out.update(self.model_config.process_clip_vision_state_dict_for_saving(clip_vision_state_dict))
        return out

    def memory_required(self, input_shape: Any, cond_shapes: dict[str, list[Any]] | None = None) -> float:
        """Bytes of activations for an input of this shape."""
        shapes = [input_shape]
        for name in self.memory_usage_factor_conds:
            shapes += (cond_shapes or {}).get(name, [])
        area = sum(shape[0] * math.prod(shape[2:]) for shape in shapes)
        dtype_size = comfy.model_management.dtype_size(self.get_dtype_inference())
        return area * dtype_size * 0.01 * self.memory_usage_factor * 1024 * 1024


def upscale_dit_mask(mask: torch.Tensor, img_size_in: tuple[int, int], img_size_out: tuple[int, int]) -> torch.Tensor:
    """Resize the picture part of a joint attention mask [B, L, L] (text first) to another patch grid."""
    rows_in, cols_in = img_size_in
    rows_out, cols_out = img_size_out
    if (rows_in, cols_in) == (rows_out, cols_out):
        return mask
    text = mask.shape[1] - rows_in * cols_in

    def resized(block: torch.Tensor, axis: int) -> torch.Tensor:
        moved = block.movedim(axis, -1)
        grid = moved.reshape(-1, 1, rows_in, cols_in)
        grid = torch.nn.functional.interpolate(grid, size=(rows_out, cols_out), mode="nearest-exact")
        return grid.reshape(*moved.shape[:-1], rows_out * cols_out).movedim(-1, axis)

    def along(block: torch.Tensor, axis: int) -> torch.Tensor:
        head, tail = block.split([text, rows_in * cols_in], dim=axis)
        return torch.cat([head, resized(tail, axis)], dim=axis)

    return along(along(mask.float(), 1), 2).to(mask.dtype)


# families that packs ask for by class, `isinstance(model, comfy.model_base.SDXL)` above all
_FAMILIES = (
    "ACEStep",
    "Anima",
    "CosmosPredict2",
    "CosmosVideo",
    "ErnieImage",
    "GenmoMochi",
    "HiDream",
    "HiDreamO1",
    "Hunyuan3Dv2",
    "Kandinsky5",
    "LTXAV",
    "Lens",
    "Omnigen2",
    "PiD",
    "PixelDiTT2I",
    "SD_X4Upscaler",
    "SV3D_p",
    "SV3D_u",
    "SVD_img2vid",
    "StableAudio1",
    "StableCascade_B",
    "StableCascade_C",
    "Stable_Zero123",
    "WAN21_CausalAR",
    "WAN21_FlowRVS",
    "WAN21_HuMo",
    "WAN21_SCAIL",
    "WAN22_Animate",
    "WAN22_S2V",
    "WAN22_WanDancer",
    "WanMultiTalk",
)
_look_up = comfy.families.lookup("models", __name__, {name: f"the model family of {name}" for name in _FAMILIES})

# parts of families that ComfyUI has in this module, and where they are here
_PARTS = {
    "CLIPEmbeddingNoiseAugmentation": "comfy.ldm.unet.noise_augmentation",
    "Timestep": "comfy.ldm.modules.diffusionmodules.util",
    "sdxl_pooled": "comfy.families.sdxl",
}


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module(_PARTS[name]), name) if name in _PARTS else _look_up(name)
