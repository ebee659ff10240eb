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


def convert_lora(sd: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file under names that `load_lora` understands; itself when it has them already."""
    if "img_in.lora_A.weight" in sd and "single_blocks.0.norm.key_norm.scale" in sd:
        return convert_lora_bfl_control(sd)
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in sd:
        return convert_lora_wan_fun(sd)
    return sd
