"""Wan 2.1 and 2.2: text, images, controls and camera paths to video (Wan Team 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict, network_class
from comfy.model_detection import count_blocks, metadata_config

_NETWORK = "comfy.ldm.wan.model:WanModel"
_MASK_CHANNELS = 4


def _fitting(latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A latent [b, C, F, h, w] in the size and batch of `noise`."""
    return comfy.utils.resize_to_batch_size(
        comfy.utils.common_upscale(latent, noise.shape[-1], noise.shape[-2], "bilinear", "center"), noise.shape[0]
    )


class WAN21(comfy.model_base.BaseModel):
    """Wan from text, or from text and pictures that are appended to the latent's channels."""

    network = _NETWORK

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLOW,
        image_to_video: bool = False,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        unet_model = unet_model or network_class(self.network)
        super().__init__(model_config, model_type, device=device, unet_model=unet_model)
        self.image_to_video = image_to_video

    def _in_channel_groups(self, latent: torch.Tensor) -> torch.Tensor:
        """`process_latent_in` of each latent among the channels."""
        size = self.latent_format.latent_channels
        return torch.cat([self.process_latent_in(part) for part in latent.split(size, dim=1)], dim=1)

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        """Mask (1 = known) and picture latents as channels; a control latent alone where the network takes no mask."""
        noise, device = kwargs["noise"], kwargs["device"]
        extra = self.diffusion_model.patch_embedding.weight.shape[1] - noise.shape[1]
        if extra == 0:
            return None
        image = kwargs.get("concat_latent_image")
        if image is None:
            image = noise.new_zeros((noise.shape[0], extra, *noise.shape[2:]))
        else:
            image = _fitting(image.to(device), noise)
            image = self._in_channel_groups(image)
        room = extra - _MASK_CHANNELS
        if image.shape[1] != room and (not self.image_to_video or image.shape[1] == extra):
            return image
        image = image[:, :room]
        mask = self._known(kwargs.get("concat_mask", kwargs.get("denoise_mask")), noise, device)
        index = kwargs.get("concat_mask_index", 0)
        return torch.cat((image[:, :index], mask, image[:, index:]), dim=1)

    @staticmethod
    def _known(mask: torch.Tensor | None, noise: torch.Tensor, device: Any) -> torch.Tensor:
        """The places [B, 4, F, h, w] that are known (1), from a mask of those that are to be made."""
        if mask is None:
            return torch.zeros_like(noise)[:, :_MASK_CHANNELS]
        if mask.shape[1] != _MASK_CHANNELS:
            mask = mask.mean(dim=1, keepdim=True)
        known = comfy.utils.common_upscale(
            1.0 - mask.to(device), noise.shape[-1], noise.shape[-2], "bilinear", "center"
        )
        lacking = noise.shape[-3] - known.shape[-3]
        if lacking > 0:
            known = torch.nn.functional.pad(known, (0, 0, 0, 0, 0, lacking))
        if known.shape[1] == 1:
            known = known.expand(-1, _MASK_CHANNELS, -1, -1, -1)
        return comfy.utils.resize_to_batch_size(known, noise.shape[0])

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        regular = comfy.conds.CONDRegular
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = regular(cross)
        vision = kwargs.get("clip_vision_output")
        if vision is not None:
            out["clip_fea"] = regular(vision.penultimate_hidden_states)
        appended = kwargs.get("time_dim_concat")
        if appended is not None:
            out["time_dim_concat"] = regular(self.process_latent_in(appended))
        references = kwargs.get("reference_latents")
        if references is not None:
            out["reference_latent"] = regular(self.process_latent_in(references[-1])[:, :, 0])
        return out


class WAN21Vace(WAN21):
    """Wan with VACE's controls."""

    network = "comfy.ldm.wan.variants:VaceWanModel"

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        noise, size = kwargs["noise"], self.latent_format.latent_channels
        wanted = self.diffusion_model.vace_in_dim
        frames = kwargs.get("vace_frames")
        if frames is None:
            empty = noise.new_zeros((noise.shape[0], 2 * size, *noise.shape[2:]))
            frames = [self.process_latent_in(empty[:, :size]).repeat(1, 2, 1, 1, 1)]
        else:
            frames = [self._in_channel_groups(latent) for latent in frames]
        masks = kwargs.get("vace_mask")
        if masks is None:
            masks = [frames[0].new_ones((noise.shape[0], wanted - 2 * size, *noise.shape[2:]))] * len(frames)
        controls = [
            comfy.utils.resize_to_batch_size(torch.cat((latent, mask.to(latent)), dim=1), noise.shape[0])
            for latent, mask in zip(frames, masks)
        ]
        out["vace_context"] = comfy.conds.CONDRegular(torch.stack(controls, dim=1).to(noise))
        strengths = kwargs.get("vace_strength", [1.0] * len(frames))
        out["vace_strength"] = comfy.conds.CONDConstant(strengths)
        return out


