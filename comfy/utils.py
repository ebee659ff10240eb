"""Helpers that the library and custom nodes share: weight files, state dicts, attribute paths, scaling, progress."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from comfy.checkpoint_files import (
    WeightFileError,
    load_torch_file,
    safetensors_header,
    save_torch_file,
)
from comfy.cli_args import args
from comfy.image_scaling import (
    bislerp,
    common_upscale,
    get_tiled_scale_steps,
    lanczos,
    repeat_to_batch_size,
    reshape_mask,
    resize_to_batch_size,
    tiled_scale,
    tiled_scale_multidim,
)
from comfy.nested_tensor import pack_latents, unpack_latents

__all__ = [
    "PROGRESS_BAR_ENABLED", "PROGRESS_BAR_HOOK", "ProgressBar", "WeightFileError", "auraflow_to_diffusers", "bislerp",
    "calculate_parameters", "clip_text_transformers_convert", "common_upscale", "convert_sd_to", "copy_to_param",
    "flux_to_diffusers", "get_attr",
    "get_tiled_scale_steps", "lanczos", "load_torch_file", "mmdit_to_diffusers", "pack_latents", "pixart_to_diffusers",
    "repeat_to_batch_size", "reshape_mask", "resize_list_to_batch_size", "resize_to_batch_size", "safetensors_header",
    "save_torch_file", "set_attr", "set_attr_param", "set_progress_bar_enabled", "set_progress_bar_global_hook",
    "state_dict_key_replace", "state_dict_prefix_replace", "tiled_scale", "tiled_scale_multidim", "unpack_latents",
    "weight_dtype",
]  # fmt: skip


def calculate_parameters(sd: dict[str, torch.Tensor], prefix: str = "") -> int:
    """Number of elements of all tensors whose key begins with `prefix`."""
    return sum(value.nelement() for key, value in sd.items() if key.startswith(prefix))


def weight_dtype(sd: dict[str, torch.Tensor], prefix: str = "") -> torch.dtype | None:
    """The dtype that holds most elements below `prefix`, or None without tensors."""
    sizes: dict[torch.dtype, int] = {}
    for key, value in sd.items():
        if key.startswith(prefix):
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def state_dict_key_replace(state_dict: dict[str, Any], keys_to_replace: dict[str, str]) -> dict[str, Any]:
    """Rename keys in place."""
    for old, new in keys_to_replace.items():
        if old in state_dict:
            state_dict[new] = state_dict.pop(old)
    return state_dict


def state_dict_prefix_replace(
    state_dict: dict[str, Any], replace_prefix: dict[str, str], filter_keys: bool = False
) -> dict[str, Any]:
    """Rename prefixes in place; with `filter_keys` the renamed entries move to a new dict that is returned."""
    out = {} if filter_keys else state_dict
    for old, new in replace_prefix.items():
        for key in [k for k in state_dict if k.startswith(old)]:
            out[new + key[len(old) :]] = state_dict.pop(key)
    return out


def convert_sd_to(state_dict: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cast every tensor in place."""
    for key in list(state_dict):
        state_dict[key] = state_dict[key].to(dtype)
    return state_dict


def get_attr(obj: Any, attr: str) -> Any:
    """The attribute at a dotted path; number parts index module lists."""
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj


def set_attr(obj: Any, attr: str, value: Any) -> Any:
    """Set the attribute at a dotted path and return what was there."""
    *parents, last = attr.split(".")
    for name in parents:
        obj = getattr(obj, name)
    previous = getattr(obj, last)
    setattr(obj, last, value)
    return previous


def set_attr_param(obj: Any, attr: str, value: torch.Tensor) -> Any:
    """`set_attr` with the tensor wrapped as a parameter without gradient."""
    return set_attr(obj, attr, torch.nn.Parameter(value, requires_grad=False))


def clip_text_transformers_convert(sd: dict[str, Any], prefix_from: str, prefix_to: str) -> dict[str, Any]:
    """OpenCLIP's text tower below `prefix_from` under transformers' keys below `prefix_to`, in place."""
    from comfy.text_encoders.openclip import from_openclip

    tower = state_dict_prefix_replace(sd, {prefix_from: ""}, filter_keys=True)
    sd.update({prefix_to + key: value for key, value in from_openclip(tower).items()})
    return sd


