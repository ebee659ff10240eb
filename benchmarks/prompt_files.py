"""Model files in the real layouts with random weights, for benchmarks of whole prompts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from tests import tiny_models
from tests.tiny_models import Shapes, StateDict, weight_from


@dataclass(frozen=True)
class Scale:
    """Sizes of a network and its encoders; `full` is FLUX.1-dev with T5-XXL and CLIP-L."""

    hidden: int
    double_blocks: int
    single_blocks: int
    head: int
    t5_layers: int
    clip_layers: int
    t5_width: int
    clip_width: int
    vae_base: int


SCALES = {
    "full": Scale(3072, 19, 38, 128, 24, 12, 4096, 768, 128),
    "medium": Scale(1024, 4, 8, 128, 4, 12, 4096, 768, 128),
    "small": Scale(192, 2, 4, 48, 2, 2, 128, 64, 32),
}
LORA_RANK = 16


def _t5(scale: Scale) -> Shapes:
    heads = max(4, scale.t5_width // 64)
    shapes = tiny_models.t5_shapes(scale.t5_width, scale.t5_layers, heads, 64 * heads if heads > 4 else 64)
    if scale.t5_width != 4096:
        return shapes
    # T5-XXL's MLP is 10240 wide, not twice its width
    wide = {key: tuple(10240 if n == 2 * scale.t5_width else n for n in shape) for key, shape in shapes.items()}
    return {key: wide[key] if "DenseReluDense" in key else shape for key, shape in shapes.items()}


def _shapes(scale: Scale) -> dict[str, Shapes]:
    tiny_models.T5_WIDTH, tiny_models.CLIP_WIDTH = scale.t5_width, scale.clip_width
    return {
        "diffusion_models/flux.safetensors": tiny_models.flux_shapes(
            True, scale.double_blocks, scale.single_blocks, scale.hidden, scale.head
        ),
        "text_encoders/clip_l.safetensors": tiny_models.clip_l_shapes(scale.clip_width, scale.clip_layers),
        "text_encoders/t5xxl.safetensors": _t5(scale),
        "vae/ae.safetensors": tiny_models.vae_shapes(16, scale.vae_base, (1, 2, 4, 4), 2),
    }


def _weights(shapes: Shapes, seed: int, device: str, dtype: torch.dtype) -> StateDict:
    """Random weights that keep activations near unit size, made on `device`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    out = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device)
        out[key] = weight_from(key, noise).to(dtype).cpu()
    return out


def _lora(scale: Scale) -> StateDict:
    """A LoRA of the first linear of every single block: the largest weights of the network."""
    generator = torch.Generator().manual_seed(77)
    out = {}
    for i in range(scale.single_blocks):
        name = f"lora_unet_single_blocks_{i}_linear1"
        down = torch.randn(LORA_RANK, scale.hidden, generator=generator)
        out[f"{name}.lora_down.weight"] = down / scale.hidden**0.5
        out[f"{name}.lora_up.weight"] = 0.2 * torch.randn(7 * scale.hidden, LORA_RANK, generator=generator)
        out[f"{name}.alpha"] = torch.tensor(float(LORA_RANK))
    return out


def write_models(base: str, scale: str, device: str) -> float:
    """Write the files below `base`/models, unless they are there; returns the seconds that took."""
    started = time.perf_counter()
    chosen = SCALES[scale]
    mark = os.path.join(base, f"models-{scale}")
    if os.path.exists(mark):
        return 0.0
    for i, (name, shapes) in enumerate(_shapes(chosen).items()):
        path = os.path.join(base, "models", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file(_weights(shapes, i, device, torch.bfloat16), path)
    os.makedirs(os.path.join(base, "models", "loras"), exist_ok=True)
    save_file(_lora(chosen), os.path.join(base, "models", "loras", "lora.safetensors"))
    if device == "cuda":
        torch.cuda.empty_cache()
    with open(mark, "w", encoding="utf-8"):
        return time.perf_counter() - started
