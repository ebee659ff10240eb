"""PhotoMaker (Li et al. 2023, arXiv 2312.04461): the face in a picture, merged into a word of a prompt for SDXL."""

from __future__ import annotations

import logging
from typing import Any

import torch

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
from comfy import weight_files
from comfy.clip_vision import clip_preprocess
from comfy.clip_vision_model import CLIPVisionModelProjection, VisionConfig, config_from_state_dict

StateDict = dict[str, torch.Tensor]


class MLP(torch.nn.Module):
    """A norm and two linears with GELU; with `residual` what goes in is added."""

    def __init__(
        self, width: int, out: int, inner: int, residual: bool, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.residual = residual
        self.layernorm = operations.LayerNorm(width, **place)
        self.fc1 = operations.Linear(width, inner, **place)
        self.fc2 = operations.Linear(inner, out, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., out]."""
        out = self.fc2(torch.nn.functional.gelu(self.fc1(self.layernorm(x))))
        return x + out if self.residual else out


class FuseModule(torch.nn.Module):
    """A word's features and a face's as the features of one word."""

    def __init__(self, width: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = (dtype, device, operations)
        self.mlp1 = MLP(2 * width, width, width, False, *place)
        self.mlp2 = MLP(width, width, width, True, *place)
        self.layer_norm = operations.LayerNorm(width, dtype=dtype, device=device)

    def forward(self, words: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
        """Words [n, C] and faces [n, C] -> [n, C]."""
        return self.layer_norm(self.mlp2(words + self.mlp1(torch.cat([words, faces], dim=-1))))


class PhotoMakerIDEncoder(CLIPVisionModelProjection):
    """CLIP's vision tower with a projection for each of SDXL's encoders, whose outputs are a face's features."""

    def __init__(self, config: VisionConfig, second: int, dtype: Any, device: Any, operations: Any) -> None:
        """second: width of SDXL's second encoder (`config.projection` is that of the first)."""
        super().__init__(config, dtype, device, operations)
        assert config.projection is not None
        self.width = config.projection + second
        self.visual_projection_2 = operations.Linear(config.width, second, bias=False, dtype=dtype, device=device)
        self.fuse_module = FuseModule(self.width, dtype, device, operations)

    def forward(  # type: ignore[override]
        self, id_pixel_values: torch.Tensor, prompt_embeds: torch.Tensor, class_tokens_mask: torch.Tensor
    ) -> torch.Tensor:
        """A prompt's features [1, L, C] with faces in the words that are marked.

        id_pixel_values: [1, n, 3, size, size], as `clip_preprocess` makes them; the words marked in class_tokens_mask
        [1, L] take the first faces, one each.
        """
        count = int(class_tokens_mask.sum())
        assert self.visual_projection is not None
        pooled = self.vision_model(id_pixel_values[0, :count])[2]
        faces = torch.cat([self.visual_projection(pooled), self.visual_projection_2(pooled)], dim=-1)
        words = prompt_embeds[class_tokens_mask]
        out = prompt_embeds.clone()
        out[class_tokens_mask] = self.fuse_module(words, faces.to(words)).to(out)
        return out


class PhotoMaker:
    """An identity encoder, where it computes and waits."""

    def __init__(self, model: PhotoMakerIDEncoder, image_size: int, files: Any) -> None:
        self.model, self.image_size = model, image_size
        self.load_device = model_management.text_encoder_device()
        self.patcher: Any = comfy.model_patcher.ModelPatcher(
            model, load_device=self.load_device, offload_device=model_management.text_encoder_offload_device()
        )
        self.patcher.weight_store.loaded_from |= files

    def merged(self, image: torch.Tensor, cond: torch.Tensor, place: int) -> torch.Tensor:
        """Features of a prompt [1, L, C] with the face of the first picture [n, H, W, 3] in 0..1 in token `place`.

        Raises ValueError when the features are not SDXL's, or the prompt has no such token.
        """
        if cond.shape[-1] != self.model.width:
            raise ValueError(
                f"PhotoMaker changes prompts of {self.model.width} features a token (SDXL), this text encoder gives "
                f"{cond.shape[-1]}; connect the CLIP of an SDXL checkpoint"
            )
        if place >= cond.shape[1]:
            raise ValueError(
                f'the word "photomaker" is number {place + 1} of a prompt of {cond.shape[1]} tokens; move it to the front'
            )
        model_management.load_model_gpu(self.patcher)
        pixels = clip_preprocess(image[:1].to(self.load_device), self.image_size).float()
        mask = torch.zeros(cond.shape[:2], dtype=torch.bool, device=self.load_device)
        mask[:, place] = True
        with torch.no_grad():
            out = self.model(pixels.unsqueeze(0), cond.to(self.load_device), mask)
        self.patcher.weight_store.check_files()
        return out.to(cond.device)


def load(path: str) -> PhotoMaker:
    """The identity encoder in a file. Raises ValueError when there is none of PhotoMaker 1, or not all of it."""
    sd: StateDict = comfy.utils.load_torch_file(path, safe_load=True)
    inner: Any = sd.get("id_encoder")  # as its authors save it: beside the weights of a LoRA
    sd = inner if isinstance(inner, dict) else sd
    config, second = config_from_state_dict(sd), sd.get("visual_projection_2.weight")
    if config is None or config.projection is None or second is None:
        raise ValueError(f"{path} holds no identity encoder of PhotoMaker; choose photomaker-v1.bin or one made of it")
    if any(key.startswith("qformer_perceiver.") for key in sd):
        raise ValueError(f"{path} is a file of PhotoMaker 2, which needs a face recogniser; choose photomaker-v1.bin")
    dtype = model_management.text_encoder_dtype(model_management.text_encoder_device())
    model = PhotoMakerIDEncoder(config, second.shape[0], dtype, torch.device("meta"), comfy.ops.manual_cast)
    weights = {key: value.to(dtype) for key, value in sd.items() if value.is_floating_point()}
    result = model.load_state_dict(weights, strict=False, assign=True)
    if result.missing_keys:
        raise ValueError(
            f"{path} lacks {len(result.missing_keys)} weights, first {result.missing_keys[0]}; use a complete file"
        )
    if result.unexpected_keys:
        logging.debug("left over PhotoMaker keys: %s", result.unexpected_keys)
    return PhotoMaker(model.eval().requires_grad_(False), config.image_size, weight_files.files_in(sd))
