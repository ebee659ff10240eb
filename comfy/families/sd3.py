"""Stable Diffusion 3 medium, 3.5 medium, large and large turbo (Stability AI, 2024)."""

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


class SD3Model(comfy.model_base.BaseModel):
    """SD3 and SD3.5: text, and the CLIPs' pooled text."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLOW,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def encode_adm(self, **kwargs: Any) -> torch.Tensor | None:
        return kwargs["pooled_output"]

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        return out


class SD3(supported_models_base.BASE):
    """SD3 and SD3.5."""

    unet_config = {"in_channels": 16, "pos_embed_scaling_factor": None}
    sampling_settings = {"shift": 3.0}
    latent_format = comfy.latent_formats.SD3
    memory_usage_factor = 1.2
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        return SD3Model(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.sd3_clip as sd3_clip

        found = state_dict or {}
        t5 = "text_encoders.t5xxl.transformer."
        clips = {
            name: f"text_encoders.{name}.transformer.text_model.final_layer_norm.weight" in found
            for name in ("clip_l", "clip_g")
        }
        told: dict[str, Any] = {**clips, **sd3_clip.t5_xxl_detect(found, t5)}
        encoders = sd3_clip.sd3_clip(t5=f"{t5}encoder.final_layer_norm.weight" in found, **told)
        return supported_models_base.ClipTarget(sd3_clip.SD3Tokenizer, encoders)


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    patches = sd.get(f"{prefix}x_embedder.proj.weight")
    if patches is None or f"{prefix}joint_blocks.0.context_block.attn.qkv.weight" not in sd:
        return None
    hidden, channels, patch = patches.shape[:3]
    config: dict[str, Any] = {"in_channels": channels, "patch_size": patch, "depth": hidden // 64, "input_size": None}
    final = sd.get(f"{prefix}final_layer.linear.weight")
    if final is not None:
        config["out_channels"] = final.shape[0] // patch**2
    vector = sd.get(f"{prefix}y_embedder.mlp.0.weight")
    if vector is not None:
        config["adm_in_channels"] = vector.shape[1]
    context = sd.get(f"{prefix}context_embedder.weight")
    if context is not None:
        sizes = {"in_features": context.shape[1], "out_features": context.shape[0]}
        config["context_embedder_config"] = {"target": "torch.nn.Linear", "params": sizes}
    positions = sd.get(f"{prefix}pos_embed")
    if positions is not None:
        config["num_patches"] = positions.shape[1]
        config["pos_embed_max_size"] = round(positions.shape[1] ** 0.5)
    if f"{prefix}joint_blocks.0.context_block.attn.ln_q.weight" in sd:
        config["qk_norm"] = "rms"
    config["pos_embed_scaling_factor"] = None
    start, end = f"{prefix}joint_blocks.", ".x_block.attn2.qkv.weight"
    dual = [key[len(start) : -len(end)] for key in sd if key.startswith(start) and key.endswith(end)]
    config["x_block_self_attn_layers"] = sorted(int(number) for number in dual)
    return config


_STREAM = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{theirs}_embedder.linear_{n}": f"{ours}_embedder.mlp.{2 * n - 2}"
        for theirs, ours in (("timestep", "t"), ("text", "y"))
        for n in (1, 2)
    },
}


def diffusers_targets(depth: int, blocks: int | None = None) -> key_maps.Targets:
    """Diffusers' names of all weights of a network of hidden size 64 * `depth` with that many blocks.

    blocks: how many there are, if not all (in a ControlNet).
    """
    hidden = 64 * depth
    out = key_maps.linears(TOP)
    out["pos_embed.pos_embed"] = "pos_embed"
    out |= key_maps.changed("norm_out.linear", "final_layer.adaLN_modulation.1", key_maps.scale_before_shift)
    for i in range(depth if blocks is None else blocks):
        theirs, ours = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        out |= key_maps.linears(_STREAM, theirs, ours)
        for attention in ("attn", "attn2"):
            parts = [f"{theirs}{attention}.to_{name}" for name in "qkv"]
            out |= key_maps.fused(parts, f"{ours}x_block.{attention}.qkv", hidden)
        parts = [f"{theirs}attn.add_{name}_proj" for name in "qkv"]
        out |= key_maps.fused(parts, f"{ours}context_block.attn.qkv", hidden)
        name, target = f"{theirs}norm1_context.linear", f"{ours}context_block.adaLN_modulation.1"
        if i == depth - 1:  # the text of the last block has a shift and a scale only, as a last norm has
            out |= key_maps.changed(name, target, key_maps.scale_before_shift)
        else:
            out |= key_maps.linears({name: target})
    return out


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    if not {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"} <= state_dict.keys():
        return None
    return key_maps.assembled(state_dict, diffusers_targets(count_blocks(state_dict, "transformer_blocks.{}.")))


def _lora_keys(network: Any) -> dict[str, Any]:
    targets = key_maps.with_prefix(diffusers_targets(len(network.joint_blocks)), "diffusion_model.")
    return key_maps.adapter_keys(targets, (*key_maps.ORDINARY_SPELLINGS, "base_model.model."))


def _sizes(network: Any) -> Sizes:
    return {"heads": (network.hidden_size, 64), "mlp": (network.mlp_size, 1)}


def _splits() -> dict[str, Split]:
    out = {}
    for half, stream in (("context_block", "txt"), ("x_block", "img")):
        block = f"joint_blocks.*.{half}"
        for attention in ("attn", "attn2"):
            out[f"{block}.{attention}.qkv"] = Split("column", ("heads", "heads", "heads"), (stream,))
            out[f"{block}.{attention}.proj"] = Split("row", ("heads",), (stream,))
        out[f"{block}.mlp.fc1"] = Split("column", ("mlp",), (stream,))
        out[f"{block}.mlp.fc2"] = Split("row", ("mlp",), (stream,))
        out[f"{block}.adaLN_modulation.1"] = Split("gathered")
    return out


FAMILY = Family(
    name="sd3",
    network="comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper",
    detect=detect,
    configurations={"SD3": SD3},
    models={"SD3": SD3Model},
    from_diffusers=from_diffusers,
    lora_keys=_lora_keys,
    clip_type="SD3",
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
    full_precision=("joint_blocks.*.adaLN_modulation.1",),
)
