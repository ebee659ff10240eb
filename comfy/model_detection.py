"""Which family a state dict belongs to, and the sizes of its network.

Each family's record says how it is recognised (`Family.detect`): by keys, with sizes from tensor shapes. What shapes
cannot tell comes from a JSON `config` in the file's metadata, else from the family's usual proportion.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

import comfy.families
import comfy.supported_models
import comfy.utils
from comfy.absent_families import absent_family

UNET_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")

StateDict = dict[str, torch.Tensor]


def count_blocks(state_dict_keys: Any, prefix_string: str) -> int:
    """Number of consecutive indices i for which a key begins with `prefix_string.format(i)`."""
    keys = list(state_dict_keys)
    count = 0
    while any(key.startswith(prefix_string.format(count)) for key in keys):
        count += 1
    return count


def metadata_config(metadata: Mapping[str, str] | None, part: str = "transformer") -> dict[str, Any]:
    """The configuration in a file's metadata: `config` itself or its part of one network."""
    if not metadata or "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        logging.warning("the file's metadata has a config that is not JSON (%s); it is ignored", error)
        return {}
    found = config.get(part, config) if isinstance(config, dict) else {}
    return found if isinstance(found, dict) else {}


def detect_unet_config(
    state_dict: StateDict, key_prefix: str, metadata: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Configuration of the diffusion network below `key_prefix`, or None when no family is recognised."""
    for family in comfy.families.records():
        config = family.detect(state_dict, key_prefix, metadata)
        if config is not None:
            return config
    return None


def model_config_from_unet_config(unet_config: dict[str, Any], state_dict: StateDict | None = None) -> Any:
    """An instance of the first family that matches, or None."""
    found = _matching(unet_config, state_dict)
    if found is None:
        kind = unet_config.get("image_model", "a UNet")
        logging.error("a %s network, but of sizes or a variant that this version does not have", kind)
    return found


def _matching(unet_config: dict[str, Any], state_dict: StateDict | None) -> Any:
    known = comfy.supported_models.models
    return next((family(unet_config) for family in known if family.matches(unet_config, state_dict)), None)


def detected(state_dict: StateDict, key_prefix: str, metadata: dict[str, str] | None = None) -> Any:
    """The family of the network below `key_prefix`, or None; says nothing and changes nothing."""
    if absent_family(state_dict, key_prefix) is not None:
        return None
    config = detect_unet_config(state_dict, key_prefix, metadata)
    return None if config is None else _matching(config, state_dict)


def shapes_of_file(path: str) -> tuple[StateDict, dict[str, str] | None]:
    """(weights without values, on the meta device, metadata) of a safetensors file, from its header alone.

    Raises ValueError for a file that is none, and OSError.
    """
    header = comfy.utils.safetensors_header(path)
    entries = json.loads(header or b"null")
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is not a safetensors file")
    metadata = entries.pop("__metadata__", None)
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in entries.items()}, metadata


def model_config_from_unet(
    state_dict: StateDict,
    unet_key_prefix: str,
    use_base_if_no_match: bool = False,
    metadata: dict[str, str] | None = None,
) -> Any:
    """The family of the network below `unet_key_prefix`, or None. `scaled_fp8` files are marked as such."""
    if absent_family(state_dict, unet_key_prefix) is not None:
        return None  # whose keys may be those of a family that is here, too
    config = detect_unet_config(state_dict, unet_key_prefix, metadata=metadata)
    if config is None:
        return None
    model_config = model_config_from_unet_config(config, state_dict)
    if model_config is None and use_base_if_no_match:
        from comfy.supported_models_base import BASE

        model_config = BASE(config)
    for key, name, usual in () if model_config is None else model_config.widths:
        weight = state_dict.get(unet_key_prefix + key)
        if weight is not None and weight.shape[-1] != usual:
            model_config.unet_config[name] = weight.shape[-1]
    marker = state_dict.pop(f"{unet_key_prefix}scaled_fp8", None)
    if model_config is not None and marker is not None:
        model_config.scaled_fp8 = torch.float8_e4m3fn if marker.dtype == torch.float32 else marker.dtype
        model_config.optimizations["fp8"] = marker.nelement() != 2
    return model_config


def unet_prefix_from_state_dict(state_dict: StateDict) -> str:
    """The commonest of the known prefixes of diffusion weights if more than five keys have it, else `model.`."""
    counts = dict.fromkeys(UNET_PREFIXES, 0)
    for key in state_dict:
        for prefix in UNET_PREFIXES:
            if key.startswith(prefix):
                counts[prefix] += 1
                break
    best = max(counts, key=lambda prefix: counts[prefix])
    return best if counts[best] > 5 else "model."


def name_absent_family(state_dict: StateDict) -> str | None:
    """What people call the family of a file's network, if it is known and not in this version."""
    return absent_family(state_dict, unet_prefix_from_state_dict(state_dict)) or absent_family(state_dict, "")


def convert_config(unet_config: dict[str, Any]) -> dict[str, Any]:
    """A UNet's configuration in latent diffusion's form as `UNetModel` takes it: a copy with one entry for each block.

    Blocks and transformers may be numbers for all levels; `attention_resolutions` are the factors of reduction at which
    there are transformers.
    """
    config = dict(unet_config)
    levels = len(config.get("channel_mult") or ())
    blocks = config.get("num_res_blocks")
    config["num_res_blocks"] = [blocks] * levels if isinstance(blocks, int) else blocks
    reductions = config.pop("attention_resolutions", None)
    if reductions is None:
        return config
    depth = config.get("transformer_depth")
    depths = [depth] * levels if isinstance(depth, int) else list(depth or [0] * levels)
    if config.get("transformer_depth_middle") is None:
        config["transformer_depth_middle"] = depths[-1]
    used = [found if 2**level in reductions else 0 for level, found in enumerate(depths)]
    for name, more in (("transformer_depth", 0), ("transformer_depth_output", 1)):
        config[name] = [d for d, count in zip(used, config["num_res_blocks"]) for _ in range(count + more)]
    return config


def unet_config_from_diffusers_unet(state_dict: StateDict, dtype: torch.dtype | None = None) -> dict[str, Any] | None:
    """Configuration of a UNet with diffusers' keys, or None when it is not one."""
    from comfy.ldm.unet.keys import from_diffusers

    converted = from_diffusers(state_dict)
    config = None if converted is None else detect_unet_config(converted, "")
    return None if config is None else {**config, "dtype": dtype}


def model_config_from_diffusers_unet(state_dict: StateDict) -> Any:
    """The family of a UNet with diffusers' keys, or None."""
    config = unet_config_from_diffusers_unet(state_dict)
    return None if config is None else model_config_from_unet_config(config)


def convert_diffusers_mmdit(state_dict: StateDict, output_prefix: str = "") -> StateDict | None:
    """A transformer with diffusers' keys under ours, or None when it is not one we know."""
    for family in comfy.families.records():
        converted = None if family.from_diffusers is None else family.from_diffusers(state_dict)
        if converted is not None:
            return {output_prefix + key: value for key, value in converted.items()}
    return None
