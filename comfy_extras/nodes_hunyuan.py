"""Nodes of HunyuanVideo, HunyuanImage 2.1 and HunyuanDiT."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management
import node_helpers
from comfy.missing import FeatureMissingError, missing_names
from comfy_nodes.conditioning import need_clip
from comfy_nodes.fields import MAX_RESOLUTION, number, pixels, whole
from comfy_nodes.image import scaled
from comfy_nodes.vae import need_vae

MULTILINE = ("STRING", {"multiline": True, "dynamicPrompts": True})


def video_size(length: int) -> dict[str, Any]:
    """Inputs for the size of a video of at first `length` frames, and how many at once."""
    return {
        "width": pixels(848, 16, 16),
        "height": pixels(480, 16, 16),
        "length": whole(length, 1, MAX_RESOLUTION, 4),
        "batch_size": whole(1, 1, 4096),
    }


def empty(channels: int, sizes: tuple[int, ...], count: int) -> torch.Tensor:
    """A latent of zeros [count, channels, *sizes]."""
    return torch.zeros((count, channels, *sizes), device=comfy.model_management.intermediate_device())


def video_latent(width: int, height: int, length: int, count: int) -> torch.Tensor:
    """Zeros [count, 16, F, h, w]."""
    return empty(16, ((length - 1) // 4 + 1, height // 8, width // 8), count)


class CLIPTextEncodeHunyuanDiT:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "bert": MULTILINE, "mt5xl": MULTILINE}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "advanced/conditioning"

    def encode(self, clip: Any, bert: str, mt5xl: str):
        need_clip(clip)
        tokens = clip.tokenize(bert)
        tokens["mt5xl"] = clip.tokenize(mt5xl)["mt5xl"]
        return (clip.encode_from_tokens_scheduled(tokens),)


class TextEncodeHunyuanVideo_ImageToVideo:  # noqa: N801 (ComfyUI's name)
    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "How much the picture counts against the prompt: the higher, the more the prompt does."
        return {
            "required": {
                "clip": ("CLIP",),
                "clip_vision_output": ("CLIP_VISION_OUTPUT",),
                "prompt": MULTILINE,
                "image_interleave": whole(2, 1, 512, tooltip=tooltip),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "advanced/conditioning"

    def encode(self, clip: Any, clip_vision_output: Any, prompt: str, image_interleave: int):
        need_clip(clip)
        seen = getattr(clip_vision_output, "mm_projected", None)
        if seen is None:
            raise FeatureMissingError(
                "this CLIP vision output has no features for a language model; load llava_llama3_vision"
            )
        tokens = clip.tokenize(prompt, image_embeds=seen, image_interleave=image_interleave)
        return (clip.encode_from_tokens_scheduled(tokens),)


class EmptyHunyuanLatentVideo:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": video_size(25)}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    CATEGORY = "latent/video"

    def generate(self, width: int, height: int, length: int, batch_size: int = 1):
        return ({"samples": video_latent(width, height, length, batch_size)},)


class HunyuanImageToVideo:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "vae": ("VAE",),
                **video_size(53),
                "guidance_type": (["v1 (concat)", "v2 (replace)", "custom"],),
            },
            "optional": {"start_image": ("IMAGE",)},
        }

    RETURN_TYPES = ("CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "latent")
    FUNCTION = "encode"
    CATEGORY = "conditioning/video_models"

    def encode(
        self, positive: Any, vae: Any, width: int, height: int, length: int, batch_size: int, guidance_type: str,
        start_image: torch.Tensor | None = None,
    ):  # fmt: skip
        """v1: the picture and a mask are channels. v2: the picture is the first frame. custom: it is beside the video."""
        latent = video_latent(width, height, length, batch_size)
        out: dict[str, Any] = {"samples": latent}
        if start_image is None:
            return (positive, out)
        need_vae(vae)
        known = vae.encode(scaled(start_image[:length], width, height, "bilinear", "center")[..., :3])
        mask = known.new_ones((1, 1, latent.shape[2], *known.shape[-2:]))
        mask[:, :, : (start_image.shape[0] - 1) // 4 + 1] = 0.0
        if guidance_type == "v1 (concat)":
            values: dict[str, Any] = {"concat_latent_image": known, "concat_mask": mask}
        elif guidance_type == "v2 (replace)":
            values = {"guiding_frame_index": 0}
            latent[:, :, : known.shape[2]] = known
            out["noise_mask"] = mask
        else:
            values = {"ref_latent": known}
        return (node_helpers.conditioning_set_values(positive, values), out)


class EmptyHunyuanImageLatent:
    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: whole(2048, 64, MAX_RESOLUTION, 32) for name in ("width", "height")}
        return {"required": {**sizes, "batch_size": whole(1, 1, 4096)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    CATEGORY = "latent"

    def generate(self, width: int, height: int, batch_size: int = 1):
        return ({"samples": empty(64, (height // 32, width // 32), batch_size)},)


class HunyuanRefinerLatent:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent": ("LATENT",),
                "noise_augmentation": number(0.10, 0.0, 1.0, 0.01),
            }
        }

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "execute"
    CATEGORY = "sd"

    def execute(self, positive: Any, negative: Any, latent: dict[str, Any], noise_augmentation: float):
        """The latent is what the refiner begins from, partly noised."""
        samples = latent["samples"]
        values = {"concat_latent_image": samples, "noise_augmentation": noise_augmentation}
        first, second = (node_helpers.conditioning_set_values(c, values) for c in (positive, negative))
        fresh = empty(32, (samples.shape[-3] if samples.ndim == 5 else 1, *samples.shape[-2:]), samples.shape[0])
        return (first, second, {"samples": fresh})


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        CLIPTextEncodeHunyuanDiT, TextEncodeHunyuanVideo_ImageToVideo, EmptyHunyuanLatentVideo, HunyuanImageToVideo,
        EmptyHunyuanImageLatent, HunyuanRefinerLatent,
    )
}  # fmt: skip
__getattr__ = missing_names(__name__, {"LatentUpscaleModelLoader": "the latent upscaler of HunyuanVideo 1.5"})
