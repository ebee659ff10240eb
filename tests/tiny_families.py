"""A tiny configuration of every family: a family with an entry here is in the tests over all families.

Files made from an entry have the real layout of the family, so they are recognised and loaded as real ones are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

import comfy.families
import comfy.supported_models
from comfy.families import auraflow, pixart, sd3
from tests import tiny_models
from tests.tiny_models import CLIP_WIDTH, T5_WIDTH, Shapes, StateDict

_ENCODERS: dict[str, Callable[[], Shapes]] = {
    "clip_l": tiny_models.clip_l_shapes,
    "clip_g": tiny_models.clip_g_shapes,
    "t5xxl": tiny_models.t5_shapes,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny network of a family.

    configuration: the public name of its class in `comfy.supported_models`. config: the network's arguments.
    text: tokens and width of the prompt's features. fields: what else a conditioning has, from a generator.
    channels: of its latents. encoders: its text encoders that a whole checkpoint has. targets: diffusers' names.
    frames: latent frames of a video, None for families of pictures. told: names of the network's arguments that a file's
    metadata must tell, because shapes are not asked for them.
    """

    configuration: str
    config: Mapping[str, Any]
    text: tuple[int, int]
    channels: int = 16
    fields: Callable[[torch.Generator], dict[str, Any]] = lambda generator: {}
    encoders: tuple[str, ...] = ()
    targets: Mapping[str, Any] | None = None
    frames: int | None = None
    told: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, str] | None:
        """The metadata of a file."""
        told = {name: self.config[name] for name in self.told}
        return {"config": json.dumps({"transformer": told})} if told else None

    def latent(self, pictures: int, height: int, width: int) -> torch.Tensor:
        """Zeros in the shape of the family's latents."""
        frames = () if self.frames is None else (self.frames,)
        return torch.zeros((pictures, self.channels, *frames, height, width))

    @property
    def family(self) -> comfy.families.Family:
        """The record."""
        return next(f for f in comfy.families.records() if self.configuration in f.configurations)

    def model(self, device: Any = "meta") -> Any:
        """The model without weights of use."""
        config = self.kind()(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        return config.get_model({}, device=device)

    def network(self, device: Any = "meta") -> Any:
        """Its network."""
        return self.model(device).diffusion_model

    def kind(self) -> Any:
        """The class of its configuration."""
        return getattr(comfy.supported_models, self.configuration)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and shapes of the network's weights."""
        return {name: tuple(value.shape) for name, value in self.network().state_dict().items()}

    def linears(self) -> list[tuple[str, torch.nn.Linear]]:
        """(name, module) of the linears of the network's blocks; of UNets, all."""
        network = self.network()
        blocks = network.block_list() if hasattr(network, "block_list") else []
        parts = {f"{block.name}.": block.module for block in blocks} or {"": network}
        return [
            (prefix + name, module)
            for prefix, part in parts.items()
            for name, module in part.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]

    def conditioning(self, seed: int) -> list[Any]:
        """A prompt's features and fields, as encoding nodes give them."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn((1, *self.text), generator=generator)
        return [[text, self.fields(generator)]]


def _pooled(width: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"pooled_output": torch.randn((1, width), generator=generator)}


def _hunyuan(generator: torch.Generator) -> dict[str, Any]:
    return {
        "attention_mask": (torch.arange(77) < 9).long()[None],
        "conditioning_mt5xl": torch.randn((1, 256, 24), generator=generator),
        "attention_mask_mt5xl": (torch.arange(256) < 40).long()[None],
    }


def _sd3(depth: int, **more: Any) -> Tiny:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    config = {
        "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": depth, "input_size": None,
        "adm_in_channels": 2 * CLIP_WIDTH, "context_embedder_config": context, "num_patches": 1024, "pos_embed_max_size": 32,
        "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [], **more,
    }  # fmt: skip
    return Tiny(
        "SD3", config, (7, 4096), fields=_pooled(2 * CLIP_WIDTH), encoders=("clip_l", "clip_g"),
        targets=sd3.diffusers_targets(depth),
    )  # fmt: skip


def _pixart(alpha: bool) -> Tiny:
    config = {
        "image_model": "pixart_alpha" if alpha else "pixart_sigma", "micro_condition": alpha, "num_heads": 2,
        "hidden_size": 144, "depth": 2, "caption_channels": T5_WIDTH, "model_max_length": 120 if alpha else 300,
    }  # fmt: skip
    return Tiny(
        "PixArtAlpha" if alpha else "PixArtSigma", config, (7, T5_WIDTH), 4, encoders=("t5xxl",),
        targets=pixart.diffusers_targets(2, 144),
    )  # fmt: skip


def _hydit(old: bool) -> dict[str, Any]:
    return {
        "image_model": "hydit", "depth": 4, "hidden_size": 96, "num_heads": 3, "mlp_ratio": 4.0, "text_states_dim": 40,
        "text_states_dim_t5": 24, "size_cond": old, "use_style_cond": old,
    }  # fmt: skip


def _wan(kind: str, in_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "image_model": "wan2.1", "model_type": kind, "dim": 256, "out_dim": 16, "num_heads": 2, "ffn_dim": 96,
        "num_layers": 2, "in_dim": in_dim, **more,
    }  # fmt: skip


def _hunyuan_video(**more: Any) -> dict[str, Any]:
    return {
        "image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16,
        "vec_in_dim": 768, "axes_dim": [16, 56, 56], "meanflow": False, "context_in_dim": 40, "hidden_size": 256,
        "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True,
        "byt5": False, "guidance_embed": True, **more,
    }  # fmt: skip


class _Vision:
    """What a CLIP vision model gives."""

    def __init__(self, generator: torch.Generator) -> None:
        self.penultimate_hidden_states = torch.randn((1, 5, 1280), generator=generator)


def _guided(generator: torch.Generator) -> dict[str, Any]:
    return {**_pooled(768)(generator), "guiding_frame_index": 0}


def _vace(generator: torch.Generator) -> dict[str, Any]:
    return {"vace_strength": [0.7]}


_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
    "joint_attention_dim": 40, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
_QWEN_TOLD = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")

TINY: dict[str, Tiny] = {
    "flux": Tiny(
        "Flux",
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 24,
            "context_in_dim": 40, "hidden_size": 72, "mlp_ratio": 4.0, "num_heads": 3, "depth": 1,
            "depth_single_blocks": 2, "axes_dim": [4, 10, 10], "theta": 10000, "qkv_bias": True,
            "guidance_embed": True,
        },
        (7, 40), fields=_pooled(24),
    ),
    "sd3": _sd3(2),
    "sd35_large": _sd3(3, qk_norm="rms"),
    "sd35_medium": _sd3(3, qk_norm="rms", x_block_self_attn_layers=[0, 1]),
    "pixart_alpha": _pixart(True),
    "pixart_sigma": _pixart(False),
    "hunyuan_dit": Tiny("HunyuanDiT", _hydit(False), (77, 40), 4, _hunyuan),
    "hunyuan_dit_1": Tiny("HunyuanDiT", _hydit(True), (77, 40), 4, _hunyuan),
    "auraflow": Tiny(
        "AuraFlow",
        {
            "dim": 512, "n_heads": 2, "global_conddim": 512, "cond_seq_dim": 2048, "max_seq": 256,
            "n_double_layers": 1, "n_layers": 2,
        },
        (7, 2048), 4, targets=auraflow.diffusers_targets(1, 2),
    ),
    "chroma": Tiny(
        "Chroma",
        {
            "image_model": "chroma", "context_in_dim": T5_WIDTH, "hidden_size": 72, "num_heads": 3, "depth": 1,
            "depth_single_blocks": 2, "axes_dim": [4, 10, 10], "out_dim": 72, "hidden_dim": 48, "n_layers": 2,
        },
        (7, T5_WIDTH), encoders=("t5xxl",),
    ),
    "lumina2": Tiny(
        "Lumina2",
        {
            "image_model": "lumina2", "in_channels": 16, "dim": 96, "cap_feat_dim": 40, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 2, "qk_norm": True, "axes_dims": [8, 8, 8],
        },
        (7, 40), fields=lambda generator: {"attention_mask": (torch.arange(7) < 5).long()[None]},
    ),
    "ltxv": Tiny(
        "LTXV",
        {"image_model": "ltxv", "num_layers": 2, "attention_head_dim": 2, "cross_attention_dim": 64}, (7, 4096), 128,
        lambda generator: {"attention_mask": (torch.arange(7) < 5).long()[None]}, frames=3,
    ),
    "hunyuan_video": Tiny("HunyuanVideo", _hunyuan_video(), (7, 40), fields=_pooled(768), frames=3),
    "hunyuan_video_guided": Tiny("HunyuanVideo", _hunyuan_video(), (7, 40), fields=_guided, frames=3),
    "hunyuan_image": Tiny(
        "HunyuanImage21",
        _hunyuan_video(
            in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[64, 64], guidance_embed=False,
        ),
        (7, 40), 64,
    ),
    "wan_t2v": Tiny("WAN21_T2V", _wan("t2v", 16), (7, 4096), frames=3),
    "wan_i2v": Tiny(
        "WAN21_I2V", _wan("i2v", 36), (7, 4096), fields=lambda generator: {"clip_vision_output": _Vision(generator)},
        frames=2,
    ),
    "wan_vace": Tiny(
        "WAN21_Vace", _wan("vace", 16, vace_in_dim=96, vace_layers=1), (7, 4096), fields=_vace, frames=3,
    ),
    "wan_5b": Tiny("WAN22_T2V", _wan("t2v", 48, out_dim=48), (7, 4096), 48, frames=3),
    "qwen_image": Tiny("QwenImage", _QWEN, (7, 40), frames=1, told=_QWEN_TOLD),
    "qwen_image_edit": Tiny(
        "QwenImage", {**_QWEN, "default_ref_method": "index_timestep_zero"}, (7, 40),
        fields=lambda generator: {"reference_latents": [torch.randn((1, 16, 1, 5, 7), generator=generator)]}, frames=1,
        told=_QWEN_TOLD,
    ),
}  # fmt: skip


def _unet(configuration: str, **more: Any) -> Tiny:
    config = {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
        "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 0, 1], "transformer_depth_middle": 1,
        "context_dim": 24, **more,
    }  # fmt: skip
    return Tiny(configuration, config, (7, 24), 4, _pooled(24) if more else lambda generator: {})


# UNets, which are recognised by their real widths: no files are made of these. Their vector is the pooled prompt of 24 and
# six sizes of 256.
UNETS: dict[str, Tiny] = {
    "sd15": _unet("SD15"),
    "sdxl": _unet("SDXL", use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=24 + 6 * 256),
}


def kohya_lora(tiny: Tiny, rank: int = 4) -> StateDict:
    """A LoRA on one linear in three of the blocks of a tiny network."""
    generator, out = torch.Generator().manual_seed(9), {}
    for linear, module in tiny.linears()[::3]:
        stem = f"lora_unet_{linear.replace('.', '_')}"
        down = torch.randn((rank, module.in_features), generator=generator)
        out[f"{stem}.lora_down.weight"] = down / module.in_features**0.5
        out[f"{stem}.lora_up.weight"] = torch.randn((module.out_features, rank), generator=generator)
        out[f"{stem}.alpha"] = torch.tensor(float(rank))
    return out


def checkpoint(tiny: Tiny) -> StateDict:
    """A whole tiny model under the keys of an all-in-one file."""
    kind = tiny.kind()
    vae = tiny_models.vae_shapes() if tiny.channels == 16 else tiny_models.vae_4_shapes()
    parts = {"model.diffusion_model.": tiny.shapes(), kind.vae_key_prefix[0]: vae}
    for encoder in tiny.encoders:
        parts[f"{kind.text_encoder_key_prefix[0]}{encoder}.transformer."] = _ENCODERS[encoder]()
    return {
        prefix + key: value
        for seed, (prefix, shapes) in enumerate(parts.items(), 21)
        for key, value in tiny_models.random_weights(shapes, seed).items()
    }


def files(name: str) -> dict[str, Callable[[], StateDict]]:
    """{path below a models folder: what makes the file} of a family."""
    tiny = TINY[name]
    weights = tiny_models.random_weights(tiny.shapes(), 21)
    vae = ("tiny_ae", tiny_models.vae_shapes) if tiny.channels == 16 else ("tiny_vae", tiny_models.vae_4_shapes)
    out: dict[str, Callable[[], StateDict]] = {
        f"diffusion_models/tiny_{name}.safetensors": lambda: weights,
        f"loras/tiny_{name}_kohya.safetensors": lambda: kohya_lora(tiny),
    }
    if tiny.frames is None and tiny.channels in (4, 16):  # others have VAEs of their own
        out[f"vae/{vae[0]}.safetensors"] = lambda: tiny_models.random_weights(vae[1](), 4)
    if tiny.targets is not None:
        targets = dict(tiny.targets)
        diffusers = f"diffusion_models/tiny_{name}_diffusers.safetensors"
        out[diffusers] = lambda: tiny_models.renamed(weights, targets)
    if tiny.encoders:
        out[f"checkpoints/tiny_{name}.safetensors"] = lambda: checkpoint(tiny)
    for seed, encoder in enumerate(tiny.encoders, 2):
        shapes = _ENCODERS[encoder]()
        path = f"text_encoders/tiny_{encoder}.safetensors"
        out[path] = functools.partial(tiny_models.random_weights, shapes, seed)
    return out
