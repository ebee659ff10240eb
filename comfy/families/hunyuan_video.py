"""HunyuanVideo, SkyReels, HunyuanImage 2.1 and its refiner (Tencent 2024, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families import flux
from comfy.families.base import Family, StateDict
from comfy.ldm.flux import keys
from comfy.model_detection import count_blocks

ModelType = comfy.model_base.ModelType


def _like_noise(latent: torch.Tensor, noise: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """A latent in the size, length and batch of `noise`; frames that it lacks are `fill`."""
    if latent.shape[-2:] != noise.shape[-2:]:
        latent = comfy.utils.common_upscale(latent, noise.shape[-1], noise.shape[-2], "bilinear", "center")
    if noise.ndim == 5:
        latent = latent[:, :, : noise.shape[2]]
        lacking = noise.shape[2] - latent.shape[2]
        latent = torch.nn.functional.pad(latent, (0, 0, 0, 0, 0, lacking), value=fill)
    return comfy.utils.resize_to_batch_size(latent, noise.shape[0])


class HunyuanVideoModel(comfy.model_base.BaseModel):
    """HunyuanVideo from text."""

    def __init__(
        self, model_config: Any, model_type: Any = ModelType.FLOW, device: Any = None, unet_model: Any = None
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
        return kwargs.get("pooled_output")

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        regular = comfy.conds.CONDRegular
        for field, name in (("attention_mask", "attention_mask"), ("cross_attn", "c_crossattn")):
            if kwargs.get(field) is not None:
                out[name] = regular(kwargs[field])
        guidance = kwargs.get("guidance", 6.0)
        if guidance is not None:
            out["guidance"] = regular(torch.FloatTensor([guidance]))
        frame = kwargs.get("guiding_frame_index")
        if frame is not None:
            out["guiding_frame_index"] = regular(torch.FloatTensor([frame]))
        reference = kwargs.get("ref_latent")
        if reference is not None:
            out["ref_latent"] = regular(self.process_latent_in(reference))
        return out

    def scale_latent_inpaint(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The known frames without noise."""
        return latent_image


class HunyuanVideoSkyreelsI2VModel(HunyuanVideoModel):
    """SkyReels: the picture's latent as channels."""

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        noise, image = kwargs["noise"], kwargs.get("concat_latent_image")
        if image is None:
            return torch.zeros_like(noise)
        return _like_noise(self.process_latent_in(image.to(kwargs["device"])), noise)


class HunyuanVideoI2VModel(HunyuanVideoSkyreelsI2VModel):
    """HunyuanVideo from a picture, whose latent and mask (1 = known) are channels."""

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        noise = kwargs["noise"]
        image = super().concat_cond(**kwargs)
        assert image is not None
        mask = kwargs.get("concat_mask", kwargs.get("denoise_mask"))
        if mask is None:
            return torch.cat((image, torch.zeros_like(noise)[:, :1]), dim=1)
        if mask.ndim == noise.ndim:
            mask = mask[:, :1]
        axes = noise.ndim - 2
        mask = mask.reshape(-1, 1, *mask.shape[-axes:]).to(kwargs["device"])
        return torch.cat((image, 1.0 - _like_noise(mask, noise, fill=1.0).round()), dim=1)


def _masked(mask: torch.Tensor | None) -> bool:
    """Whether a text mask leaves anything out."""
    return mask is not None and mask.numel() != mask.sum()


class HunyuanImage21Model(comfy.model_base.BaseModel):
    """HunyuanImage 2.1."""

    def __init__(
        self, model_config: Any, model_type: Any = ModelType.FLOW, device: Any = None, unet_model: Any = None
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        regular = comfy.conds.CONDRegular
        if _masked(kwargs.get("attention_mask")):
            out["attention_mask"] = regular(kwargs["attention_mask"])
        fields = (("cross_attn", "c_crossattn"), ("conditioning_byt5small", "txt_byt5"))
        out.update({name: regular(kwargs[field]) for field, name in fields if kwargs.get(field) is not None})
        guidance = kwargs.get("guidance", 6.0)
        if guidance is not None:
            out["guidance"] = regular(torch.FloatTensor([guidance]))
        return out


class HunyuanImage21RefinerModel(HunyuanImage21Model):
    """The refiner of HunyuanImage 2.1: the picture to refine, partly noised, as channels."""

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        noise, image = kwargs["noise"], kwargs.get("concat_latent_image")
        if image is None:
            return torch.zeros_like(noise)
        image = _like_noise(self.process_latent_in(image.to(kwargs["device"])), noise)
        amount = kwargs.get("noise_augmentation", 0.0)
        if amount <= 0:
            return image * 0.75
        generator = torch.Generator("cpu").manual_seed(kwargs.get("seed", 0) - 10)
        added = torch.randn(image.shape, generator=generator, dtype=image.dtype).to(image.device)
        return amount * added + min(1.0 - amount, 0.75) * image

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        out["disable_time_r"] = comfy.conds.CONDConstant(True)
        return out


# Tencent's names of weights, in the order in which they are replaced.
_TENCENT = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.0.", "_in.in_layer."),
    ("_in.mlp.2.", "_in.out_layer."),
)


