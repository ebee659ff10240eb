"""In which dtype weights are stored and computed with: flags first, then what the file has and the device can.

`comfy.model_management` offers these functions under ComfyUI's names; they call each other through it, so that whoever
replaces one there replaces it for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

import comfy
from comfy.cli_args import args

if TYPE_CHECKING:
    import comfy.model_management


def dtype_size(dtype: torch.dtype | None) -> int:
    """Bytes of one element."""
    return 4 if dtype is None else dtype.itemsize


def should_use_fp16(
    device: torch.device | None = None,
    model_params: int = 0,
    prioritize_performance: bool = True,
    manual_cast: bool = False,
) -> bool:
    """Whether half precision is a good choice on `device`."""
    device = comfy.model_management.get_torch_device() if device is None else device
    if args.force_fp16:
        return True
    if args.force_fp32 or device.type == "cpu":
        return False
    return device.type in ("cuda", "mps", "xpu")


def should_use_bf16(
    device: torch.device | None = None,
    model_params: int = 0,
    prioritize_performance: bool = True,
    manual_cast: bool = False,
) -> bool:
    """Whether bfloat16 is a good choice on `device` (Ampere and newer)."""
    device = comfy.model_management.get_torch_device() if device is None else device
    if args.force_fp32 or device.type == "cpu":
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "xpu"


def supports_fp8_compute(device: torch.device | None = None) -> bool:
    """Whether tensor cores of `device` multiply fp8 (Ada and newer)."""
    if args.supports_fp8_compute:
        return True
    device = comfy.model_management.get_torch_device() if device is None else device
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def supports_dtype(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether weights of `dtype` can be computed with on `device`."""
    if dtype == torch.float32 or dtype is None:
        return dtype is not None
    if comfy.model_management.is_device_cpu(device):
        return False
    return dtype in (torch.float16, torch.bfloat16)


def supports_cast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights can be stored as `dtype` on `device` and cast for use."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return True
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and not comfy.model_management.is_device_mps(device)


def pick_weight_dtype(dtype: torch.dtype | None, fallback_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype` if it can be stored on `device`, else `fallback_dtype`."""
    if (
        dtype is None
        or comfy.model_management.dtype_size(dtype) > comfy.model_management.dtype_size(fallback_dtype)
        or not comfy.model_management.supports_cast(device, dtype)
    ):
        return fallback_dtype
    return dtype


_UNET_FLAGS = (
    ("fp32_unet", torch.float32),
    ("fp64_unet", torch.float64),
    ("bf16_unet", torch.bfloat16),
    ("fp16_unet", torch.float16),
    ("fp8_e4m3fn_unet", torch.float8_e4m3fn),
    ("fp8_e5m2_unet", torch.float8_e5m2),
)
_ALL_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def unet_dtype(
    device: torch.device | None = None,
    model_params: int = 0,
    supported_dtypes: Sequence[torch.dtype] = _ALL_FLOATS,
    weight_dtype: torch.dtype | None = None,
) -> torch.dtype:
    """The dtype in which a diffusion model's weights are kept: as stored, unless a flag says otherwise.

    Half-precision files stay half precision on the CPU too (each weight is cast at use), so that ranks share the
    file's memory-mapped pages instead of holding fp32 copies.
    """
    for flag, dtype in _UNET_FLAGS:
        if getattr(args, flag, False):
            return dtype
    if weight_dtype is not None and weight_dtype in (*_ALL_FLOATS, torch.float8_e4m3fn, torch.float8_e5m2):
        if weight_dtype == torch.float32 and not comfy.model_management.is_device_cpu(
            device or comfy.model_management.get_torch_device()
        ):
            return comfy.model_management.unet_compute_dtype(
                device or comfy.model_management.get_torch_device(), supported_dtypes
            )
        return weight_dtype
    return comfy.model_management.unet_compute_dtype(
        device or comfy.model_management.get_torch_device(), supported_dtypes
    )


def unet_compute_dtype(device: torch.device, supported_dtypes: Iterable[torch.dtype] = _ALL_FLOATS) -> torch.dtype:
    """The first dtype of `supported_dtypes` that computes fast on `device`; fp32 else."""
    if args.force_fp32:
        return torch.float32
    for dtype in supported_dtypes:
        if dtype == torch.float16 and comfy.model_management.should_use_fp16(device):
            return dtype
        if dtype == torch.bfloat16 and comfy.model_management.should_use_bf16(device):
            return dtype
    return torch.float32


def unet_manual_cast(
    weight_dtype: torch.dtype | None,
    inference_device: torch.device,
    supported_dtypes: Sequence[torch.dtype] = _ALL_FLOATS,
) -> torch.dtype | None:
    """The dtype to cast weights to at use, or None when they compute as they are."""
    if weight_dtype in (torch.float32, torch.float64):
        return None
    if (
        weight_dtype == torch.float16
        and comfy.model_management.should_use_fp16(inference_device)
        and weight_dtype in supported_dtypes
    ):
        return None
    if (
        weight_dtype == torch.bfloat16
        and comfy.model_management.should_use_bf16(inference_device)
        and weight_dtype in supported_dtypes
    ):
        return None
    return comfy.model_management.unet_compute_dtype(inference_device, supported_dtypes)


def text_encoder_dtype(device: torch.device | None = None) -> torch.dtype:
    """The dtype in which text encoders compute."""
    for flag, dtype in (
        ("fp8_e4m3fn_text_enc", torch.float8_e4m3fn),
        ("fp8_e5m2_text_enc", torch.float8_e5m2),
        ("fp16_text_enc", torch.float16),
        ("bf16_text_enc", torch.bfloat16),
        ("fp32_text_enc", torch.float32),
    ):
        if getattr(args, flag):
            return dtype
    return torch.float32 if comfy.model_management.is_device_cpu(device) else torch.float16


def vae_dtype(
    device: torch.device | None = None, allowed_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> torch.dtype:
    """The dtype in which a VAE computes."""
    for flag, dtype in (("fp16_vae", torch.float16), ("bf16_vae", torch.bfloat16), ("fp32_vae", torch.float32)):
        if getattr(args, flag):
            return dtype
    device = comfy.model_management.vae_device() if device is None else device
    for dtype in allowed_dtypes:
        if dtype == torch.float16 and comfy.model_management.should_use_fp16(device):
            return dtype
        if dtype == torch.bfloat16 and comfy.model_management.should_use_bf16(device):
            return dtype
    return torch.float32
