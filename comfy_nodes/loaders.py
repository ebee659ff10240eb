"""Nodes that load models from the model folders."""

from __future__ import annotations

import os
from typing import Any

import torch

import comfy.utils
import folder_paths
from comfy.weight_files import FileState, state_of
from comfy_nodes.fields import number
from comfy_nodes.model_files import model_file_state, path_state, watches, watches_files

DEVICES = (["default", "cpu"], {"advanced": True})

# tiny VAEs in models/vae_approx: name -> (scale, shift) of the latents they work on
TINY_VAES = {
    "taesd": (0.18215, 0.0),
    "taesdxl": (0.13025, 0.0),
    "taesd3": (1.5305, 0.0609),
    "taef1": (0.3611, 0.1159),
}


def files(kind: str) -> list[str]:
    return folder_paths.get_filename_list(kind)


def embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


@watches_files(ckpt_name="checkpoints")
class CheckpointLoaderSimple:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (files("checkpoints"), {"tooltip": "The checkpoint to load."})}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The model that denoises latents.",
        "The text encoder.",
        "The VAE between pictures and latents.",
    )
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders"
    DESCRIPTION = "Loads a checkpoint: diffusion model, text encoder and VAE."

    def load_checkpoint(self, ckpt_name: str):
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        import comfy.sd

        loaded = comfy.sd.load_checkpoint_guess_config(
            path, output_vae=True, output_clip=True, embedding_directory=embeddings()
        )
        return loaded[:3]


@watches_files(config_name="configs", ckpt_name="checkpoints")
class CheckpointLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"config_name": (files("configs"),), "ckpt_name": (files("checkpoints"),)}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load_checkpoint"
    CATEGORY = "advanced/loaders"
    DEPRECATED = True

    def load_checkpoint(self, config_name: str, ckpt_name: str):
        import comfy.sd

        config = folder_paths.get_full_path_or_raise("configs", config_name)
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return comfy.sd.load_checkpoint(config, path, True, True, embeddings())


def _pipeline_path(model_path: Any) -> str | None:
    """The folder of a pipeline in models/diffusers; None when there is none of that name."""
    import comfy.diffusers_load

    for root in folder_paths.get_folder_paths("diffusers"):
        if model_path in comfy.diffusers_load.model_folders(root):
            return os.path.join(root, model_path)
    return None


def _pipeline_states(cls: Any, model_path: Any = None, **others: Any) -> list[Any]:
    import comfy.diffusers_load

    path = _pipeline_path(model_path)
    return [] if path is None else [[name, path_state(name)] for name in comfy.diffusers_load.pipeline_files(path)]


@watches(_pipeline_states)
class DiffusersLoader:
    @classmethod
    def INPUT_TYPES(cls):
        import comfy.diffusers_load

        roots = folder_paths.get_folder_paths("diffusers")
        folders = {folder: None for root in roots for folder in comfy.diffusers_load.model_folders(root)}
        return {"required": {"model_path": (list(folders),)}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load_checkpoint"
    CATEGORY = "advanced/loaders/deprecated"

    def load_checkpoint(self, model_path: str, output_vae: bool = True, output_clip: bool = True):
        import comfy.diffusers_load

        path = _pipeline_path(model_path)
        if path is None:
            raise FileNotFoundError(
                f"no folder {model_path} with a model_index.json in models/diffusers; put the pipeline's folder there"
            )
        return comfy.diffusers_load.load_diffusers(path, output_vae, output_clip, embeddings())


@watches_files(unet_name="diffusion_models")
class UNETLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "unet_name": (files("diffusion_models"),),
                "weight_dtype": (["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"],),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_unet"
    CATEGORY = "advanced/loaders"

    def load_unet(self, unet_name: str, weight_dtype: str):
        import comfy.sd

        options: dict[str, Any] = {}
        if weight_dtype.startswith("fp8_e4m3fn"):
            options["dtype"] = torch.float8_e4m3fn
            if weight_dtype.endswith("_fast"):
                options["fp8_optimizations"] = True
        elif weight_dtype == "fp8_e5m2":
            options["dtype"] = torch.float8_e5m2
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return (comfy.sd.load_diffusion_model(path, model_options=options),)


def load_text_encoders(names: list[str], family: str, device: str = "default") -> tuple[Any]:
    """A CLIP from one to four files of models/text_encoders, for a model family (`flux`, `sd3`, ...)."""
    import comfy.sd

    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    kind = getattr(comfy.sd.CLIPType, family.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names]
    clip = comfy.sd.load_clip(ckpt_paths=paths, embedding_directory=embeddings(), clip_type=kind, model_options=options)
    return (clip,)


@watches_files(clip_name="text_encoders")
class CLIPLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "clip_name": (files("text_encoders"),),
                "type": (
                    [
                        "stable_diffusion",
                        "stable_cascade",
                        "sd3",
                        "stable_audio",
                        "mochi",
                        "ltxv",
                        "pixart",
                        "cosmos",
                        "lumina2",
                        "wan",
                        "hidream",
                        "chroma",
                        "ace",
                        "omnigen2",
                        "qwen_image",
                        "hunyuan_image",
                    ],
                ),
            },
            "optional": {"device": DEVICES},
        }

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"
    CATEGORY = "advanced/loaders"
    DESCRIPTION = "Loads one text encoder file for the chosen model family."

    def load_clip(self, clip_name: str, type: str = "stable_diffusion", device: str = "default"):
        return load_text_encoders([clip_name], type, device)


