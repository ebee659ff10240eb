"""Control networks for UNets: Stable Diffusion 1, 2 and XL, Xinsir's union network; in their own and diffusers' layout."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_detection
import comfy.model_management
from comfy.cldm.cldm import ControlNet as Network
from comfy.ldm.unet import keys

from .loading import StateDict, placement, with_weights
from .network import ControlNet

_PREFIX = "control_model."
_DIFFUSERS_HINT = "controlnet_cond_embedding."
_UNION = ("task_embedding", "transformer_layes.", "spatial_ch_projs.", "control_add_embedding.")


def _control(sd: StateDict, options: dict[str, Any]) -> ControlNet:
    config = comfy.model_detection.model_config_from_unet(sd, "", True)
    if config is None:
        raise ValueError("the file has the keys of a UNet's ControlNet but not its blocks; use a complete file")
    place = placement(sd, config, options)
    sizes = {**config.unet_config, **place.arguments(), "hint_channels": sd["input_hint_block.0.weight"].shape[1]}
    if "num_heads" not in sizes and "num_head_channels" not in sizes:
        sizes["num_head_channels"] = 64  # of a UNet that is none of the known: as in all since SD 2
    kinds = sd.get("task_embedding")
    sizes["union_controlnet_num_control_type"] = None if kinds is None else kinds.shape[0]
    network = with_weights(Network(**sizes), sd, place.dtype)
    return ControlNet(
        network, load_device=place.device, manual_cast_dtype=place.cast,
        global_average_pooling=bool(options.get("global_average_pooling")),
    )  # fmt: skip


def without_prefix(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """With the names of its authors."""
    return _control(sd, options)


def with_prefix(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """With the names of a training checkpoint; perhaps only the difference to a model, which is then needed."""
    own = {key[len(_PREFIX) :]: value for key, value in sd.items() if key.startswith(_PREFIX)}
    if "difference" not in sd:
        return _control(own, options)
    if model is None:
        logging.warning("this ControlNet is a difference to a model; load it with Load ControlNet Model (diff)")
        return _control(own, options)
    comfy.model_management.load_models_gpu([model])
    base = model.model_state_dict()
    for key, value in own.items():
        weight = base.get(f"diffusion_model.{key}")
        if weight is not None:
            own[key] = value + weight.to(device=value.device, dtype=value.dtype)
    return _control(own, options)


def diffusers(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """With diffusers' names."""
    out = keys.from_diffusers(sd)
    if out is None:
        raise ValueError("the file has the keys of a diffusers ControlNet but not its blocks; use a complete file")
    hints = sorted({int(key.split(".")[2]) for key in sd if key.startswith(f"{_DIFFUSERS_HINT}blocks.")})
    names = {f"{_DIFFUSERS_HINT}conv_in": 0, f"{_DIFFUSERS_HINT}conv_out": 2 * len(hints) + 2}
    names |= {f"{_DIFFUSERS_HINT}blocks.{i}": 2 * i + 2 for i in hints}
    for key, value in sd.items():
        stem, _, kind = key.rpartition(".")
        if stem in names:
            out[f"input_hint_block.{names[stem]}.{kind}"] = value
        elif stem == "controlnet_mid_block":
            out[f"middle_block_out.0.{kind}"] = value
        elif stem.startswith("controlnet_down_blocks."):
            out[f"zero_convs.{stem.rpartition('.')[2]}.0.{kind}"] = value
        elif key.startswith(_UNION):
            out[key.replace(".attn.in_proj_", ".attn.in_proj.")] = value
    return _control(out, options)
