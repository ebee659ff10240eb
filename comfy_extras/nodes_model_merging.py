"""Models blended, added and subtracted, and saved with what was done to them."""

from __future__ import annotations

import os
from typing import Any

import torch

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths
from comfy_nodes.fields import number
from comfy_nodes.files import metadata_texts

MERGING = "advanced/model_merging"
NETWORK = "diffusion_model."
# weights that are no knowledge
NOT_MERGED = (".position_ids", ".logit_scale")
# text encoders by the beginning of their keys; the last takes what is left
ENCODERS = (
    "clip_l.",
    "clip_g.",
    "clip_h.",
    "t5xxl.",
    "pile_t5xl.",
    "mt5xl.",
    "umt5xxl.",
    "t5base.",
    "gemma2_2b.",
    "llama.",
    "hydit_clip.",
    "",
)


def merged(first: Any, patches: dict[str, Any], of_second: float, of_first: float) -> Any:
    """A clone of a model or CLIP whose weights are a weighted sum with the patches (weights of another one)."""
    first = first.clone()
    for key, patch in patches.items():
        if not key.endswith(NOT_MERGED):
            first.add_patches({key: patch}, of_second, of_first)
    return first


class _Merge:
    FUNCTION = "merge"
    CATEGORY = MERGING
    KIND, NAME = "MODEL", "model"
    RETURN_TYPES: tuple[str, ...] = ("MODEL",)

    @classmethod
    def pair(cls) -> dict[str, Any]:
        return {f"{cls.NAME}1": (cls.KIND,), f"{cls.NAME}2": (cls.KIND,)}

    @classmethod
    def both(cls, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The first, and the second's weights."""
        first, second = given[f"{cls.NAME}1"], given[f"{cls.NAME}2"]
        return first, second.get_key_patches(NETWORK) if cls.NAME == "model" else second.get_key_patches()


class ModelMergeSimple(_Merge):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {**cls.pair(), "ratio": number(1.0, 0.0, 1.0, 0.01)}}

    def merge(self, ratio: float, **given: Any):
        """`ratio` of the first."""
        return (merged(*self.both(given), 1.0 - ratio, ratio),)


class ModelSubtract(_Merge):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {**cls.pair(), "multiplier": number(1.0, -10.0, 10.0, 0.01)}}

    def merge(self, multiplier: float, **given: Any):
        return (merged(*self.both(given), -multiplier, multiplier),)


class ModelAdd(_Merge):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": cls.pair()}

    def merge(self, **given: Any):
        return (merged(*self.both(given), 1.0, 1.0),)


class CLIPMergeSimple(ModelMergeSimple):
    KIND, NAME, RETURN_TYPES = "CLIP", "clip", ("CLIP",)


class CLIPSubtract(ModelSubtract):
    KIND, NAME, RETURN_TYPES = "CLIP", "clip", ("CLIP",)


class CLIPAdd(ModelAdd):
    KIND, NAME, RETURN_TYPES = "CLIP", "clip", ("CLIP",)


