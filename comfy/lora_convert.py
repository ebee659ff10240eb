"""Adapter files with names of their own -> names `comfy.lora` knows."""

from __future__ import annotations

import torch


def convert_lora_bfl_control(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Black Forest Labs' control LoRAs: bare weight names, biases and norm scales; the input layer grows."""
    out: dict[str, torch.Tensor] = {}
    for key, value in sd.items():
        name = "diffusion_model." + key
        if name.endswith(".lora_B.bias"):
            name = name.removesuffix(".lora_B.bias") + ".diff_b"
        elif name.endswith(".scale"):
            name += ".set_weight"
        out[name] = value
    shape = [sd["img_in.lora_B.weight"].shape[0], sd["img_in.lora_A.weight"].shape[1]]
    out["diffusion_model.img_in.reshape_weight"] = torch.tensor(shape)
    return out


def convert_lora_wan_fun(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Wan Fun files: `lora_unet__` before the block names."""
    return {key.replace("lora_unet__", "lora_unet_", 1): value for key, value in sd.items()}


_PROCESSOR = ".processor."
_PROCESSOR_PARTS = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}


def convert_uso_lora(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """USO's and XLabs' adapters of Flux: `<block>.processor.<part>.down.weight`, with parts named by the order of streams."""
    out: dict[str, torch.Tensor] = {}
    for key, value in sd.items():
        block, found, rest = key.partition(_PROCESSOR)
        part, _, kind = rest.partition(".")
        if found and part in _PROCESSOR_PARTS:
            key = f"{block}.{_PROCESSOR_PARTS[part]}.lora_{kind}"
        out[f"diffusion_model.{key}"] = value
    return out


def _has_processors(sd: dict[str, torch.Tensor]) -> bool:
    endings = tuple(f"{_PROCESSOR}{part}.up.weight" for part in _PROCESSOR_PARTS)
    return any(key.startswith(("double_blocks.", "single_blocks.")) and key.endswith(endings) for key in sd)


def convert_lora(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file under names that `load_lora` understands; itself when it has them already."""
    if "img_in.lora_A.weight" in sd and "single_blocks.0.norm.key_norm.scale" in sd:
        return convert_lora_bfl_control(sd)
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in sd:
        return convert_lora_wan_fun(sd)
    if _has_processors(sd):
        return convert_uso_lora(sd)
    return sd
