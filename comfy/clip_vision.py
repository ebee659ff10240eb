"""Image encoders of workflows: pictures to the features that style models, unCLIP, IP-Adapter and video models take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from comfy import weight_files
from comfy.clip_vision_model import (
    CLIP_MEAN,
    CLIP_STD,
    CLIPVisionModelProjection,
    VisionConfig,
    config_from_state_dict,
    from_open_clip,
)
from comfy.taco_dit.core.spread import spread_batch

StateDict = dict[str, torch.Tensor]


class Output:
    """What an encoder made of B pictures; `output["name"]` is `output.name`.

    last_hidden_state [B, L, C]; penultimate_hidden_states [B, L, C]; image_embeds [B, P] (SigLIP: [B, L, C]);
    image_sizes: (channels, height, width) of each picture as the encoder saw it; mm_projected: [B, L, 4096] for LLaVA,
    else None; all_hidden_states [B, layers, L, C]: SigLIP only.
    """

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)


def clip_preprocess(
    image: torch.Tensor,
    size: int = 224,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    crop: bool = True,
) -> torch.Tensor:
    """Pictures [B, H, W, 3+] in 0..1 as an encoder takes them: [B, 3, size, size], normalised.

    Resized bicubically to `size` on the shorter side and cut in the middle, or, without `crop`, stretched. Values are
    rounded to 8 bits, as those of image files are.
    """
    pixels = image[..., :3].movedim(-1, 1)
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        target = (round(scale * height), round(scale * width)) if crop else (size, size)
        pixels = torch.nn.functional.interpolate(pixels, size=target, mode="bicubic", antialias=True)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        pixels = pixels[:, :, top : top + size, left : left + size]
    pixels = (pixels * 255.0).clamp(0, 255).round() / 255.0
    middle, spread = (torch.tensor(values, device=image.device, dtype=image.dtype) for values in (mean, std))
    return (pixels - middle.view(3, 1, 1)) / spread.view(3, 1, 1)


class ClipVisionModel:
    """An image encoder, where it computes and waits."""

    def __init__(self, config: VisionConfig) -> None:
        """The network is on the meta device until `load_sd`."""
        self.config = config
        self.image_size = config.image_size
        self.image_mean, self.image_std = config.mean, config.std
        self.return_all_hidden_states = config.siglip
        self.load_device = model_management.text_encoder_device()
        self.dtype = model_management.text_encoder_dtype(self.load_device)
        self.model = CLIPVisionModelProjection(config, self.dtype, torch.device("meta"), comfy.ops.manual_cast).eval()
        self.patcher: Any = None

    def load_sd(self, sd: StateDict) -> Any:
        """Take weights with transformers' names; returns missing and unexpected keys.

        Raises ValueError when a weight is missing.
        """
        files = weight_files.files_in(sd)
        weights = {key: value.to(self.dtype) for key, value in sd.items() if value.is_floating_point()}
        result = self.model.load_state_dict(weights, strict=False, assign=True)
        empty = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if empty:
            raise ValueError(f"the CLIP vision model lacks {len(empty)} weights, first {empty[0]}; use a complete file")
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model, load_device=self.load_device, offload_device=model_management.text_encoder_offload_device()
        )
        self.patcher.weight_store.loaded_from |= files
        return result

    def get_sd(self) -> StateDict:
        """All weights."""
        return self.model.state_dict()

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Output:
        """Features of pictures [B, H, W, 3+] in 0..1, on the device for results. Batches are encoded on all ranks."""
        model_management.load_model_gpu(self.patcher)
        chosen = "all" if self.return_all_hidden_states else -2
        home = model_management.intermediate_device()

        def encode(pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pixels = clip_preprocess(
                pictures.to(self.load_device), self.image_size, self.image_mean, self.image_std, crop
            ).float()
            results = self.model(pixels, intermediate_output=chosen)
            return tuple(result.to(home) for result in results if result is not None)

        with torch.no_grad():
            last, hidden, embeds, *projected = spread_batch(image, encode)
        self.patcher.weight_store.check_files()
        out = Output()
        out["last_hidden_state"], out["image_embeds"] = last.to(home), embeds.to(home)
        out["image_sizes"] = [(3, self.image_size, self.image_size)] * image.shape[0]
        hidden = hidden.to(home)
        out["penultimate_hidden_states"] = hidden[:, -2] if self.return_all_hidden_states else hidden
        if self.return_all_hidden_states:
            out["all_hidden_states"] = hidden
        out["mm_projected"] = projected[0].to(home) if projected else None
        return out


def load_clipvision_from_sd(sd: StateDict, prefix: str = "", convert_keys: bool = False) -> ClipVisionModel | None:
    """An encoder from the keys of a state dict that begin with `prefix`; None when they are of no supported one.

    convert_keys: the names may be OpenCLIP's.
    """
    if convert_keys and f"{prefix}transformer.resblocks.0.attn.in_proj_weight" in sd:
        sd = from_open_clip(sd, prefix)
    elif prefix:
        sd = comfy.utils.state_dict_prefix_replace(dict(sd), {prefix: ""}, filter_keys=True)
    config = config_from_state_dict(sd)
    if config is None:
        return None
    model = ClipVisionModel(config)
    result = model.load_sd(sd)
    if result.unexpected_keys:
        logging.debug("left over CLIP vision keys: %s", result.unexpected_keys)
    return model


def load(ckpt_path: str) -> ClipVisionModel | None:
    """The encoder in a file with transformers' or OpenCLIP's names; None when there is no supported one."""
    sd = comfy.utils.load_torch_file(ckpt_path)
    if "visual.transformer.resblocks.0.attn.in_proj_weight" in sd:
        return load_clipvision_from_sd(sd, prefix="visual.", convert_keys=True)
    return load_clipvision_from_sd(sd)