def our_name(key: str) -> str:
    """A weight's key in our names, from Tencent's."""
    for theirs, ours in _TENCENT:
        key = key.replace(theirs, ours)
    return key


class HunyuanVideo(supported_models_base.BASE):
    """HunyuanVideo from text."""

    widths = (("vector_in.in_layer.weight", "vec_in_dim", 768),)
    unet_config: dict[str, Any] = {"image_model": "hunyuan_video"}
    sampling_settings = {"shift": 7.0}
    latent_format: Any = comfy.latent_formats.HunyuanVideo
    memory_usage_factor = 1.8
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]
    model: type[comfy.model_base.BaseModel] = HunyuanVideoModel

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> ModelType:
        return ModelType.FLOW

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        return self.model(self, ModelType.FLOW, device=device)

    def process_unet_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {our_name(key): value for key, value in state_dict.items()}

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {f"model.model.{key}": value for key, value in state_dict.items()}

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget | None:
        from comfy.text_encoders import hunyuan_video

        return supported_models_base.ClipTarget(
            hunyuan_video.HunyuanVideoTokenizer, hunyuan_video.HunyuanVideoClipModel
        )


class HunyuanVideoI2V(HunyuanVideo):
    """HunyuanVideo from a picture (first version)."""

    unet_config = {"image_model": "hunyuan_video", "in_channels": 33}
    model = HunyuanVideoI2VModel


class HunyuanVideoSkyreelsI2V(HunyuanVideo):
    """SkyReels from a picture."""

    unet_config = {"image_model": "hunyuan_video", "in_channels": 32}
    model = HunyuanVideoSkyreelsI2VModel


class HunyuanImage21(HunyuanVideo):
    """HunyuanImage 2.1, base and distilled."""

    unet_config = {"image_model": "hunyuan_video", "vec_in_dim": None}
    sampling_settings = {"shift": 5.0}
    latent_format: Any = comfy.latent_formats.HunyuanImage21
    memory_usage_factor = 7.7
    model = HunyuanImage21Model

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget | None:
        from comfy.text_encoders import hunyuan_image

        byt5 = any(key.startswith("text_encoders.byt5_small.") for key in state_dict or {})
        return supported_models_base.ClipTarget(hunyuan_image.HunyuanImageTokenizer, hunyuan_image.te(byt5=byt5))


class HunyuanImage21Refiner(HunyuanImage21):
    """The refiner of HunyuanImage 2.1."""

    unet_config = {"image_model": "hunyuan_video", "patch_size": [1, 1, 1], "vec_in_dim": None}
    sampling_settings = {"shift": 4.0}
    latent_format = comfy.latent_formats.HunyuanImage21Refiner
    memory_usage_factor = 1.8
    model = HunyuanImage21RefinerModel


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    if f"{prefix}txt_in.individual_token_refiner.blocks.0.norm1.weight" not in sd:
        return None
    hidden, channels, *patch = sd[f"{prefix}img_in.proj.weight"].shape
    cells = 1
    for size in patch:
        cells *= size

    def any_with(name: str) -> bool:
        return any(key.startswith(prefix + name) for key in sd)

    return {
        "image_model": "hunyuan_video",
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": sd[f"{prefix}final_layer.linear.weight"].shape[0] // cells,
        "vec_in_dim": 768 if any_with("vector_in.") else None,
        "axes_dim": [64, 64] if len(patch) == 2 else [16, 56, 56],
        "meanflow": any_with("time_r_in."),
        "context_in_dim": sd[f"{prefix}txt_in.input_embedder.weight"].shape[1],
        "hidden_size": hidden,
        "mlp_ratio": 4.0,
        "num_heads": hidden // 128,
        "depth": count_blocks(sd, prefix + "double_blocks.{}."),
        "depth_single_blocks": count_blocks(sd, prefix + "single_blocks.{}."),
        "theta": 256,
        "qkv_bias": True,
        "byt5": f"{prefix}byt5_in.fc1.weight" in sd,
        "guidance_embed": any_with("guidance_in."),
    }