class WAN21Camera(WAN21):
    """Wan with a camera path."""

    network = "comfy.ldm.wan.variants:CameraWanModel"

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        rays = kwargs.get("camera_conditions")
        if rays is not None:
            out["camera_conditions"] = comfy.conds.CONDRegular(rays)
        return out


class WAN22(WAN21):
    """Wan 2.2 5B: known frames stay clean and are at time 0."""

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        mask = kwargs.get("denoise_mask")
        if mask is not None:
            out["denoise_mask"] = comfy.conds.CONDRegular(mask)
        return out

    def process_timestep(self, timestep: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Times [B] -> [B, F] where frames are masked: each frame's share of places to make, times the time."""
        mask = kwargs.get("denoise_mask")
        if mask is None:
            return timestep
        return mask.mean(dim=(1, 3, 4)) * timestep.unsqueeze(1)

    def scale_latent_inpaint(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The known frames without noise."""
        return latent_image


class WAN21T2V(supported_models_base.BASE):
    """Wan from text."""

    unet_config: dict[str, Any] = {"image_model": "wan2.1", "model_type": "t2v"}
    sampling_settings = {"shift": 8.0}
    latent_format: Any = comfy.latent_formats.Wan21
    memory_usage_factor = 0.9
    memory_scale = 1.0
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]
    model: type[WAN21] = WAN21
    image_to_video = False

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        self.memory_usage_factor = self.unet_config.get("dim", 2000) / 2222 * self.memory_scale

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        return self.model(self, image_to_video=self.image_to_video, device=device)

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.t5_family as t5

        return supported_models_base.ClipTarget(t5.WanT5Tokenizer, t5.WanT5Model)


class WAN21I2V(WAN21T2V):
    """Wan from text and a picture, or a first and a last one."""

    unet_config = {"image_model": "wan2.1", "model_type": "i2v", "in_dim": 36}
    image_to_video = True


class WAN21FunControl2V(WAN21T2V):
    """Wan from text, a picture and a control video."""

    unet_config = {"image_model": "wan2.1", "model_type": "i2v", "in_dim": 48}


class WAN21VaceConfig(WAN21T2V):
    """Wan with VACE's controls."""

    unet_config = {"image_model": "wan2.1", "model_type": "vace"}
    memory_scale = 1.2
    model = WAN21Vace


class WAN21CameraConfig(WAN21T2V):
    """Wan 2.1 with a camera path."""

    unet_config = {"image_model": "wan2.1", "model_type": "camera", "in_dim": 32}
    model = WAN21Camera


class WAN22CameraConfig(WAN21CameraConfig):
    """Wan 2.2 with a camera path."""

    unet_config = {"image_model": "wan2.1", "model_type": "camera_2.2", "in_dim": 36}


class WAN22T2V(WAN21T2V):
    """Wan 2.2 5B, from text and from a picture."""

    unet_config = {"image_model": "wan2.1", "model_type": "t2v", "out_dim": 48}
    latent_format = comfy.latent_formats.Wan22
    model = WAN22
    image_to_video = True


# What tells members apart, in the order in which it is looked for.
_MEMBERS = (
    ("vace_patch_embedding.weight", "vace"),
    ("control_adapter.conv.weight", "camera_2.2"),
    ("casual_audio_encoder.encoder.final_linear.weight", "s2v"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "humo"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "animate"),
    ("img_emb.proj.0.bias", "i2v"),
)

# Widths of what prompts and pictures are encoded as: a weight, the argument, and what all published models have.
_WIDTHS = (("text_embedding.0.weight", "text_dim", 4096), ("img_emb.proj.0.weight", "clip_dim", 1280))


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    if f"{prefix}head.modulation" not in sd:
        return None
    dim = sd[f"{prefix}head.modulation"].shape[-1]
    config: dict[str, Any] = {
        "image_model": "wan2.1",
        "dim": dim,
        "out_dim": sd[f"{prefix}head.head.weight"].shape[0] // 4,
        "num_heads": dim // 128,
        "ffn_dim": sd[f"{prefix}blocks.0.ffn.0.weight"].shape[0],
        "num_layers": count_blocks(sd, prefix + "blocks.{}."),
        "patch_size": (1, 2, 2),
        "freq_dim": 256,
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "in_dim": sd[f"{prefix}patch_embedding.weight"].shape[1],
    }
    kind = next((kind for key, kind in _MEMBERS if prefix + key in sd), "t2v")
    if kind == "vace":
        config["vace_in_dim"] = sd[f"{prefix}vace_patch_embedding.weight"].shape[1]
        config["vace_layers"] = count_blocks(sd, prefix + "vace_blocks.{}.")
    if kind == "camera_2.2" and f"{prefix}img_emb.proj.0.bias" in sd:
        kind = "camera"
    config["model_type"] = kind
    for key, name in (("img_emb.emb_pos", "flf_pos_embed_token_number"), ("ref_conv.weight", "in_dim_ref_conv")):
        if prefix + key in sd:
            config[name] = sd[prefix + key].shape[1]
    for key, name, usual in _WIDTHS:
        if prefix + key in sd and sd[prefix + key].shape[-1] != usual:
            config[name] = sd[prefix + key].shape[-1]
    told = metadata_config(metadata)
    return {**config, **{name: told[name] for name in told if name in config or name == "text_dim"}}


_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
}
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
}
_ATTENTION = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
}  # fmt: skip
_BLOCK.update(
    {
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for a, b in _ATTENTION.items()
    }
)