def convert_old_quants(
    state_dict: dict[str, Any], model_prefix: str = "", metadata: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Newer ComfyUI's step before loading: (state dict, metadata), as they are, since older formats are read here."""
    return state_dict, metadata or {}


def copy_to_param(obj: Any, attr: str, value: torch.Tensor) -> None:
    """Copy into the parameter at a dotted path, keeping its storage."""
    get_attr(obj, attr).data.copy_(value)


def resize_list_to_batch_size(values: list[Any], batch_size: int) -> list[Any]:
    """`resize_to_batch_size` for lists."""
    if not values or len(values) == batch_size:
        return list(values)
    picks = resize_to_batch_size(torch.arange(len(values)), batch_size)
    return [values[i] for i in picks.tolist()]


def flux_to_diffusers(mmdit_config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
    """Diffusers' names of Flux weights -> ours; see `comfy.ldm.flux.keys`."""
    from comfy.ldm.flux.keys import diffusers_key_map

    return diffusers_key_map(mmdit_config, output_prefix)


def mmdit_to_diffusers(mmdit_config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
    """Diffusers' names of SD3 weights -> ours, for `depth` (64 channels each) and, if it is less, `num_blocks`."""
    from comfy.families import key_maps, sd3

    depth = mmdit_config.get("depth", 0)
    targets = sd3.diffusers_targets(depth, mmdit_config.get("num_blocks", depth))
    return key_maps.with_prefix(targets, output_prefix)


def pixart_to_diffusers(mmdit_config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
    """Diffusers' names of PixArt weights -> ours, for `depth` and `hidden_size`."""
    from comfy.families import key_maps, pixart

    targets = pixart.diffusers_targets(mmdit_config.get("depth", 0), mmdit_config.get("hidden_size", 1152))
    return key_maps.with_prefix(targets, output_prefix)


def auraflow_to_diffusers(mmdit_config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
    """Diffusers' names of AuraFlow weights -> ours, for `n_double_layers` and `n_layers`."""
    from comfy.families import auraflow, key_maps

    targets = auraflow.diffusers_targets(mmdit_config.get("n_double_layers", 0), mmdit_config.get("n_layers", 0))
    return key_maps.with_prefix(targets, output_prefix)


PROGRESS_BAR_ENABLED = True
PROGRESS_BAR_HOOK: Callable[..., None] | None = None


def set_progress_bar_enabled(enabled: bool) -> None:
    """Switch console progress bars on or off."""
    global PROGRESS_BAR_ENABLED
    PROGRESS_BAR_ENABLED = enabled


def set_progress_bar_global_hook(function: Callable[..., None] | None) -> None:
    """Install the receiver of all progress: `f(value, total, preview_or_None, node_id=None)`."""
    global PROGRESS_BAR_HOOK
    PROGRESS_BAR_HOOK = function


class ProgressBar:
    """Progress of one node, in steps of its own choosing."""

    def __init__(self, total: int, node_id: str | None = None) -> None:
        self.total = total
        self.current = 0
        self.hook = PROGRESS_BAR_HOOK
        self.node_id = node_id

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        """Set the progress; `preview` is `(format, PIL image, max size)` or None."""
        if total is not None:
            self.total = total
        self.current = min(value, self.total)
        if self.hook is not None:
            self.hook(self.current, self.total, preview, node_id=self.node_id)

    def update(self, value: int) -> None:
        """Advance by `value`."""
        self.update_absolute(self.current + value)


_UNET_KEYS = ("TRANSFORMER_BLOCKS", "UNET_MAP_ATTENTIONS", "UNET_MAP_BASIC", "UNET_MAP_RESNET", "unet_to_diffusers")
_FLAGS = {"DISABLE_MMAP": "disable_mmap", "MMAP_TORCH_FILES": "mmap_torch_files"}  # until a pack sets them here


def __getattr__(name: str) -> Any:
    if name in _FLAGS:
        return getattr(args, _FLAGS[name])
    if name not in _UNET_KEYS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("comfy.ldm.unet.keys"), name)
