"""Nodes around image encoders: CLIP vision, style models, unCLIP, and the older loaders."""

from __future__ import annotations

from typing import Any

import torch

import folder_paths
import node_helpers
from comfy_nodes.fields import number, pixels, prompt_text
from comfy_nodes.loaders import embeddings, files
from comfy_nodes.model_files import watches_files


@watches_files(clip_name="clip_vision")
class CLIPVisionLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_name": (files("clip_vision"),)}}

    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "load_clip"
    CATEGORY = "loaders"

    def load_clip(self, clip_name: str):
        import comfy.clip_vision

        model = comfy.clip_vision.load(folder_paths.get_full_path_or_raise("clip_vision", clip_name))
        if model is None:
            raise RuntimeError(f"{clip_name} holds no CLIP vision model; choose another file")
        return (model,)


class CLIPVisionEncode:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_vision": ("CLIP_VISION",), "image": ("IMAGE",), "crop": (["center", "none"],)}}

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "encode"
    CATEGORY = "conditioning"

    def encode(self, clip_vision: Any, image: torch.Tensor, crop: str):
        return (clip_vision.encode_image(image, crop=crop == "center"),)


@watches_files(style_model_name="style_models")
class StyleModelLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"style_model_name": (files("style_models"),)}}

    RETURN_TYPES = ("STYLE_MODEL",)
    FUNCTION = "load_style_model"
    CATEGORY = "loaders"

    def load_style_model(self, style_model_name: str):
        import comfy.sd

        return (comfy.sd.load_style_model(folder_paths.get_full_path_or_raise("style_models", style_model_name)),)


def _with_inserted(mask: torch.Tensor, at: int, count: int, bias: torch.Tensor) -> torch.Tensor:
    """Attention bias [B, n, n] with `count` tokens inserted at `at`: all others see them with `bias`."""
    old = torch.cat([torch.arange(at), torch.arange(at, mask.shape[1]) + count])
    grown = torch.zeros((mask.shape[0], mask.shape[1] + count, mask.shape[2] + count), dtype=mask.dtype)
    grown[:, old[:, None], old[None, :]] = mask
    grown[:, old, at : at + count] = bias.to(mask.dtype)
    return grown


class StyleModelApply:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "style_model": ("STYLE_MODEL",),
                "clip_vision_output": ("CLIP_VISION_OUTPUT",),
                "strength": number(1.0, 0.0, 10.0, 0.001),
                "strength_type": (["multiply", "attn_bias"],),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply_stylemodel"
    CATEGORY = "conditioning/style_model"

    def apply_stylemodel(
        self, conditioning: Any, style_model: Any, clip_vision_output: Any, strength: float, strength_type: str
    ):
        """Image tokens after the text's, scaled by `strength`, or looked at that much more."""
        style = style_model.get_cond(clip_vision_output).flatten(start_dim=0, end_dim=1).unsqueeze(dim=0)
        if strength_type == "multiply":
            style = style * strength
        # torch's logarithm of 0 is -inf: not looked at at all
        bias = torch.log(torch.tensor(strength if strength_type == "attn_bias" else 1.0))
        result = []
        for text, fields in conditioning:
            fields = fields.copy()
            mask = fields.get("attention_mask")
            if mask is not None or bias != 0:
                picture = fields.get("attention_mask_img_shape", (1, 1))
                length = text.shape[1] + picture[0] * picture[1]
                if mask is None:
                    mask = torch.zeros((text.shape[0], length, length), dtype=torch.float16)
                elif mask.dtype == torch.bool:
                    mask = torch.log(mask.to(dtype=torch.float16))
                grown = _with_inserted(mask.cpu(), text.shape[1], style.shape[1], bias)
                fields["attention_mask"] = grown.to(text.device)
                fields["attention_mask_img_shape"] = picture
            result.append([torch.cat((text, style.to(text)), dim=1), fields])
        return (result,)


class unCLIPConditioning:  # noqa: N801 - ComfyUI's name
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "clip_vision_output": ("CLIP_VISION_OUTPUT",),
                "strength": number(1.0, -10.0, 10.0, 0.01),
                "noise_augmentation": number(0.0, 0.0, 1.0, 0.01),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply_adm"
    CATEGORY = "conditioning"

    def apply_adm(self, conditioning: Any, clip_vision_output: Any, strength: float, noise_augmentation: float):
        if strength == 0:
            return (conditioning,)
        entry = {
            "clip_vision_output": clip_vision_output,
            "strength": strength,
            "noise_augmentation": noise_augmentation,
        }
        values = {"unclip_conditioning": [entry]}
        return (node_helpers.conditioning_set_values(conditioning, values, append=True),)


@watches_files(ckpt_name="checkpoints")
class unCLIPCheckpointLoader:  # noqa: N801 - ComfyUI's name
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (files("checkpoints"),)}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "CLIP_VISION")
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders"

    def load_checkpoint(self, ckpt_name: str, output_vae: bool = True, output_clip: bool = True):
        import comfy.sd

        return comfy.sd.load_checkpoint_guess_config(
            folder_paths.get_full_path_or_raise("checkpoints", ckpt_name),
            output_vae=True,
            output_clip=True,
            output_clipvision=True,
            embedding_directory=embeddings(),
        )


@watches_files(gligen_name="gligen")
class GLIGENLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"gligen_name": (files("gligen"),)}}

    RETURN_TYPES = ("GLIGEN",)
    FUNCTION = "load_gligen"
    CATEGORY = "loaders"

    def load_gligen(self, gligen_name: str):
        import comfy.sd

        return (comfy.sd.load_gligen(folder_paths.get_full_path_or_raise("gligen", gligen_name)),)


class GLIGENTextBoxApply:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning_to": ("CONDITIONING",),
                "clip": ("CLIP",),
                "gligen_textbox_model": ("GLIGEN",),
                "text": prompt_text(),
                "width": pixels(64, 8),
                "height": pixels(64, 8),
                "x": pixels(0),
                "y": pixels(0),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning/gligen"

    def append(
        self,
        conditioning_to: Any,
        clip: Any,
        gligen_textbox_model: Any,
        text: str,
        width: int,
        height: int,
        x: int,
        y: int,
    ):
        """A text for a box of the picture; boxes add up."""
        pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled="unprojected")[1]
        box = (pooled, height // 8, width // 8, y // 8, x // 8)
        result = []
        for tensor, fields in conditioning_to:
            boxes = fields["gligen"][2] if "gligen" in fields else []
            result.append([tensor, {**fields, "gligen": ("position", gligen_textbox_model, [*boxes, box])}])
        return (result,)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        CLIPVisionLoader,
        CLIPVisionEncode,
        StyleModelLoader,
        StyleModelApply,
        unCLIPConditioning,
        unCLIPCheckpointLoader,
        GLIGENLoader,
        GLIGENTextBoxApply,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CLIPVisionLoader": "Load CLIP Vision",
    "CLIPVisionEncode": "CLIP Vision Encode",
    "StyleModelLoader": "Load Style Model",
    "StyleModelApply": "Apply Style Model",
}