def _renamed(name: str) -> str | None:
    """Our name of a parameter with diffusers' name, or None."""
    parts = name.split(".")
    table: Mapping[str, str] = _TOP
    head = ""
    if parts[0] in ("blocks", "vace_blocks") and len(parts) > 2:
        head, name, table = f"{parts[0]}.{parts[1]}.", ".".join(parts[2:]), _BLOCK
    if name in table:
        return head + table[name]
    stem, _, kind = name.rpartition(".")
    return f"{head}{table[stem]}.{kind}" if stem in table else None


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None.

    Raises ValueError for a key that the family does not have.
    """
    if "condition_embedder.time_proj.weight" not in state_dict or "blocks.0.attn1.to_q.weight" not in state_dict:
        return None
    out = {}
    for key, value in state_dict.items():
        name = _renamed(key)
        if name is None:
            raise ValueError(f"{key} is not a weight of Wan as diffusers names them; this variant is not supported")
        out[name] = value
    return out


def _sizes(network: Any) -> Sizes:
    dim = network.dim
    return {"heads": (dim, dim // network.num_heads), "mlp": (network.ffn_dim, 1), "dim": (dim, 1)}


def _splits() -> dict[str, Split]:
    """Everything in a block, in whole heads; queries' and keys' norms need the sum of squares of all of them."""
    out = {}
    for attention in ("self_attn", "cross_attn"):
        for name in ("q", "k", "v", "k_img", "v_img"):
            out[f"*blocks.*.{attention}.{name}"] = Split("column", ("heads",))
        out[f"*blocks.*.{attention}.o"] = Split("row", ("heads",))
    out["*blocks.*.ffn.0"] = Split("column", ("mlp",))
    out["*blocks.*.ffn.2"] = Split("row", ("mlp",))
    out["vace_blocks.*.before_proj"] = Split("whole")
    out["vace_blocks.*.after_proj"] = Split("whole")
    return out


FAMILY = Family(
    name="wan",
    network=_NETWORK,
    detect=detect,
    configurations={
        "WAN22_T2V": WAN22T2V,
        "WAN21_T2V": WAN21T2V,
        "WAN21_I2V": WAN21I2V,
        "WAN21_FunControl2V": WAN21FunControl2V,
        "WAN21_Vace": WAN21VaceConfig,
        "WAN21_Camera": WAN21CameraConfig,
        "WAN22_Camera": WAN22CameraConfig,
    },
    models={"WAN21": WAN21, "WAN21_Vace": WAN21Vace, "WAN21_Camera": WAN21Camera, "WAN22": WAN22},
    from_diffusers=from_diffusers,
    splits=_splits(),
    sizes=_sizes,
)
