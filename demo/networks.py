"""The demo model's networks: Flux.1's architecture in small, built from the program's own modules, and its files."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import comfy.ops
from comfy.clip_model import CLIPTextModel_
from comfy.families.flux import rotary_axes
from comfy.ldm.flux.model import Flux
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.text_encoders.t5 import T5

StateDict = dict[str, torch.Tensor]

CLIP_LENGTH = 77
T5_LENGTH = 256  # Flux's prompts are padded to this many T5 tokens, without a mask
CLIP_WIDTH, T5_WIDTH = 32, 64
LATENT_CHANNELS = 16
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159  # Flux's latent format (FLUX.1 model card)
CHECKPOINT = os.path.join("checkpoints", "taco_dit_demo.safetensors")
LORA = os.path.join("loras", "taco_dit_demo_night.safetensors")

_FLUX = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "vec_in_dim": CLIP_WIDTH,
    "context_in_dim": T5_WIDTH,
    "hidden_size": 192,
    "mlp_ratio": 4.0,
    "num_heads": 6,
    "depth": 2,
    "depth_single_blocks": 6,
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
_CLIP = {
    "vocab_size": 49408,
    "hidden_size": CLIP_WIDTH,
    "num_attention_heads": 1,
    "intermediate_size": 4 * CLIP_WIDTH,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": CLIP_LENGTH,
    "eos_token_id": 49407,
}
_T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": T5_WIDTH,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 4 * T5_WIDTH,
    "num_layers": 3,
    "is_gated_act": True,
    "dense_act_fn": "gelu_pytorch_tanh",
    "relative_attention_num_buckets": 32,
}
_VAE = {
    "ch": 32,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": LATENT_CHANNELS,
    "double_z": True,
}


def _initialise(network: nn.Module) -> nn.Module:
    """Start values: normal weights of variance 1 / inputs, zero biases, unit norms; everything trains."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                if isinstance(module, nn.Embedding):
                    parameter.normal_(std=0.5 if parameter.shape[0] > 1000 else 0.1)
                elif parameter.ndim > 1:
                    parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
                else:
                    parameter.fill_(0.0 if name == "bias" else 1.0)
            parameter.requires_grad_(True)
    return network


def _zero(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class TextAndPicture(nn.Module):
    """What is trained together for pictures from captions: `dit`, `t5`, `clip`, fp32 parameters."""

    def __init__(self) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
        axes = rotary_axes(_FLUX["hidden_size"] // _FLUX["num_heads"])
        self.dit = _initialise(Flux(**_FLUX, axes_dim=axes, **make))
        self.t5 = _initialise(T5(_T5, **make))
        clip = nn.Module()
        clip.text_model = CLIPTextModel_(_CLIP, **make)
        self.clip = _initialise(clip)
        # Blocks begin as the identity and the answer as zero (Peebles & Xie 2022).
        for block in (*self.dit.double_blocks, *self.dit.single_blocks):
            for name in ("img_mod", "txt_mod", "modulation"):
                if hasattr(block, name):
                    _zero(getattr(block, name).lin)
        _zero(self.dit.final_layer.adaLN_modulation[1], self.dit.final_layer.linear)

    def text(self, t5_ids: torch.Tensor, clip_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 ids [B, L] and CLIP ids [B, n] with an end -> (context [B, L, T5_WIDTH], pooled [B, CLIP_WIDTH])."""
        return self.t5(t5_ids)[0], self.clip.text_model(clip_ids)[2]


def new_vae() -> AutoencoderKL:
    """Encoder and decoder with start values."""
    vae = AutoencoderKL(_VAE)
    _initialise(vae)
    return vae


def latent_of(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] in 0..1 -> latents as the diffusion network sees them."""
    return (vae.encode(pictures * 2 - 1) - LATENT_SHIFT) * LATENT_SCALE


def pictures_of(vae: AutoencoderKL, latent: torch.Tensor) -> torch.Tensor:
    """Latents as the diffusion network sees them -> pictures in about 0..1."""
    return vae.decode(latent / LATENT_SCALE + LATENT_SHIFT) / 2 + 0.5


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make an encoder whose output has this mean and deviation per channel [C] give latents of mean 0, deviation 1."""
    moments, count = vae.encoder.conv_out, len(mean)
    moments.bias[:count] = (moments.bias[:count] - mean) / (std * LATENT_SCALE) + LATENT_SHIFT
    moments.weight[:count] /= (std * LATENT_SCALE)[:, None, None, None]


def checkpoint(model: StateDict, vae: StateDict) -> StateDict:
    """Trained weights under the keys of an all-in-one file, in half precision.

    model: state of `TextAndPicture`; vae: state of the VAE.
    """
    names = {
        "dit.": "model.diffusion_model.",
        "t5.": "text_encoders.t5xxl.transformer.",
        "clip.": "text_encoders.clip_l.transformer.",
    }
    out = {}
    for key, value in model.items():
        part = key[: key.index(".") + 1]
        out[names[part] + key[len(part) :]] = value
    out |= {"vae." + key: value for key, value in vae.items()}
    return {key: value.detach().half().cpu().contiguous() for key, value in out.items()}


def write(path: str, weights: StateDict, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(weights, path + ".part", metadata=metadata)
    os.replace(path + ".part", path)
