"""Tiny random models in the real file layouts, for tests and for trying the program without any weights.

    python -m tests.tiny_models --family flux --out models/

writes, below the folder given:
    checkpoints/tiny_flux_dev.safetensors        diffusion model, CLIP-L, T5 and VAE in one file
    checkpoints/tiny_flux_schnell.safetensors
    diffusion_models/tiny_flux_dev_bfl.safetensors, tiny_flux_dev_diffusers.safetensors
    text_encoders/tiny_clip_l.safetensors, tiny_t5xxl.safetensors
    vae/tiny_ae.safetensors
    loras/tiny_flux_kohya.safetensors
Other families (the entries of `tests.tiny_families`) have the same kinds of files, with their name for `flux`; whole
checkpoints and text encoders where the vocabulary of these comes with the program. With `--family sd15` or `sdxl` (fewer
blocks, but real widths: 130 and 300 MB)
    checkpoints/tiny_sd15.safetensors, tiny_sdxl.safetensors
    loras/tiny_sd15_kohya.safetensors
`adapters` writes ControlNets, image encoders and style models (`tests.tiny_adapters`), `parts` text encoders, vocabularies
and video VAEs (`tests.tiny_parts`).
Pictures made with them are coloured noise: the weights are random.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save_file

StateDict = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

HIDDEN, HEAD, CLIP_WIDTH, T5_WIDTH = 96, 24, 64, 64


def weight_from(key: str, noise: torch.Tensor) -> torch.Tensor:
    """A weight of a size that keeps activations near 1, from standard normal numbers of its shape."""
    if ("norm" in key or noise.ndim == 1) and key.endswith(("weight", "scale")):
        return 1 + 0.1 * noise
    if "embedding" in key or key.endswith("shared.weight") or "relative_attention_bias" in key:
        return 0.5 * noise
    if noise.ndim == 1:
        return 0.02 * noise
    return noise / math.sqrt(math.prod(noise.shape[1:]))


def random_weights(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    """Weights that keep activations near unit size; each depends only on its key, its shape and `seed`."""
    out = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)
        out[key] = weight_from(key, torch.randn(shape, generator=generator)).to(dtype)
    return out


def _linear(out: Shapes, name: str, rows: int, cols: int, bias: bool = True) -> None:
    out[f"{name}.weight"] = (rows, cols)
    if bias:
        out[f"{name}.bias"] = (rows,)


def flux_shapes(
    guidance: bool = True, depth: int = 2, single: int = 3, hidden: int = HIDDEN, head: int = HEAD
) -> Shapes:
    """Keys and shapes of a Flux network, with Black Forest Labs' names."""
    out: Shapes = {}
    _linear(out, "img_in", hidden, 64)
    _linear(out, "txt_in", hidden, T5_WIDTH)
    embedders = {"time_in": 256, "vector_in": CLIP_WIDTH} | ({"guidance_in": 256} if guidance else {})
    for name, width in embedders.items():
        _linear(out, f"{name}.in_layer", hidden, width)
        _linear(out, f"{name}.out_layer", hidden, hidden)
    for i in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            _linear(out, f"{block}_mod.lin", 6 * hidden, hidden)
            _linear(out, f"{block}_attn.qkv", 3 * hidden, hidden)
            _linear(out, f"{block}_attn.proj", hidden, hidden)
            _linear(out, f"{block}_mlp.0", 4 * hidden, hidden)
            _linear(out, f"{block}_mlp.2", hidden, 4 * hidden)
            for kind in ("query", "key"):
                out[f"{block}_attn.norm.{kind}_norm.scale"] = (head,)
    for i in range(single):
        block = f"single_blocks.{i}"
        _linear(out, f"{block}.linear1", 7 * hidden, hidden)
        _linear(out, f"{block}.linear2", hidden, 5 * hidden)
        _linear(out, f"{block}.modulation.lin", 3 * hidden, hidden)
        for kind in ("query", "key"):
            out[f"{block}.norm.{kind}_norm.scale"] = (head,)
    _linear(out, "final_layer.linear", 64, hidden)
    _linear(out, "final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return out


def clip_l_shapes(width: int = CLIP_WIDTH, layers: int = 2) -> Shapes:
    """Keys and shapes of a CLIP text encoder."""
    out: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(out, f"{layer}.self_attn.{name}", width, width)
        _linear(out, f"{layer}.mlp.fc1", 4 * width, width)
        _linear(out, f"{layer}.mlp.fc2", width, 4 * width)
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{layer}.{name}.weight"] = out[f"{layer}.{name}.bias"] = (width,)
    out["text_model.final_layer_norm.weight"] = out["text_model.final_layer_norm.bias"] = (width,)
    return out


def t5_shapes(width: int = T5_WIDTH, layers: int = 2, heads: int = 4, inner: int = 64) -> Shapes:
    """Keys and shapes of a T5 v1.1 encoder."""
    out: Shapes = {"shared.weight": (32128, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for name in "qkv":
            out[f"{attention}.SelfAttention.{name}.weight"] = (inner, width)
        out[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        out[f"{mlp}.DenseReluDense.wi_0.weight"] = out[f"{mlp}.DenseReluDense.wi_1.weight"] = (2 * width, width)
        out[f"{mlp}.DenseReluDense.wo.weight"] = (width, 2 * width)
        out[f"{attention}.layer_norm.weight"] = out[f"{mlp}.layer_norm.weight"] = (width,)
    out["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return out


def _conv(out: Shapes, name: str, rows: int, cols: int, size: int = 3) -> None:
    out[f"{name}.weight"] = (rows, cols, size, size)
    out[f"{name}.bias"] = (rows,)


def _res_block(out: Shapes, name: str, cols: int, rows: int) -> None:
    for kind, width in (("norm1", cols), ("norm2", rows)):
        out[f"{name}.{kind}.weight"] = out[f"{name}.{kind}.bias"] = (width,)
    _conv(out, f"{name}.conv1", rows, cols)
    _conv(out, f"{name}.conv2", rows, rows)
    if cols != rows:
        _conv(out, f"{name}.nin_shortcut", rows, cols, 1)


def _middle(out: Shapes, name: str, width: int) -> None:
    _res_block(out, f"{name}.block_1", width, width)
    _res_block(out, f"{name}.block_2", width, width)
    out[f"{name}.attn_1.norm.weight"] = out[f"{name}.attn_1.norm.bias"] = (width,)
    for kind in ("q", "k", "v", "proj_out"):
        _conv(out, f"{name}.attn_1.{kind}", width, width, 1)


def vae_shapes(channels: int = 16, base: int = 32, mult: tuple[int, ...] = (1, 2, 2, 2), blocks: int = 1) -> Shapes:
    """Keys and shapes of Flux's image VAE (no quantisation convolutions)."""
    out: Shapes = {}
    widths = [base * m for m in mult]
    _conv(out, "encoder.conv_in", base, 3)
    last = base
    for level, width in enumerate(widths):
        for i in range(blocks):
            _res_block(out, f"encoder.down.{level}.block.{i}", last, width)
            last = width
        if level < len(widths) - 1:
            _conv(out, f"encoder.down.{level}.downsample.conv", width, width)
    _middle(out, "encoder.mid", last)
    out["encoder.norm_out.weight"] = out["encoder.norm_out.bias"] = (last,)
    _conv(out, "encoder.conv_out", 2 * channels, last)
    _conv(out, "decoder.conv_in", last, channels)
    _middle(out, "decoder.mid", last)
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            _res_block(out, f"decoder.up.{level}.block.{i}", last, widths[level])
            last = widths[level]
        if level > 0:
            _conv(out, f"decoder.up.{level}.upsample.conv", last, last)
    out["decoder.norm_out.weight"] = out["decoder.norm_out.bias"] = (last,)
    _conv(out, "decoder.conv_out", 3, last)
    return out


def vae_4_shapes() -> Shapes:
    """Keys and shapes of an image VAE with four channels, as SD, SDXL, PixArt and HunyuanDiT have."""
    out = vae_shapes(channels=4)
    _conv(out, "quant_conv", 8, 8, 1)
    _conv(out, "post_quant_conv", 4, 4, 1)
    return out


def clip_g_shapes() -> Shapes:
    """Keys and shapes of OpenCLIP's bigG: it is told by its number of layers."""
    return {**clip_l_shapes(CLIP_WIDTH, 32), "text_projection.weight": (CLIP_WIDTH, CLIP_WIDTH)}


def renamed(state_dict: StateDict, targets: dict[str, Any]) -> StateDict:
    """Our keys -> diffusers', by a map of diffusers' names; the inverse of loading."""
    out = {}
    for theirs, target in targets.items():
        key = target if isinstance(target, str) else target[0]
        if key not in state_dict:
            continue
        value = state_dict[key]
        if not isinstance(target, str):
            value = target[2](value) if target[1] is None else value.narrow(*target[1])
        out[theirs] = value.contiguous()
    return out


def to_diffusers(state_dict: StateDict) -> StateDict:
    """Black Forest Labs' Flux keys -> diffusers'; the inverse of loading."""
    from comfy.ldm.flux.keys import diffusers_key_map

    depth = 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith("double_blocks."))
    single = 1 + max((int(k.split(".")[1]) for k in state_dict if k.startswith("single_blocks.")), default=-1)
    config = {"hidden_size": HIDDEN, "depth": depth, "depth_single_blocks": single, "mlp_ratio": 4.0}
    return renamed(state_dict, diffusers_key_map(config))


def kohya_lora(rank: int = 4, seed: int = 5) -> StateDict:
    """A LoRA for the tiny Flux models, strong enough to change a picture plainly."""
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * HIDDEN, HIDDEN),
        "double_blocks_1_txt_mlp_0": (4 * HIDDEN, HIDDEN),
        "single_blocks_0_linear1": (7 * HIDDEN, HIDDEN),
        "single_blocks_2_linear2": (HIDDEN, 5 * HIDDEN),
    }
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (rows, cols) in shapes.items():
        out[f"lora_unet_{name}.lora_down.weight"] = torch.randn((rank, cols), generator=generator) / cols**0.5
        out[f"lora_unet_{name}.lora_up.weight"] = torch.randn((rows, rank), generator=generator)
        out[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
    return out


def checkpoint(guidance: bool = True, seed: int = 1) -> StateDict:
    """A whole tiny Flux model under the keys of an all-in-one file."""
    parts = {
        "model.diffusion_model.": random_weights(flux_shapes(guidance), seed),
        "text_encoders.clip_l.transformer.": random_weights(clip_l_shapes(), seed + 1),
        "text_encoders.t5xxl.transformer.": random_weights(t5_shapes(), seed + 2),
        "vae.": random_weights(vae_shapes(), seed + 3),
    }
    return {prefix + key: value for prefix, weights in parts.items() for key, value in weights.items()}


def write_flux(out: str) -> list[str]:
    """Write every tiny Flux file below `out`; returns their paths."""
    diffusion = random_weights(flux_shapes(), 1)
    files: dict[str, Callable[[], StateDict]] = {
        "checkpoints/tiny_flux_dev.safetensors": checkpoint,
        "checkpoints/tiny_flux_schnell.safetensors": lambda: checkpoint(guidance=False, seed=11),
        "diffusion_models/tiny_flux_dev_bfl.safetensors": lambda: diffusion,
        "diffusion_models/tiny_flux_dev_diffusers.safetensors": lambda: to_diffusers(diffusion),
        "text_encoders/tiny_clip_l.safetensors": lambda: random_weights(clip_l_shapes(), 2),
        "text_encoders/tiny_t5xxl.safetensors": lambda: random_weights(t5_shapes(), 3),
        "vae/tiny_ae.safetensors": lambda: random_weights(vae_shapes(), 4),
        "loras/tiny_flux_kohya.safetensors": kohya_lora,
    }
    return write_files(files, out)


def write_files(
    files: Mapping[str, Callable[[], StateDict]], out: str, metadata: dict[str, str] | None = None
) -> list[str]:
    """Write files by their names below `out`, all with the same metadata; returns their paths."""
    written = []
    for name, make in files.items():
        path = os.path.join(out, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_file({key: value.contiguous() for key, value in make().items()}, path, metadata)
        written.append(path)
    return written


def write_family(name: str, out: str) -> list[str]:
    """Write the tiny files of a family below `out`; returns their paths."""
    if name == "flux":
        return write_flux(out)
    from tests import tiny_adapters, tiny_families, tiny_parts, tiny_unets

    if name == "parts":
        return [*tiny_parts.write_vocabularies(out), *write_files(tiny_parts.FILES, out)]
    own = {"adapters": tiny_adapters.FILES, **tiny_unets.FILES}
    metadata = tiny_families.TINY[name].metadata if name in tiny_families.TINY else None
    return write_files(own.get(name) or tiny_families.files(name), out, metadata)


def main() -> None:
    """Command line."""
    from tests import tiny_families, tiny_unets

    names = sorted({"adapters", "parts", *tiny_families.TINY, *tiny_unets.FILES})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=names, default="flux")
    parser.add_argument("--out", default="models", help="models folder to write into")
    arguments = parser.parse_args()
    for path in write_family(arguments.family, arguments.out):
        print(path)


if __name__ == "__main__":
    main()
