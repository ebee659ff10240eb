"""Vision transformers whose features condition diffusion models: CLIP (Radford et al. 2021, arXiv 2103.00020) and
SigLIP (Zhai et al. 2023, arXiv 2303.15343), with the weight names of the transformers library.

Both are a convolution into patches, learned positions and the layers of CLIP's text tower without a mask. CLIP has a
class token, a norm before the layers and pools the class token; SigLIP has neither and every token is normed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from comfy.clip_model import CLIPEncoder, CLIPLayer

StateDict = dict[str, torch.Tensor]

# 16 in each of the supported towers: 1024, 1152, 1280 and 1664 channels
HEADS = 16
# Fewer layers have only the small towers (ViT-B), with which no diffusion model was trained.
FEWEST_LAYERS = 23
# OpenAI's CLIP-L is the one with the quick GELU. OpenCLIP's ViT-H and ViT-bigG have 32 and 48 layers.
_MOST_LAYERS_OF_L = 30

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LAYERS = "vision_model.encoder.layers."


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a tower. `image_size` in pixels; `projection` and `llava` are widths, None where there is none."""

    width: int
    layers: int
    inner: int
    patch: int
    positions: int
    image_size: int
    activation: str
    siglip: bool
    projection: int | None = None
    llava: int | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def config_from_state_dict(sd: StateDict) -> VisionConfig | None:
    """The sizes of a tower from its weights; None when they are not those of a supported one."""
    layers = {int(key[len(_LAYERS) :].split(".")[0]) for key in sd if key.startswith(_LAYERS)}
    patches = sd.get("vision_model.embeddings.patch_embedding.weight")
    table = sd.get("vision_model.embeddings.position_embedding.weight")
    inner = sd.get(f"{_LAYERS}0.mlp.fc1.weight")
    if len(layers) < FEWEST_LAYERS or patches is None or patches.ndim != 4 or table is None or inner is None:
        return None
    siglip = "vision_model.embeddings.class_embedding" not in sd
    grid, patch = math.isqrt(table.shape[0] - (0 if siglip else 1)), patches.shape[-1]
    # SigLIP so400m's 27 patches of 14 pixels leave 6 of its 384 pixels unseen
    size = 384 if siglip and (grid, patch) == (27, 14) else grid * patch
    clip_activation = "quick_gelu" if len(layers) <= _MOST_LAYERS_OF_L else "gelu"
    projection, llava = (sd.get(f"{name}.weight") for name in ("visual_projection", "multi_modal_projector.linear_1"))
    return VisionConfig(
        width=patches.shape[0], layers=len(layers), inner=inner.shape[0], patch=patch, positions=table.shape[0],
        image_size=size, activation="gelu_pytorch_tanh" if siglip else clip_activation, siglip=siglip,
        projection=None if siglip or projection is None else projection.shape[0],
        llava=None if llava is None else llava.shape[0],
        mean=(0.5,) * 3 if siglip else CLIP_MEAN, std=(0.5,) * 3 if siglip else CLIP_STD,
    )  # fmt: skip


