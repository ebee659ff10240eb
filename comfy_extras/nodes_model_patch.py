"""Networks beside the diffusion model that change what it computes: USO's style projector for Flux."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy.missing import missing, missing_names
from comfy_nodes.loaders import files
from comfy_nodes.model_files import watches_files

_FEATURE = "Patch networks (USO style reference)"
# Networks of this module that packs import, here or there.
__getattr__ = missing_names(
    __name__,
    dict.fromkeys(
        ("QwenImageBlockWiseControlNet", "SigLIPMultiFeatProjModel", "ZImageControlPatch", "z_image_convert"),
        "Patch networks (Qwen-Image, Z-Image, USO)",
    ),
)


@watches_files(name="model_patches")
class ModelPatchLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (files("model_patches"),)}}

    RETURN_TYPES = ("MODEL_PATCH",)
    FUNCTION = "load_model_patch"
    CATEGORY = "advanced/loaders"
    EXPERIMENTAL = True

    def load_model_patch(self, name: str):
        folder_paths.get_full_path_or_raise("model_patches", name)
        missing(_FEATURE)


class USOStyleReference:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "model_patch": ("MODEL_PATCH",),
                "clip_vision_output": ("CLIP_VISION_OUTPUT",),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_patch"
    CATEGORY = "advanced/model_patches/flux"
    EXPERIMENTAL = True

    def apply_patch(self, model: Any, model_patch: Any, clip_vision_output: Any):
        missing(_FEATURE)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ModelPatchLoader, USOStyleReference)}
