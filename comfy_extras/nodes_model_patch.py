"""Networks beside the diffusion model that change what it computes: USO's style projector for Flux, DiffSynth's control of
Qwen-Image.
"""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy import weight_files
from comfy.ldm.dit_state import DiTState
from comfy.ldm.flux import uso
from comfy.ldm.qwen_image import control_patch
from comfy.missing import missing_names
from comfy_nodes.fields import number
from comfy_nodes.loaders import files
from comfy_nodes.model_files import watches_files

# Names that packs import from here.
QwenImageBlockWiseControlNet = control_patch.QwenImageBlockWiseControlNet
SigLIPMultiFeatProjModel = uso.SigLIPMultiFeatProjModel
__getattr__ = missing_names(
    __name__, dict.fromkeys(("ZImageControlPatch", "z_image_convert"), "Patch networks of Z-Image")
)


def _network(sd: dict[str, torch.Tensor], **place: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]] | None:
    """(network without weights, its weights) of the kind that a file holds; None when it is not known."""
    if "controlnet_blocks.0.y_rms.weight" in sd:
        return QwenImageBlockWiseControlNet(**control_patch.sizes_of(sd), **place), sd
    if "feature_embedder.mid_layer_norm.bias" in sd:
        sd = comfy.utils.state_dict_prefix_replace(sd, {"feature_embedder.": ""}, filter_keys=True)
        return SigLIPMultiFeatProjModel(**uso.sizes_of(sd), **place), sd
    return None


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
        made = _network(sd, device=torch.device("meta"), dtype=comfy.utils.weight_dtype(sd))
        if made is None:
            raise ValueError(
                f"{name} holds no known patch network (USO's projector, DiffSynth's control of "
                "Qwen-Image); choose another"
            )
        network, weights = made
        try:
            network.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{name} is incomplete ({error}); download it again") from error
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
        encoded = torch.stack([hidden[:, layer] for layer in uso.DEPTHS.values()])
        model.set_model_post_input_patch(UsoStyleProjectorPatch(model_patch, encoded))
        return (model,)


class DiffSynthCnetPatch:
    """Adds what the control network makes of a block's picture tokens and the hint's, after each block.

    The hint is encoded once for each size of latents. Only the tokens of the picture that is made are changed, not those of
    reference pictures, which come behind them.
    """

    def __init__(
        self, model_patch: Any, vae: Any, image: torch.Tensor, strength: float, mask: torch.Tensor | None = None
    ) -> None:
        """image: hints [n, H, W, 3] in 0..1. mask: [n, 1, H, W], 1 where the hint holds, for networks that take one."""
        self.model_patch, self.vae, self.image = model_patch, vae, image
        self.strength, self.mask = strength, mask
        self.rows_independent = image.shape[0] == 1
        self._latents = {tuple(image.shape[1:3]): self.encode_latent_cond(image)}
        self._tokens: dict[tuple[int, ...], torch.Tensor] = {}

    def encode_latent_cond(self, image: torch.Tensor) -> torch.Tensor:
        """Latents [n, 16, 1, h, w] of pictures, with a mask as 17th channel where the network takes one.

        Raises ValueError when the VAE is not Qwen-Image's.
        """
        latents = torch.cat([self.vae.encode(picture) for picture in image.split(1)])
        if latents.ndim != 5 or latents.shape[1] != 16:
            raise ValueError(
                f"this VAE makes latents {tuple(latents.shape)}; connect Qwen-Image's (qwen_image_vae), with "
                "which the control network was trained"
            )
        if not self.model_patch.model.additional_in_dim:
            return latents
        if self.mask is None:
            return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        rows, columns = latents.shape[-2:]
        mask = comfy.utils.common_upscale(self.mask.to(latents), columns, rows, "bilinear", "none")
        mask = comfy.utils.repeat_to_batch_size(mask.unsqueeze(2), latents.shape[0])
        return torch.cat([latents, mask], dim=1)

    def hint_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The hint's tokens [n, L, C] for latents x [B, 16, 1, h, w], on their device."""
        ratio = self.vae.spacial_compression_encode()
        size = (x.shape[-2] * ratio, x.shape[-1] * ratio)
        if size not in self._tokens:
            if size not in self._latents:
                image = comfy.utils.common_upscale(self.image.movedim(-1, 1), size[1], size[0], "area", "center")
                loaded = comfy.model_management.loaded_models(only_currently_used=True)
                self._latents[size] = self.encode_latent_cond(image.movedim(1, -1))
                comfy.model_management.load_models_gpu(loaded)
            self._tokens[size] = self.model_patch.model.process_input_latent_image(self._latents[size].to(x.device))
        return self._tokens[size].to(x.device)

    def _added(self, img: torch.Tensor, x: torch.Tensor, block_index: int, start: int = 0) -> torch.Tensor:
        """Picture tokens [B, l, C], which begin with token `start`, with the network's output added."""
        hint = self.hint_tokens(x)[:, start : start + img.shape[1]].to(img)
        if hint.shape[1] == 0 or block_index >= len(self.model_patch.model.controlnet_blocks):
            return img
        if hint.shape[0] > 1:
            hint = comfy.utils.repeat_to_batch_size(hint, img.shape[0])
        head, rest = img.split([hint.shape[1], img.shape[1] - hint.shape[1]], dim=1)
        head = head + self.strength * self.model_patch.model.control_block(head, hint, block_index)
        return torch.cat([head, rest], dim=1)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "img": self._added(inputs["img"], inputs["x"], inputs["block_index"])}

    def forward_state(self, state: DiTState, block_index: int) -> DiTState:
        """The same on the tokens that a rank has."""
        img = state.streams["img"]
        start = 0 if state.plan is None else state.plan.bounds(state.lengths["img"])[0]
        return state.with_stream("img", self._added(img, state.sample["x"], block_index, start))

    def to(self, device_or_dtype: Any) -> DiffSynthCnetPatch:
        if isinstance(device_or_dtype, torch.device):
            self._tokens = {size: tokens.to(device_or_dtype) for size, tokens in self._tokens.items()}
        return self

    def models(self) -> list[Any]:
        return [self.model_patch]


class QwenImageDiffsynthControlnet:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "model_patch": ("MODEL_PATCH",),
                "vae": ("VAE",),
                "image": ("IMAGE",),
                "strength": number(1.0, -10.0, 10.0, 0.01),
            },
            "optional": {"mask": ("MASK",)},
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "diffsynth_controlnet"
    CATEGORY = "advanced/loaders/qwen"
    EXPERIMENTAL = True

    def diffsynth_controlnet(
        self,
        model: Any,
        model_patch: Any,
        vae: Any,
        image: torch.Tensor,
        strength: float,
        mask: torch.Tensor | None = None,
    ):
        """mask: 1 where the picture is to be made anew, for inpainting."""
        if not isinstance(model_patch.model, QwenImageBlockWiseControlNet):
            raise ValueError(
                f"the patch network is {type(model_patch.model).__name__}; choose one of qwen_image_*_diffsynth_controlnet"
            )
        model = model.clone()
        keep = None if mask is None else 1.0 - mask.reshape((-1, 1, *mask.shape[-2:]))
        model.set_model_double_block_patch(DiffSynthCnetPatch(model_patch, vae, image[..., :3], strength, keep))
        return (model,)


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (ModelPatchLoader, USOStyleReference, QwenImageDiffsynthControlnet)}
