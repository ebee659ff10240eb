"""Wan 2.1 and 2.2: text, images, controls and camera paths to video (Wan Team 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict, network_class
from comfy.families.wan_keys import from_diffusers
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


class WAN22S2V(WAN21):
    """Wan 2.2 from text and sound."""

    network = "comfy.ldm.wan.sound:WanModel_S2V"

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        regular = comfy.conds.CONDRegular
        if kwargs.get("audio_embed") is not None:
            out["audio_embed"] = regular(kwargs["audio_embed"])
        references = kwargs.get("reference_latents")
        if references is not None:
            out["reference_latent"] = regular(self.process_latent_in(references[-1]))
        if kwargs.get("reference_motion") is not None:
            out["reference_motion"] = regular(self.process_latent_in(kwargs["reference_motion"]))
        if kwargs.get("control_video") is not None:
            out["control_video"] = regular(self.process_latent_in(_fitting(kwargs["control_video"], kwargs["noise"])))
        return out


# What HuMo's larger network sees where no picture is known: a black video's latent, frame by frame until it is steady.
_BLACK = (
    (0.8660, -0.4326, -0.0017, -0.4884, -0.5283, 0.9207, -0.9896, 0.4433, -0.5543, -0.0113, 0.5753, -0.6000, -0.8346,
     -0.3497, -0.1926, -0.6938),
    (1.0869, -1.2370, 0.0206, -0.4357, -0.6411, 2.0307, -1.5972, 1.2659, -0.8595, -0.4654, 0.9638, -1.6330, -1.4310,
     -0.1098, -0.3856, -1.4583),
    (0.8642, -1.8583, 0.1577, 0.1350, -0.3641, 2.5863, -1.9670, 1.6065, -1.0475, -0.8678, 1.1734, -1.8138, -1.5933,
     -0.7721, -0.3289, -1.3745),
)  # fmt: skip


class WAN21HuMo(WAN21):
    """Wan from text, sound and a picture of a subject."""

    network = "comfy.ldm.wan.sound:HumoWanModel"

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        """The larger network's mask (0: nothing is known) and a black video."""
        noise = kwargs["noise"]
        if self.diffusion_model.patch_embedding.weight.shape[1] == noise.shape[1]:
            return None
        rows = torch.tensor(_BLACK, device=noise.device, dtype=noise.dtype)
        frames = rows[torch.arange(noise.shape[2]).clamp(max=len(_BLACK) - 1)]
        black = frames.T[None, :, :, None, None].expand_as(noise)
        return torch.cat((torch.zeros_like(noise)[:, :_MASK_CHANNELS], black), dim=1)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        regular = comfy.conds.CONDRegular
        if kwargs.get("audio_embed") is not None:
            out["audio_embed"] = regular(kwargs["audio_embed"])
        references = kwargs.get("reference_latents")
        if references is not None:
            seen = self.process_latent_in(_fitting(references[-1], kwargs["noise"]))
            if "c_concat" in out:  # as channels of a frame: no noise, a mask (1: known), the picture
                known = torch.ones_like(seen)[:, :_MASK_CHANNELS]
                seen = torch.cat((torch.zeros_like(seen), known, seen), dim=1)
            out["reference_latent"] = regular(seen)
        return out


class WAN22Animate(WAN21):
    """Wan 2.2 from a picture of a character, and motion."""

    network = "comfy.ldm.wan.animate:AnimateWanModel"

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if kwargs.get("face_video_pixels") is not None:
            out["face_pixel_values"] = comfy.conds.CONDRegular(kwargs["face_video_pixels"])
        if kwargs.get("pose_video_latent") is not None:
            pose = _fitting(kwargs["pose_video_latent"], kwargs["noise"])
            out["pose_latents"] = comfy.conds.CONDRegular(self.process_latent_in(pose))
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

    widths = (("text_embedding.0.weight", "text_dim", 4096), ("img_emb.proj.0.weight", "clip_dim", 1280))
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


class WAN22S2VConfig(WAN21T2V):
    """Wan 2.2 from text and sound."""

    unet_config = {"image_model": "wan2.1", "model_type": "s2v"}
    model = WAN22S2V


class WAN21HuMoConfig(WAN21T2V):
    """Wan from text, sound and a picture of a subject."""

    unet_config = {"image_model": "wan2.1", "model_type": "humo"}
    model = WAN21HuMo


class WAN22AnimateConfig(WAN21T2V):
    """Wan 2.2 from a picture of a character, and motion."""

    unet_config = {"image_model": "wan2.1", "model_type": "animate"}
    model = WAN22Animate

    def process_unet_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Without the filters of the face's encoder, which are constants."""
        return {key: value for key, value in state_dict.items() if not key.endswith(".kernel")}


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