class VisionEmbeddings(torch.nn.Module):
    """Pictures to tokens with positions, the class token first where there is one."""

    def __init__(self, config: VisionConfig, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.patch_embedding = operations.Conv2d(
            3, config.width, config.patch, stride=config.patch, bias=config.siglip, **place
        )
        self.position_embedding = operations.Embedding(config.positions, config.width, **place)
        if not config.siglip:
            self.class_embedding = torch.nn.Parameter(torch.empty(config.width, **place), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, size, size] -> [B, L, C]. Raises ValueError for pictures of another size than the table's."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = getattr(self, "class_embedding", None)
        if first is not None:
            x = torch.cat([first.to(x).expand(x.shape[0], 1, -1), x], dim=1)
        table = self.position_embedding
        if x.shape[1] != table.num_embeddings:
            raise ValueError(
                f"pictures of {tuple(pixels.shape[2:])} pixels give {x.shape[1]} tokens, but this encoder has positions "
                f"for {table.num_embeddings}; use encode_image, which resizes them"
            )
        return x + table(torch.arange(x.shape[1], device=x.device), out_dtype=x.dtype)


class CLIPVision(torch.nn.Module):
    """The tower without projections."""

    def __init__(self, config: VisionConfig, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = (dtype, device, operations)
        self.embeddings = VisionEmbeddings(config, *place)
        norm = [config.width]
        self.pre_layrnorm = None if config.siglip else operations.LayerNorm(norm, dtype=dtype, device=device)
        make = (config.width, HEADS, config.inner, config.activation, *place)
        self.encoder = CLIPEncoder(CLIPLayer(*make) for _ in range(config.layers))
        self.post_layernorm = operations.LayerNorm(norm, dtype=dtype, device=device)

    def forward(self, pixel_values: torch.Tensor, intermediate_output: Any = None) -> tuple[Any, Any, torch.Tensor]:
        """Pixels [B, 3, size, size] -> (last hidden [B, L, C], chosen hidden or None, pooled).

        SigLIP: the last hidden states are normed, and pooled is the same. CLIP: they are not, and pooled is the normed
        class token [B, C]. Hidden states are chosen as by `clip_model.LayerCollector`.
        """
        x = self.embeddings(pixel_values)
        if self.pre_layrnorm is None:
            x, hidden = self.encoder(x, None, intermediate_output)
            x = self.post_layernorm(x)
            return x, hidden, x
        x, hidden = self.encoder(self.pre_layrnorm(x), None, intermediate_output)
        return x, hidden, self.post_layernorm(x[:, 0])


class LlavaProjector(torch.nn.Module):
    """Patch tokens to a language model's width (Liu et al. 2023, arXiv 2310.03744)."""

    def __init__(self, width: int, out: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(width, out, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(out, out, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, 1 + L, C] -> [B, L, out], without the class token."""
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(hidden[:, 1:])))


class CLIPVisionModelProjection(torch.nn.Module):
    """A tower with what projects its output."""

    def __init__(self, config: VisionConfig, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = (dtype, device, operations)
        self.vision_model = CLIPVision(config, *place)
        self.visual_projection = (
            None
            if config.projection is None
            else operations.Linear(config.width, config.projection, bias=False, dtype=dtype, device=device)
        )
        self.multi_modal_projector = (
            None if config.llava is None else LlavaProjector(config.width, config.llava, *place)
        )

    def forward(self, pixel_values: torch.Tensor, intermediate_output: Any = -2) -> tuple[Any, Any, Any, Any]:
        """(last hidden, chosen hidden, image embeds, what LLaVA sees or None); see `CLIPVision.forward`."""
        x, hidden, pooled = self.vision_model(pixel_values, intermediate_output)
        embeds = pooled if self.visual_projection is None else self.visual_projection(pooled)
        return x, hidden, embeds, None if self.multi_modal_projector is None else self.multi_modal_projector(hidden)


_TOP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def from_open_clip(sd: StateDict, prefix: str) -> StateDict:
    """The vision tower of an OpenCLIP state dict (`<prefix>transformer.resblocks...`) under transformers' names."""
    out: StateDict = {}
    for key, value in sd.items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        if name == "proj":
            out["visual_projection.weight"] = value.transpose(0, 1).contiguous()
        elif name in _TOP:
            out[f"vision_model.{_TOP[name]}"] = value
        elif name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            layer = f"{_LAYERS}{number}"
            stem, _, kind = rest.rpartition(".")
            if stem in _LAYER:
                out[f"{layer}.{_LAYER[stem]}.{kind}"] = value
            elif rest.startswith("attn.in_proj_"):
                for part, third in zip("qkv", value.chunk(3)):
                    out[f"{layer}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = third
    return out