@watches_files(clip_name1="text_encoders", clip_name2="text_encoders")
class DualCLIPLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "clip_name1": (files("text_encoders"),),
                "clip_name2": (files("text_encoders"),),
                "type": (["sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image"],),
            },
            "optional": {"device": DEVICES},
        }

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"
    CATEGORY = "advanced/loaders"
    DESCRIPTION = "Loads two text encoder files, in any order, for the chosen model family."

    def load_clip(self, clip_name1: str, clip_name2: str, type: str, device: str = "default"):
        return load_text_encoders([clip_name1, clip_name2], type, device)


def _vae_states(cls: Any, vae_name: Any = None, **others: Any) -> list[Any]:
    if vae_name not in TINY_VAES:
        return [model_file_state("vae", vae_name)]
    return [model_file_state("vae_approx", file) for file in _tiny_vae_files(vae_name)]


def _tiny_vae_files(name: str) -> list[str]:
    """The files in models/vae_approx of a tiny VAE's encoder and decoder, as far as they are there."""
    starts = (f"{name}_encoder.", f"{name}_decoder.")
    return [file for file in files("vae_approx") if file.startswith(starts)]


@watches(_vae_states)
class VAELoader:
    @staticmethod
    def vae_list() -> list[str]:
        """Files of models/vae, the tiny VAEs that are complete, and `pixel_space` (no VAE at all)."""
        present = files("vae_approx")
        tiny = [
            name
            for name in TINY_VAES
            if all(any(file.startswith(f"{name}_{part}.") for file in present) for part in ("encoder", "decoder"))
        ]
        return [*files("vae"), *tiny, "pixel_space"]

    @staticmethod
    def load_taesd(name: str) -> dict[str, torch.Tensor]:
        """State dict of a tiny VAE out of its two files in models/vae_approx."""
        sd: dict[str, torch.Tensor] = {}
        for part in ("encoder", "decoder"):
            found = [file for file in files("vae_approx") if file.startswith(f"{name}_{part}.")]
            if not found:
                raise FileNotFoundError(f"{name}_{part} not found in models/vae_approx; put it there to use {name}")
            weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae_approx", found[0]))
            sd.update({f"taesd_{part}.{key}": value for key, value in weights.items()})
        scale, shift = TINY_VAES[name]
        return {**sd, "vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae_name": (cls.vae_list(),)}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load_vae"
    CATEGORY = "loaders"

    def load_vae(self, vae_name: str):
        import comfy.sd

        metadata = None
        if vae_name == "pixel_space":
            sd = {"pixel_space_vae": torch.tensor(1.0)}
        elif vae_name in TINY_VAES:
            sd = self.load_taesd(vae_name)
        else:
            path = folder_paths.get_full_path_or_raise("vae", vae_name)
            sd, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        vae = comfy.sd.VAE(sd=sd, metadata=metadata)
        vae.throw_exception_if_invalid()
        return (vae,)


@watches_files(lora_name="loras")
class LoraLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model it is applied to."}),
                "clip": ("CLIP", {"tooltip": "The text encoder it is applied to."}),
                "lora_name": (files("loras"), {"tooltip": "The adapter file."}),
                "strength_model": number(1.0, -100.0, 100.0, 0.01, tooltip="Strength on the diffusion model."),
                "strength_clip": number(1.0, -100.0, 100.0, 0.01, tooltip="Strength on the text encoder."),
            }
        }

    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The changed diffusion model.", "The changed text encoder.")
    FUNCTION = "load_lora"
    CATEGORY = "loaders"
    DESCRIPTION = "Applies an adapter (LoRA) to diffusion model and text encoder; several can follow each other."

    def __init__(self) -> None:
        self.loaded_lora: tuple[str, Any] | None = None
        self.loaded_state: FileState | None = None

    def load_lora(self, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float):
        import comfy.sd

        if strength_model == 0 and strength_clip == 0:
            return (model, clip)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        state = state_of(path)
        if self.loaded_lora is None or self.loaded_lora[0] != path or self.loaded_state != state:
            self.loaded_lora = (path, comfy.utils.load_torch_file(path, safe_load=True))
            self.loaded_state = state
        return comfy.sd.load_lora_for_models(model, clip, self.loaded_lora[1], strength_model, strength_clip)


class LoraLoaderModelOnly(LoraLoader):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (files("loras"),),
                "strength_model": number(1.0, -100.0, 100.0, 0.01),
            }
        }

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The changed diffusion model.",)
    FUNCTION = "load_lora_model_only"
    DESCRIPTION = "Applies an adapter (LoRA) to a diffusion model."

    def load_lora_model_only(self, model: Any, lora_name: str, strength_model: float):
        return (self.load_lora(model, None, lora_name, strength_model, 0)[0],)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        CheckpointLoader,
        CheckpointLoaderSimple,
        DiffusersLoader,
        UNETLoader,
        CLIPLoader,
        DualCLIPLoader,
        VAELoader,
        LoraLoader,
        LoraLoaderModelOnly,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CheckpointLoader": "Load Checkpoint With Config (DEPRECATED)",
    "CheckpointLoaderSimple": "Load Checkpoint",
    "UNETLoader": "Load Diffusion Model",
    "CLIPLoader": "Load CLIP",
    "VAELoader": "Load VAE",
    "LoraLoader": "Load LoRA",
}
