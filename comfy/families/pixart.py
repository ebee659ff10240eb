"""PixArt-Alpha and PixArt-Sigma (Huawei Noah's Ark Lab, 2023 and 2024)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families import key_maps
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks

HEAD = 72  # channels of a head in every published model


class PixArtModel(comfy.model_base.BaseModel):
    """PixArt: text; for Alpha the picture's size and ratio, too."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.EPS,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        width, height = kwargs.get("width"), kwargs.get("height")
        if width is not None and height is not None:
            ratio = kwargs.get("aspect_ratio", height / width)
            out["c_size"] = comfy.conds.CONDRegular(torch.FloatTensor([[height, width]]))
            out["c_ar"] = comfy.conds.CONDRegular(torch.FloatTensor([[ratio]]))
        return out


class PixArtAlpha(supported_models_base.BASE):
    """PixArt-Alpha."""

    unet_config = {"image_model": "pixart_alpha"}
    sampling_settings = {
        "beta_schedule": "sqrt_linear", "linear_start": 0.0001, "linear_end": 0.02, "timesteps": 1000,
    }  # fmt: skip
    latent_format: type[Any] = comfy.latent_formats.SD15
    memory_usage_factor = 0.5
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= _sizes_of_file(state_dict, prefix)
        return PixArtModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def process_unet_state_dict(self, state_dict: StateDict) -> StateDict:
        state_dict.pop("pos_embed", None)  # it is computed
        return state_dict

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders.t5_family import PixArtT5XXL, PixArtTokenizer

        return supported_models_base.ClipTarget(PixArtTokenizer, PixArtT5XXL)


class PixArtSigma(PixArtAlpha):
    """PixArt-Sigma: SDXL's VAE."""

    unet_config = {"image_model": "pixart_sigma"}
    latent_format = comfy.latent_formats.SDXL


def _sizes_of_file(sd: StateDict, prefix: str) -> dict[str, int]:
    """Sizes that a file has and that recognition takes for granted."""
    patches, caption = sd.get(f"{prefix}x_embedder.proj.weight"), sd.get(f"{prefix}y_embedder.y_proj.fc1.weight")
    if patches is None or caption is None:
        return {}
    hidden, channels = patches.shape[:2]
    if hidden % HEAD:
        raise ValueError(
            f"PixArt's hidden size must be a multiple of {HEAD} channels (one head), the file has {hidden}"
        )
    sizes = {"hidden_size": hidden, "num_heads": hidden // HEAD, "in_channels": channels}
    return {**sizes, "caption_channels": caption.shape[1]}


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    if f"{prefix}t_block.1.weight" not in sd:
        return None
    alpha = f"{prefix}ar_embedder.mlp.0.weight" in sd
    config: dict[str, Any] = {
        "image_model": "pixart_alpha" if alpha else "pixart_sigma",
        "micro_condition": alpha,
        "num_heads": 16,
        "patch_size": 2,
        "hidden_size": 1152,
        "in_channels": 4,
        "depth": count_blocks(sd, prefix + "blocks.{}."),
    }
    empty = sd.get(f"{prefix}y_embedder.y_embedding")
    if empty is not None:
        config["model_max_length"] = empty.shape[0]
    positions = sd.get(f"{prefix}pos_embed")
    if positions is not None:
        config["input_size"] = int(positions.shape[1] ** 0.5) * config["patch_size"]
        config["pe_interpolation"] = config["input_size"] // 64
    return config


_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    **{f"caption_projection.linear_{n}": f"y_embedder.y_proj.fc{n}" for n in (1, 2)},
    **{
        f"adaln_single.emb.{theirs}_embedder.linear_{n}": f"{ours}_embedder.mlp.{2 * n - 2}"
        for theirs, ours in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar"))
        for n in (1, 2)
    },
}
_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def diffusers_targets(depth: int, hidden: int) -> key_maps.Targets:
    """Diffusers' names of all weights of a network."""
    out = key_maps.linears(_TOP)
    out["scale_shift_table"] = "final_layer.scale_shift_table"
    out["caption_projection.y_embedding"] = "y_embedder.y_embedding"
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}.", f"blocks.{i}."
        out |= key_maps.linears(_BLOCK, theirs, ours)
        out |= key_maps.fused([f"{theirs}attn1.to_{name}" for name in "qkv"], f"{ours}attn.qkv", hidden)
        out |= key_maps.fused([f"{theirs}attn2.to_{name}" for name in "kv"], f"{ours}cross_attn.kv_linear", hidden)
        out[f"{theirs}scale_shift_table"] = f"{ours}scale_shift_table"
    return out


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    if not {"adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"} <= state_dict.keys():
        return None
    depth, hidden = count_blocks(state_dict, "transformer_blocks.{}."), state_dict["pos_embed.proj.bias"].shape[0]
    out = key_maps.assembled(state_dict, diffusers_targets(depth, hidden))
    caption = out.get("y_embedder.y_proj.fc1.weight")
    if caption is not None and "y_embedder.y_embedding" not in out:
        # Newer files leave out what only training needs.
        length = 120 if "ar_embedder.mlp.0.weight" in out else 300
        out["y_embedder.y_embedding"] = caption.new_zeros((length, caption.shape[1]))
    return out


def _lora_keys(network: Any) -> dict[str, Any]:
    targets = key_maps.with_prefix(diffusers_targets(network.depth, network.hidden_size), "diffusion_model.")
    return key_maps.adapter_keys(targets, ("transformer.", "base_model.model.", "unet.base_model.model.", "lora_unet_"))


def _sizes(network: Any) -> Sizes:
    head = network.hidden_size // network.num_heads
    return {"heads": (network.hidden_size, head), "mlp": (network.mlp_size, 1)}


FAMILY = Family(
    name="pixart",
    network="comfy.ldm.pixart.pixartms:PixArtMS",
    detect=detect,
    configurations={"PixArtAlpha": PixArtAlpha, "PixArtSigma": PixArtSigma},
    models={"PixArt": PixArtModel},
    from_diffusers=from_diffusers,
    lora_keys=_lora_keys,
    clip_type="PIXART",
    splits={
        "blocks.*.attn.qkv": Split("column", ("heads", "heads", "heads")),
        "blocks.*.attn.proj": Split("row", ("heads",)),
        "blocks.*.cross_attn.q_linear": Split("column", ("heads",)),
        "blocks.*.cross_attn.kv_linear": Split("column", ("heads", "heads"), ()),  # every rank has the prompt
        "blocks.*.cross_attn.proj": Split("row", ("heads",)),
        "blocks.*.mlp.fc1": Split("column", ("mlp",)),
        "blocks.*.mlp.fc2": Split("row", ("mlp",)),
    },
    sizes=_sizes,
    sizes_from_tensors=True,
)