_EMBEDDERS = (
    ("time_text_embed.timestep_embedder", "time_in"),
    ("time_text_embed.timestep_embedder_r", "time_r_in"),
    ("time_text_embed.text_embedder", "vector_in"),
    ("time_text_embed.guidance_embedder", "guidance_in"),
    ("context_embedder.time_text_embed.timestep_embedder", "txt_in.t_embedder"),
    ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
)
_REFINER = {
    "norm1": "norm1", "norm2": "norm2", "attn.to_out.0": "self_attn.proj", "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2", "norm_out.linear": "adaLN_modulation.1",
}  # fmt: skip


def _diffusers_key_map(sd: StateDict, hidden: int) -> dict[str, Any]:
    """`{diffusers key: our key}` as `keys.diffusers_key_map`, whose blocks are the same."""
    config = {
        "hidden_size": hidden,
        "depth": count_blocks(sd, "transformer_blocks.{}."),
        "depth_single_blocks": count_blocks(sd, "single_transformer_blocks.{}."),
    }
    blocks = ("transformer_blocks.", "single_transformer_blocks.", "norm_out.")
    out = {key: target for key, target in keys.diffusers_key_map(config).items() if key.startswith(blocks)}
    layers = {
        "x_embedder.proj": "img_in.proj", "proj_out": "final_layer.linear",
        "context_embedder.proj_in": "txt_in.input_embedder",
        **{
            f"context_embedder_2.{theirs}": f"byt5_in.{ours}"
            for theirs, ours in (("norm", "layernorm"), ("linear_1", "fc1"), ("linear_2", "fc2"), ("linear_3", "fc3"))
        },
        **{
            f"{theirs}.linear_{n}": f"{ours}.{'in' if n == 1 else 'out'}_layer"
            for theirs, ours in _EMBEDDERS
            for n in (1, 2)
        },
    }  # fmt: skip
    for i in range(count_blocks(sd, "context_embedder.token_refiner.refiner_blocks.{}.")):
        theirs, ours = (
            f"context_embedder.token_refiner.refiner_blocks.{i}.",
            f"txt_in.individual_token_refiner.blocks.{i}.",
        )
        layers |= {theirs + a: ours + b for a, b in _REFINER.items()}
        for place, name in enumerate("qkv"):
            for kind in ("weight", "bias"):
                out[f"{theirs}attn.to_{name}.{kind}"] = (f"{ours}self_attn.qkv.{kind}", (0, hidden * place, hidden))
    out.update({f"{a}.{kind}": f"{b}.{kind}" for a, b in layers.items() for kind in ("weight", "bias")})
    return out


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    if "context_embedder.token_refiner.refiner_blocks.0.norm1.weight" not in state_dict:
        return None
    hidden = state_dict["x_embedder.proj.weight"].shape[0]
    return keys.put_together(state_dict, _diffusers_key_map(state_dict, hidden))


# Tencent's names of the layers that adapters have, as trainers write them.
_ADAPTER = (
    ("_mod.lin", "_mod.linear"),
    ("_attn.qkv", "_attn_qkv"),
    ("_attn.proj", "_attn_proj"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
    (".modulation.lin", ".modulation.linear"),
)


def lora_keys(network: Any) -> dict[str, Any]:
    """Adapter key prefixes beyond the weights' own names: Tencent's, below two prefixes."""
    out: dict[str, Any] = {}
    for key in network.state_dict():
        if key.endswith(".weight"):
            stem = key.removesuffix(".weight")
            for ours, theirs in _ADAPTER:
                stem = stem.replace(ours, theirs)
            out |= {
                f"transformer.{stem}": f"diffusion_model.{key}",
                f"diffusion_model.{stem}": f"diffusion_model.{key}",
            }
    return out


FAMILY = Family(
    name="hunyuan_video",
    network="comfy.ldm.hunyuan_video.model:HunyuanVideo",
    detect=detect,
    configurations={
        "HunyuanImage21Refiner": HunyuanImage21Refiner,
        "HunyuanImage21": HunyuanImage21,
        "HunyuanVideoSkyreelsI2V": HunyuanVideoSkyreelsI2V,
        "HunyuanVideoI2V": HunyuanVideoI2V,
        "HunyuanVideo": HunyuanVideo,
    },
    models={
        "HunyuanVideo": HunyuanVideoModel,
        "HunyuanVideoI2V": HunyuanVideoI2VModel,
        "HunyuanVideoSkyreelsI2V": HunyuanVideoSkyreelsI2VModel,
        "HunyuanImage21": HunyuanImage21Model,
        "HunyuanImage21Refiner": HunyuanImage21RefinerModel,
    },
    from_diffusers=from_diffusers,
    lora_keys=lora_keys,
    # the blocks are Flux's
    splits=flux.FAMILY.splits,
    sizes=flux.FAMILY.sizes,
    sizes_from_tensors=True,
    full_precision=flux.FAMILY.full_precision,
)
