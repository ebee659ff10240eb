"""Control networks for Flux: InstantX, Shakker Labs and Alimama (diffusers' layout), XLabs, MistoLine."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_detection
from comfy.families.flux import sizes_of_file
from comfy.ldm.flux import keys
from comfy.ldm.flux.controlnet import ControlNetFlux

from .loading import StateDict, placement, with_weights
from .network import ControlNet

_CONDITIONINGS = ("y", "guidance")
# a latent's channels and a mask
_WITH_MASK = 17


def _network(sd: StateDict, options: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """(network with weights, its placement). Raises ValueError when the weights are not of Flux's sizes."""
    config = comfy.model_detection.model_config_from_unet(sd, "")
    if config is None:
        raise ValueError("the file has the keys of a Flux ControlNet but not its blocks; use a complete file")
    place = placement(sd, config, options)
    sizes = sizes_of_file(sd, "", config.unet_config["axes_dim"])
    network = ControlNetFlux(**{**config.unet_config, **sizes, **changes, **place.arguments()})
    return with_weights(network, sd, place.dtype), place


def _control(network: Any, place: Any, **arguments: Any) -> ControlNet:
    return ControlNet(
        network, load_device=place.device, manual_cast_dtype=place.cast, extra_conds=_CONDITIONINGS, **arguments
    )


def xlabs(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """XLabs: the hint is a picture, brought to the latent's size by convolutions."""
    return _control(*_network(sd, options))


def mistoline(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """MistoLine: as XLabs, with other convolutions and an activation after each projection."""
    prefix, ours = "single_controlnet_blocks.", "controlnet_single_blocks."
    sd = {ours + key.removeprefix(prefix) if key.startswith(prefix) else key: value for key, value in sd.items()}
    return _control(*_network(sd, options, mistoline=True))


def diffusers(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """InstantX, Shakker Labs' union networks and Alimama's for inpainting: the hint is a latent, perhaps with a mask."""
    converted = keys.from_diffusers(sd)
    converted |= {
        key: value for key, value in sd.items() if key.startswith(("controlnet_blocks.", "controlnet_single"))
    }
    modes = sd.get("controlnet_mode_embedder.weight")
    if modes is not None:
        converted["controlnet_mode_embedder.weight"] = modes
    hint: torch.Tensor = converted["pos_embed_input.weight"]
    channels = hint.shape[1] // 4
    network, place = _network(
        converted, options, latent_input=True, control_latent_channels=channels,
        num_union_modes=0 if modes is None else modes.shape[0],
    )  # fmt: skip
    latent_format = comfy.latent_formats.Flux()
    return _control(
        network, place, compression_ratio=1, latent_format=latent_format, concat_mask=channels == _WITH_MASK
    )