class ModelMergeBlocks:
    """A share for each part of the network, named by the beginning of its weights' names; the longest name holds."""

    @classmethod
    def INPUT_TYPES(cls):
        share = number(1.0, 0.0, 1.0, 0.01)
        return {"required": {"model1": ("MODEL",), "model2": ("MODEL",), "input": share, "middle": share, "out": share}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "merge"
    CATEGORY = MERGING

    def merge(self, model1: Any, model2: Any, **shares: float):
        """Shares of the first model; weights that no name fits take the first share."""
        default = next(iter(shares.values()))
        names = sorted(shares, key=len, reverse=True)
        model = model1.clone()
        for key, patch in model2.get_key_patches(NETWORK).items():
            place = key.removeprefix(NETWORK)
            ratio = next((shares[name] for name in names if place.startswith(name)), default)
            model.add_patches({key: patch}, 1.0 - ratio, ratio)
        return (model,)


# ---- saving ----------------------------------------------------------------------------------------------------------


def _place(filename_prefix: str, output_dir: str | None) -> str:
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        filename_prefix, output_dir or folder_paths.get_output_directory()
    )
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def sampling_keys(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What of a model's sampling is not in its weights, as tensors and metadata by which loaders know it again."""
    sampling, kinds = model.get_model_object("model_sampling"), comfy.model_sampling
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    if isinstance(sampling, kinds.ModelSamplingContinuousEDM) and isinstance(sampling, kinds.V_PREDICTION):
        for name in ("sigma_max", "sigma_min"):
            tensors[f"edm_vpred.{name}"] = torch.tensor(float(getattr(sampling, name)))
    if model.model.model_type == comfy.model_base.ModelType.EPS:
        metadata["modelspec.predict_key"] = "epsilon"
    elif model.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        metadata["modelspec.predict_key"] = "v"
        tensors["v_pred"] = torch.tensor([])
        if getattr(sampling, "zsnr", False):
            tensors["ztsnr"] = torch.tensor([])
    return tensors, metadata


def save_checkpoint(
    model: Any,
    clip: Any = None,
    vae: Any = None,
    clip_vision: Any = None,
    filename_prefix: str | None = None,
    output_dir: str | None = None,
    prompt: Any = None,
    extra_pnginfo: Any = None,
) -> None:
    """Write a model, with its patches applied, and what else is given, with the workflow that made it."""
    tensors, metadata = sampling_keys(model)
    metadata.update(metadata_texts(prompt, extra_pnginfo))
    path = _place(filename_prefix or "checkpoints/ComfyUI", output_dir)
    comfy.sd.save_checkpoint(path, model, clip, vae, clip_vision, metadata=metadata, extra_keys=tensors)


class _Save:
    PARTS: dict[str, str] = {}
    PREFIX = "checkpoints/ComfyUI"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = MERGING

    @classmethod
    def INPUT_TYPES(cls):
        parts = {name: (kind,) for name, kind in cls.PARTS.items()}
        return {
            "required": {**parts, "filename_prefix": ("STRING", {"default": cls.PREFIX})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def __init__(self) -> None:
        self.output_dir = folder_paths.get_output_directory()

    def save(self, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None, **parts: Any):
        save_checkpoint(
            **parts,
            filename_prefix=filename_prefix,
            output_dir=self.output_dir,
            prompt=prompt,
            extra_pnginfo=extra_pnginfo,
        )
        return {}


class CheckpointSave(_Save):
    PARTS = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}


class ModelSave(_Save):
    PARTS = {"model": "MODEL"}
    PREFIX = "diffusion_models/ComfyUI"


class VAESave(_Save):
    PARTS = {"vae": "VAE"}
    PREFIX = "vae/ComfyUI_vae"

    def save(self, vae: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None):
        metadata = metadata_texts(prompt, extra_pnginfo)
        comfy.utils.save_torch_file(vae.get_sd(), _place(filename_prefix, self.output_dir), metadata=metadata)
        return {}


class CLIPSave(_Save):
    PARTS = {"clip": "CLIP"}
    PREFIX = "clip/ComfyUI"

    def save(self, clip: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None):
        """One file per text encoder, its keys as text encoder loaders take them."""
        comfy.model_management.load_models_gpu([clip.load_model()], force_patch_weights=True)
        weights = clip.get_sd()
        metadata = metadata_texts(prompt, extra_pnginfo)
        for encoder in ENCODERS:
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(encoder)}
            if not own:
                continue
            suffix = f"_{encoder[:-1]}" if encoder else ""
            own = comfy.utils.state_dict_prefix_replace(own, {encoder: ""} if encoder else {})
            own = comfy.utils.state_dict_prefix_replace(own, {"transformer.": ""})
            path = _place(filename_prefix + suffix, self.output_dir)
            comfy.utils.save_torch_file({key: value.cpu() for key, value in own.items()}, path, metadata=metadata)
        return {}


NODE_CLASS_MAPPINGS = {
    "ModelMergeSimple": ModelMergeSimple,
    "ModelMergeBlocks": ModelMergeBlocks,
    "ModelMergeSubtract": ModelSubtract,
    "ModelMergeAdd": ModelAdd,
    "CheckpointSave": CheckpointSave,
    "CLIPMergeSimple": CLIPMergeSimple,
    "CLIPMergeSubtract": CLIPSubtract,
    "CLIPMergeAdd": CLIPAdd,
    "CLIPSave": CLIPSave,
    "VAESave": VAESave,
    "ModelSave": ModelSave,
}
NODE_DISPLAY_NAME_MAPPINGS = {"CheckpointSave": "Save Checkpoint"}
