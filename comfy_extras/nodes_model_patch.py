"""Networks beside the diffusion model that change what it computes: USO's style projector for Flux."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy import weight_files
from comfy.ldm.flux.uso import DEPTHS, SigLIPMultiFeatProjModel, sizes_of
from comfy.missing import missing_names
from comfy_nodes.loaders import files
from comfy_nodes.model_files import watches_files

# Networks of this module that packs import, here or there.
__getattr__ = missing_names(
    __name__,
    dict.fromkeys(
        ("QwenImageBlockWiseControlNet", "ZImageControlPatch", "z_image_convert"),
        "Patch networks (Qwen-Image, Z-Image)",
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
        path = folder_paths.get_full_path_or_raise("model_patches", name)
        sd = comfy.utils.load_torch_file(path, safe_load=True)
        read_from = weight_files.files_in(sd)
        if "feature_embedder.mid_layer_norm.bias" not in sd:
            raise ValueError(f"{name} holds no patch network of a kind that is known (USO's projector); choose another")
        sd = comfy.utils.state_dict_prefix_replace(sd, {"feature_embedder.": ""}, filter_keys=True)
        place = {"device": torch.device("meta"), "dtype": comfy.utils.weight_dtype(sd)}
        network = SigLIPMultiFeatProjModel(**sizes_of(sd), **place)
        network.load_state_dict(sd, assign=True)
        management = comfy.model_management
        patcher = comfy.model_patcher.ModelPatcher(
            network.eval(), management.get_torch_device(), management.unet_offload_device()
        )
        patcher.weight_store.loaded_from |= read_from
        return (patcher,)


class UsoStyleProjectorPatch:
    """Puts the style tokens of a picture in front of the prompt's, at position 0."""

    rows_independent = True

    def __init__(self, model_patch: Any, encoded_image: torch.Tensor) -> None:
        """encoded_image: SigLIP's hidden states [3, B, L, C], low to high."""
        self.model_patch = model_patch
        self.encoded_image = encoded_image

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        txt, ids = inputs["txt"], inputs["txt_ids"]
        style = self.model_patch.model(self.encoded_image.to(txt))
        style = comfy.utils.repeat_to_batch_size(style.to(txt), txt.shape[0])
        places = ids.new_zeros((ids.shape[0], style.shape[1], ids.shape[2]))
        return {**inputs, "txt": torch.cat([style, txt], dim=1), "txt_ids": torch.cat([places, ids], dim=1)}

    def to(self, device_or_dtype: Any) -> UsoStyleProjectorPatch:
        if isinstance(device_or_dtype, torch.device):
            self.encoded_image = self.encoded_image.to(device_or_dtype)
        return self

    def models(self) -> list[Any]:
        return [self.model_patch]


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
        hidden = getattr(clip_vision_output, "all_hidden_states", None)
        if hidden is None:
            raise ValueError("USO needs SigLIP's hidden states of all layers; encode the picture with a SigLIP file")
        model = model.clone()
        encoded = torch.stack([hidden[:, layer] for layer in DEPTHS.values()])
        model.set_model_post_input_patch(UsoStyleProjectorPatch(model_patch, encoded))
        return (model,)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ModelPatchLoader, USOStyleReference)}
