"""FLUX.1: dev, schnell, Fill, Kontext and control variants (Black Forest Labs, 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.ldm.flux import keys
from comfy.model_detection import count_blocks, metadata_config

# Least-squares fit of colours (red, green, blue) to each of the latent's 16 channels.
_PREVIEW = [
    [-0.0346, 0.0244, 0.0681],
    [0.0034, 0.021, 0.0687],
    [0.0275, -0.0668, -0.0433],
    [-0.0174, 0.016, 0.0617],
    [0.0859, 0.0721, 0.0329],
    [0.0004, 0.0383, 0.0115],
    [0.0405, 0.0861, 0.0915],
    [-0.0236, -0.0185, -0.0259],
    [-0.0245, 0.025, 0.118],
    [0.1008, 0.0755, -0.0421],
    [-0.0515, 0.0201, 0.0011],
    [0.0428, -0.0012, -0.0036],
    [0.0817, 0.0765, 0.0749],
    [-0.1264, -0.0522, -0.1103],
    [-0.028, -0.0881, -0.0499],
    [-0.1262, -0.0982, -0.0778],
]


class FluxLatent(comfy.latent_formats.LatentFormat):
    """Flux.1's VAE, which other families use too."""

    latent_channels = 16
    scale_factor = 0.3611
    shift_factor = 0.1159
    latent_rgb_factors = _PREVIEW
    latent_rgb_factors_bias = [-0.0329, -0.0718, -0.0851]
    taesd_decoder_name = "taef1_decoder"


