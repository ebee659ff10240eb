"""Which control network a file holds. Each kind is known by keys that only it has; its loader is imported when needed."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import comfy.model_management
import comfy.ops
import comfy.utils
from comfy import weight_files

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """`matches(state dict)`, and `module:function` that makes a control network of one.

    The function is given the state dict, the model that the network is a difference to (or None), and options: `dtype`,
    `custom_operations`, `global_average_pooling`.
    """

    matches: Callable[[StateDict], bool]
    loader: str

    def load(self, sd: StateDict, model: Any, options: dict[str, Any]) -> Any:
        """The control network."""
        module, _, name = self.loader.partition(":")
        return getattr(importlib.import_module(module), name)(sd, model, options)


def has(*keys: str) -> Callable[[StateDict], bool]:
    """Whether a state dict has all of these keys."""
    return lambda sd: all(key in sd for key in keys)


_T2I = ("body.0.in_conv.weight", "body.0.resnets.0.block1.weight", "body.0.block2.weight")

KINDS: list[Kind] = [
    Kind(has("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale"), "comfy.control.flux:xlabs"),
    Kind(has("controlnet_blocks.0.linear.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
         "comfy.control.flux:mistoline"),
    Kind(has("controlnet_blocks.0.weight", "pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.bias"),
         "comfy.control.sd3:stability"),
    Kind(has("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"), "comfy.control.sd3:diffusers"),
    Kind(has("controlnet_blocks.0.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
         "comfy.control.qwen_image:instantx"),
    Kind(has("controlnet_blocks.0.weight", "controlnet_x_embedder.weight"), "comfy.control.flux:diffusers"),
    Kind(has("after_proj_list.0.bias", "before_proj.weight"), "comfy.control.hunyuan_dit:load"),
    Kind(has("lora_controlnet"), "comfy.control.lora:load"),
    Kind(has("controlnet_cond_embedding.conv_in.weight"), "comfy.control.unet:diffusers"),
    Kind(has("control_model.zero_convs.0.0.weight"), "comfy.control.unet:with_prefix"),
    Kind(has("zero_convs.0.0.weight"), "comfy.control.unet:without_prefix"),
    Kind(lambda sd: "adapter" in sd or any(key.removeprefix("adapter.") in _T2I for key in sd), "comfy.control.t2i:load"),
]  # fmt: skip
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Placement:
    """Where and as what a control network's weights are kept and computed."""

    dtype: torch.dtype
    cast: torch.dtype | None
    operations: Any
    device: torch.device

    def arguments(self) -> dict[str, Any]:
        """For the constructor of a network that gets its weights by assignment."""
        return {"dtype": self.dtype, "device": torch.device("meta"), "operations": self.operations}


def placement(sd: StateDict, config: Any, options: dict[str, Any]) -> Placement:
    """For weights `sd` of a network of the family `config`."""
    management = comfy.model_management
    device = management.get_torch_device()
    stored, supported = comfy.utils.weight_dtype(sd), list(config.supported_inference_dtypes)
    dtype = options.get("dtype") or management.unet_dtype(device, -1, supported, weight_dtype=stored)
    cast = management.unet_manual_cast(dtype, device, supported)
    operations = options.get("custom_operations") or comfy.ops.pick_operations(dtype, cast, disable_fast_fp8=True)
    return Placement(dtype, cast, operations, device)


def with_weights(network: Any, sd: StateDict, dtype: torch.dtype) -> Any:
    """The network with weights assigned, ready to run. Raises ValueError when some are missing."""
    weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in sd.items()}
    result = network.load_state_dict(weights, strict=False, assign=True)
    if result.missing_keys:
        raise ValueError(
            f"the ControlNet lacks {len(result.missing_keys)} weights, first {result.missing_keys[0]}; use a complete file"
        )
    if result.unexpected_keys:
        logging.debug("left over ControlNet keys: %s", result.unexpected_keys)
    return network.eval().requires_grad_(False)


def load_controlnet_state_dict(
    state_dict: StateDict, model: Any = None, model_options: dict[str, Any] | None = None
) -> Any:
    """The control network of a state dict, or None when it is of no known kind.

    model: what a network is the difference to, for files that hold only that.
    """
    kind = next((kind for kind in KINDS if kind.matches(state_dict)), None)
    if kind is None:
        logging.error("no control network or adapter of a known kind")
        return None
    files = weight_files.files_in(state_dict)
    control = kind.load(state_dict, model, model_options or {})
    for patcher in control.get_models():
        patcher.weight_store.loaded_from |= files
    return control


def load_controlnet(ckpt_path: str, model: Any = None, model_options: dict[str, Any] | None = None) -> Any:
    """The control network in a file, or None when it is of no known kind.

    Networks that see the hint's average ("shuffle") are known by the file's name only.
    """
    options = dict(model_options or {})
    stem = os.path.splitext(ckpt_path)[0]
    options.setdefault("global_average_pooling", stem.endswith(("_shuffle", "_shuffle_fp16")))
    control = load_controlnet_state_dict(comfy.utils.load_torch_file(ckpt_path, safe_load=True), model, options)
    if control is None:
        logging.error("%s holds no control network or adapter of a known kind", ckpt_path)
    return control