def _sound_sizes(sd: StateDict, prefix: str) -> dict[str, Any]:
    """Sizes of S2V's layers for sound."""
    stem = f"{prefix}casual_audio_encoder."
    first = sd[f"{stem}encoder.conv1_local.conv.weight"]
    width = sd[f"{stem}encoder.conv2.conv.weight"].shape[1]
    return {
        "audio_dim": first.shape[1],
        "num_audio_token": first.shape[0] // width,
        "audio_layers": sd[f"{stem}weights"].shape[1],
        "cond_dim": sd[f"{prefix}cond_encoder.weight"].shape[1],
    }


def _humo_sizes(sd: StateDict, prefix: str) -> dict[str, Any]:
    """Sizes of HuMo's layers for sound."""
    stem = f"{prefix}audio_proj.audio_proj_glob_"
    inner, states = sd[f"{stem}1.layer.weight"].shape
    tokens = sd[f"{stem}3.layer.bias"].shape[0] // sd[f"{stem}norm.layer.bias"].shape[0]
    return {"audio_states": states, "audio_inner": inner, "audio_token_num": tokens}


def _face_sizes(sd: StateDict, prefix: str) -> dict[str, Any]:
    """Sizes of Animate's layers for faces."""
    stem = f"{prefix}motion_encoder.enc.net_app.convs."
    widths = [sd[f"{stem}0.0.weight"].shape[0]]
    while f"{stem}{len(widths)}.skip.1.weight" in sd:
        widths.append(sd[f"{stem}{len(widths)}.skip.1.weight"].shape[0])
    hidden, style = sd[f"{prefix}face_encoder.conv1_local.conv.weight"].shape[:2]
    return {"face_widths": widths, "motion_encoder_dim": style, "face_hidden": hidden // 4}


_SIZES = {"s2v": _sound_sizes, "humo": _humo_sizes, "animate": _face_sizes}
_TOLD = ("text_dim", "audio_inject_layers")  # settings that weights do not show


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
    if kind in _SIZES:
        config |= _SIZES[kind](sd, prefix)
    for key, name in (("img_emb.emb_pos", "flf_pos_embed_token_number"), ("ref_conv.weight", "in_dim_ref_conv")):
        if prefix + key in sd:
            config[name] = sd[prefix + key].shape[1]
    told = metadata_config(metadata)
    return {**config, **{name: told[name] for name in told if name in config or name in _TOLD}}


def _sizes(network: Any) -> Sizes:
    dim = network.dim
    return {"heads": (dim, dim // network.num_heads), "mlp": (network.ffn_dim, 1), "dim": (dim, 1)}


def _splits() -> dict[str, Split]:
    """Everything in a block, in whole heads; queries' and keys' norms need the sum of squares of all of them."""
    out = {}
    for block, stream in (("blocks.*", "img"), ("vace_blocks.*", "vace")):
        for attention in ("self_attn", "cross_attn"):
            for name in ("q", "k", "v", "k_img", "v_img"):
                tokens = (stream,) if name == "q" or attention == "self_attn" else ()  # every rank has the prompt
                out[f"{block}.{attention}.{name}"] = Split("column", ("heads",), tokens)
            out[f"{block}.{attention}.o"] = Split("row", ("heads",), (stream,))
        out[f"{block}.ffn.0"] = Split("column", ("mlp",), (stream,))
        out[f"{block}.ffn.2"] = Split("row", ("mlp",), (stream,))
    for name in ("audio_injector.injector.*", "blocks.*.audio_cross_attn_wrapper.audio_cross_attn"):
        out |= {f"{name}.{layer}": Split("column", ("heads",), ("img",) if layer == "q" else ()) for layer in "qkv"}
        out[f"{name}.o"] = Split("row", ("heads",), ("img",))
    out["face_adapter.fuser_blocks.*.linear1_q"] = Split("column", ("heads",), ("img",))
    out["face_adapter.fuser_blocks.*.linear1_kv"] = Split("column", ("heads", "heads"), ())
    out["face_adapter.fuser_blocks.*.linear2"] = Split("row", ("heads",), ("img",))
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
        "WAN22_S2V": WAN22S2VConfig,
        "WAN21_HuMo": WAN21HuMoConfig,
        "WAN22_Animate": WAN22AnimateConfig,
    },
    models={
        "WAN21": WAN21,
        "WAN21_Vace": WAN21Vace,
        "WAN21_Camera": WAN21Camera,
        "WAN22_S2V": WAN22S2V,
        "WAN21_HuMo": WAN21HuMo,
        "WAN22_Animate": WAN22Animate,
        "WAN22": WAN22,
    },
    from_diffusers=from_diffusers,
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
)