class FluxModel(comfy.model_base.BaseModel):
    """FLUX.1 dev, schnell, Fill, Kontext and control variants."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLUX,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
        return kwargs.get("pooled_output")

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        """Fill and control models: the masked picture's latent and its mask at pixel resolution, as channels."""
        network = self.diffusion_model
        channels = network.img_in.weight.shape[1] // network.patch_size**2
        own = self.model_config.unet_config["out_channels"]
        if channels <= own:
            return None
        noise, device = kwargs["noise"], kwargs["device"]
        image = kwargs.get("concat_latent_image")
        image = torch.zeros_like(noise) if image is None else image
        image = comfy.utils.common_upscale(image.to(device), noise.shape[-1], noise.shape[-2], "bilinear", "center")
        image = self.process_latent_in(comfy.utils.resize_to_batch_size(image, noise.shape[0]))
        if channels <= own * 2:
            return image
        mask = kwargs.get("concat_mask", kwargs.get("denoise_mask"))
        mask = torch.ones_like(noise)[:, :1] if mask is None else mask
        mask = mask.mean(dim=1, keepdim=True).to(device)
        mask = comfy.utils.common_upscale(mask, noise.shape[-1] * 8, noise.shape[-2] * 8, "bilinear", "center")
        batch, _, height, width = mask.shape
        mask = mask.reshape(batch, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3)
        mask = comfy.utils.resize_to_batch_size(mask.reshape(batch, 64, height // 8, width // 8), noise.shape[0])
        return torch.cat((image, mask), dim=1)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            patch = self.diffusion_model.patch_size
            grid = tuple(-(-size // patch) for size in kwargs["noise"].shape[-2:])
            reference = kwargs.get("attention_mask_img_shape")
            if reference is not None:
                mask = comfy.model_base.upscale_dit_mask(mask, reference, grid)
                out["attention_mask"] = comfy.conds.CONDRegular(mask)
        guidance = kwargs.get("guidance", 3.5)
        if guidance is not None:
            out["guidance"] = comfy.conds.CONDRegular(torch.FloatTensor([guidance]))
        references = kwargs.get("reference_latents")
        if references is not None:
            out["ref_latents"] = comfy.conds.CONDList([self.process_latent_in(latent) for latent in references])
            method = kwargs.get("reference_latents_method")
            if method is not None:
                out["ref_latents_method"] = comfy.conds.CONDConstant(method)
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        references = kwargs.get("reference_latents")
        if references is None:
            return {}
        tokens = sum(math.prod(latent.shape[2:]) for latent in references)
        return {"ref_latents": [1, 16, tokens]}


class Flux(supported_models_base.BASE):
    """FLUX.1 dev and relatives with guidance distilled in."""

    unet_config = {"image_model": "flux", "guidance_embed": True}
    latent_format = FluxLatent
    memory_usage_factor = 3.1
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLUX

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= sizes_of_file(state_dict, prefix, self.unet_config["axes_dim"])
        return FluxModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.flux as flux

        detected = flux.t5_xxl_detect(state_dict or {}, "text_encoders.t5xxl.transformer.")
        return supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(**detected))


class FluxInpaint(Flux):
    """FLUX.1 Fill."""

    unet_config = {"image_model": "flux", "guidance_embed": True, "in_channels": 96}
    supported_inference_dtypes = (torch.bfloat16, torch.float32)


class FluxSchnell(Flux):
    """FLUX.1 schnell: no guidance, plain flow."""

    unet_config = {"image_model": "flux", "guidance_embed": False}
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW


def rotary_axes(head_size: int) -> list[int]:
    """Flux's split of the head size over picture index, row and column: 1/8, 7/16, 7/16, all even."""
    candidates = [first for first in range(2, head_size, 2) if (head_size - first) % 4 == 0]
    if not candidates:
        raise ValueError(f"a head size of {head_size} cannot be split into three even rotary axes")
    first = min(candidates, key=lambda size: (abs(size - head_size / 8), -size))
    rest = (head_size - first) // 2
    return [first, rest, rest]


def sizes_of_file(sd: StateDict, prefix: str, axes: Sequence[int]) -> dict[str, Any]:
    """Sizes that a file has and that recognition takes for granted. axes: the rotary axes, kept where they fit.

    A ControlNet's file has no last layer, and so tells no `out_channels`.
    """
    block = f"{prefix}double_blocks.0."
    names = {
        "img": f"{prefix}img_in.weight",
        "txt": f"{prefix}txt_in.weight",
        "norm": f"{block}img_attn.norm.key_norm.scale",
        "mlp": f"{block}img_mlp.0.weight",
    }
    if any(name not in sd for name in names.values()):
        return {}
    last = sd.get(f"{prefix}final_layer.linear.weight")
    shapes = {name: sd[key].shape for name, key in names.items()}
    hidden, head = shapes["img"][0], shapes["norm"][0]
    return {
        **({} if last is None else {"out_channels": last.shape[0] // 4}),
        "context_in_dim": shapes["txt"][1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["mlp"][0] / hidden,
        "num_heads": hidden // head,
        "axes_dim": list(axes) if sum(axes) == head else rotary_axes(head),
        "qkv_bias": f"{block}img_attn.qkv.bias" in sd,
    }


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    key_norm = f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale"
    img_in = f"{prefix}img_in.weight"
    if key_norm not in sd or img_in not in sd or f"{prefix}distilled_guidance_layer.norms.0.scale" in sd:
        return None
    if f"{prefix}txt_in.individual_token_refiner.blocks.0.norm1.weight" in sd:
        return None  # HunyuanVideo shares Flux's block names
    patch = 2
    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": sd[img_in].shape[1] // patch**2,
        "patch_size": patch,
        "out_channels": 16,
    }
    vector_in = sd.get(f"{prefix}vector_in.in_layer.weight")
    if vector_in is not None:
        config["vec_in_dim"] = vector_in.shape[1]
    config |= {
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": count_blocks(sd, prefix + "double_blocks.{}."),
        "depth_single_blocks": count_blocks(sd, prefix + "single_blocks.{}."),
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": f"{prefix}guidance_in.in_layer.weight" in sd,
    }
    told = metadata_config(metadata)
    for name in ("axes_dim", "theta"):
        if name in told:
            config[name] = told[name]
    if "axes_dims_rope" in told:
        config["axes_dim"] = list(told["axes_dims_rope"])
    return config


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    blocks = ("transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.attn.to_q.weight")
    if "x_embedder.weight" not in state_dict or not any(key in state_dict for key in blocks):
        return None
    if "distilled_guidance_layer.in_proj.weight" in state_dict:
        return None  # Chroma shares Flux's block names
    return keys.from_diffusers(state_dict)


def _sizes(network: Any) -> Sizes:
    hidden, heads = network.hidden_size, network.num_heads
    return {"heads": (hidden, hidden // heads), "mlp": (int(hidden * network.params.mlp_ratio), 1)}


def _splits() -> dict[str, Split]:
    """Attention in whole heads, MLPs in columns then rows. Modulations, a quarter of the weights, have small outputs."""
    out = {}
    for stream in ("img", "txt"):
        block = f"double_blocks.*.{stream}"
        out[f"{block}_attn.qkv"] = Split("column", ("heads", "heads", "heads"), (stream,))
        out[f"{block}_attn.proj"] = Split("row", ("heads",), (stream,))
        out[f"{block}_mlp.0"] = Split("column", ("mlp",), (stream,))
        out[f"{block}_mlp.2"] = Split("row", ("mlp",), (stream,))
        out[f"{block}_mod.lin"] = Split("gathered")
    out["single_blocks.*.linear1"] = Split("column", ("heads", "heads", "heads", "mlp"))
    out["single_blocks.*.linear2"] = Split("row", ("heads", "mlp"))
    out["single_blocks.*.modulation.lin"] = Split("gathered")
    return out


FAMILY = Family(
    name="flux",
    network="comfy.ldm.flux.model:Flux",
    detect=detect,
    configurations={"FluxInpaint": FluxInpaint, "Flux": Flux, "FluxSchnell": FluxSchnell},
    models={"Flux": FluxModel},
    latent_formats={"Flux": FluxLatent},
    from_diffusers=from_diffusers,
    lora_keys=keys.lora_keys,
    clip_type="FLUX",
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
    full_precision=("double_blocks.*_mod.lin", "single_blocks.*.modulation.lin"),  # small products, large effect
)
