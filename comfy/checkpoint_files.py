"""Reading and writing weight files: safetensors memory-mapped, pickles only with weights_only."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from comfy import weight_files
from comfy.weight_files import WeightFileError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pt2", ".bin", ".pth", ".sft_pickle")


def load_torch_file(
    ckpt: str, safe_load: bool = True, device: torch.device | None = None, return_metadata: bool = False
) -> Any:
    """State dict of a weight file.

    Safetensors are memory-mapped, so ranks on one host share the pages; `weight_files.file_of` tells a tensor's
    file. Returns `{key: tensor}`, or `(state_dict, metadata or None)` with `return_metadata`.

    Raises WeightFileError for a missing, truncated, damaged or unsafe file, and WeightFileChangedError for one that is
    written to while it is loaded.
    """
    target = torch.device("cpu") if device is None else device
    if not os.path.isfile(ckpt):
        raise WeightFileError(f"{ckpt} does not exist; put the file there or choose another in the loader node")
    file = weight_files.WeightFile(os.path.abspath(ckpt), weight_files.state_of(ckpt))
    if ckpt.lower().endswith((".safetensors", ".sft")):
        state_dict, metadata = _load_safetensors(ckpt, target)
    else:
        state_dict, metadata = _load_pickle(ckpt, target), None
    file.check()
    weight_files.mark(state_dict.values(), file)
    return (state_dict, metadata) if return_metadata else state_dict


def _load_safetensors(path: str, device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    import safetensors
    from safetensors.torch import load as load_bytes

    import comfy.utils

    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            if not comfy.utils.DISABLE_MMAP:
                return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)
        with open(path, "rb") as raw:
            return {key: value.to(device) for key, value in load_bytes(raw.read()).items()}, metadata
    except Exception as error:
        size = os.path.getsize(path)
        raise WeightFileError(
            f"{path} ({size} bytes) is not a complete safetensors file ({error}); download it again"
        ) from error


def _load_pickle(path: str, device: torch.device) -> dict[str, Any]:
    import comfy.utils

    mmap = True if comfy.utils.MMAP_TORCH_FILES else None
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightFileError(
            f"{path} cannot be read as weights only ({first_line}); convert it to safetensors"
        ) from error
    if "global_step" in content:
        logging.debug("global step of %s: %s", path, content["global_step"])
    if "state_dict" in content:
        return content["state_dict"]
    if len(content) == 1:
        only = next(iter(content.values()))
        return only if isinstance(only, dict) else content
    return content


def save_torch_file(sd: dict[str, torch.Tensor], ckpt: str, metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors; shared or strided tensors are stored as their own copies."""
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in sd.items()}, ckpt, metadata=metadata)


def safetensors_header(safetensors_path: str, max_size: int = 100 * 1024 * 1024) -> bytes | None:
    """The JSON header of a safetensors file, or None when it is larger than `max_size` bytes."""
    with open(safetensors_path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length) if length <= max_size else None
