"""Devices, dtypes, and which model is where.

Nothing is asked of a device at import. Which device a process uses is decided once by the launcher
(`bind_device`), for all its threads: CUDA's own current device is per thread, ours is not.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from typing import Any

import psutil
import torch

from comfy.cli_args import PerformanceFeature, args
from comfy.dtype_choice import (
    dtype_size,
    pick_weight_dtype,
    should_use_bf16,
    should_use_fp16,
    supports_cast,
    supports_dtype,
    supports_fp8_compute,
    text_encoder_dtype,
    unet_compute_dtype,
    unet_dtype,
    unet_manual_cast,
    vae_dtype,
)
from comfy.newer_management import (
    MAX_PINNED_MEMORY,
    current_stream,
    in_training,
    intermediate_dtype,
    lora_compute_dtype,
    pin_memory,
    raise_non_oom,
    unpin_memory,
)
from comfy.weights.loading import (
    LoadedModel,
    add_memory_holder,
    check_weight_files,
    cleanup_models,
    cleanup_models_gc,
    current_loaded_models,
    free_memory,
    load_model_gpu,
    load_models_gpu,
    loaded_models,
    unload_all_models,
    unload_model_clones,
)

__all__ = [
    "MAX_PINNED_MEMORY",
    "LoadedModel",
    "add_memory_holder",
    "check_weight_files",
    "cleanup_models",
    "cleanup_models_gc",
    "current_loaded_models",
    "current_stream",
    "dtype_size",
    "free_memory",
    "in_training",
    "intermediate_dtype",
    "load_model_gpu",
    "load_models_gpu",
    "loaded_models",
    "lora_compute_dtype",
    "pick_weight_dtype",
    "pin_memory",
    "raise_non_oom",
    "should_use_bf16",
    "should_use_fp16",
    "supports_cast",
    "supports_dtype",
    "supports_fp8_compute",
    "text_encoder_dtype",
    "unet_compute_dtype",
    "unet_dtype",
    "unet_manual_cast",
    "unload_all_models",
    "unload_model_clones",
    "unpin_memory",
    "vae_dtype",
]


class VRAMState(enum.Enum):
    """How GPU memory is to be used."""

    DISABLED = 0
    NO_VRAM = 1
    LOW_VRAM = 2
    NORMAL_VRAM = 3
    HIGH_VRAM = 4
    SHARED = 5


class CPUState(enum.Enum):
    """Where computation happens."""

    GPU = 0
    CPU = 1
    MPS = 2


XFORMERS_IS_AVAILABLE = False
XFORMERS_ENABLED_VAE = False
DISABLE_SMART_MEMORY = False
OOM_EXCEPTION: type[BaseException] = torch.OutOfMemoryError
MIN_WEIGHT_MEMORY_RATIO = 0.4
MINIMUM_INFERENCE_GIB = 0.8

vram_state = VRAMState.NORMAL_VRAM
set_vram_to = VRAMState.NORMAL_VRAM
cpu_state = CPUState.GPU
lowvram_available = True
directml_enabled = False

_bound_device: torch.device | None = None


def configure() -> None:
    """Take memory settings from `comfy.cli_args.args`; call after the command line was read."""
    global vram_state, set_vram_to, cpu_state, DISABLE_SMART_MEMORY, EXTRA_RESERVED_VRAM
    if args.reserve_vram is not None:
        EXTRA_RESERVED_VRAM = args.reserve_vram * 1024**3
    DISABLE_SMART_MEMORY = bool(args.disable_smart_memory)
    cpu_state = CPUState.CPU if args.cpu else CPUState.GPU
    if args.lowvram:
        set_vram_to = VRAMState.LOW_VRAM
    elif args.novram:
        set_vram_to = VRAMState.NO_VRAM
    elif args.highvram or args.gpu_only:
        set_vram_to = VRAMState.HIGH_VRAM
    else:
        set_vram_to = VRAMState.NORMAL_VRAM
    vram_state = set_vram_to
    if args.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if PerformanceFeature.Fp16Accumulation in args.fast:
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
    if PerformanceFeature.AutoTune in args.fast:
        torch.backends.cudnn.benchmark = True


def bind_device(device: torch.device | str | None) -> None:
    """Fix this process's device for all threads; None returns to automatic choice."""
    global _bound_device
    _bound_device = None if device is None else torch.device(device)
    enter_device_thread()


def enter_device_thread() -> None:
    """Make the bound device CUDA's current one in the calling thread; every worker thread calls this first."""
    if _bound_device is not None and _bound_device.type == "cuda":
        torch.cuda.set_device(_bound_device)


def get_torch_device() -> torch.device:
    """The device this process computes on."""
    if args.cpu or cpu_state == CPUState.CPU:
        return torch.device("cpu")
    if _bound_device is not None:
        return _bound_device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def get_torch_device_name(device: torch.device) -> str:
    """Readable name of a device, for logs and `/system_stats`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return device.type


def get_autocast_device(dev: torch.device | None) -> str:
    """Device type for `torch.autocast`."""
    return getattr(dev, "type", "cuda")


def _host_memory() -> Any:
    return psutil.virtual_memory()


def get_total_memory(dev: torch.device | None = None, torch_total_too: bool = False) -> Any:
    """Bytes of memory of `dev`; with `torch_total_too` also what torch's allocator holds."""
    dev = get_torch_device() if dev is None else dev
    if dev.type == "cuda":
        total = torch.cuda.mem_get_info(dev)[1]
        held = torch.cuda.memory_stats(dev).get("reserved_bytes.all.current", 0)
    else:
        total = held = _host_memory().total
    return (total, held) if torch_total_too else total


def get_free_memory(dev: torch.device | None = None, torch_free_too: bool = False) -> Any:
    """Bytes free on `dev`, torch's unused cache counted as free; with `torch_free_too` also that cache."""
    dev = get_torch_device() if dev is None else dev
    if dev.type == "cuda":
        stats = torch.cuda.memory_stats(dev)
        cached = stats.get("reserved_bytes.all.current", 0) - stats.get("active_bytes.all.current", 0)
        free = torch.cuda.mem_get_info(dev)[0] + cached
    else:
        free = cached = _host_memory().available
    return (free, cached) if torch_free_too else free


EXTRA_RESERVED_VRAM: float = 0.4 * 1024**3


def extra_reserved_memory() -> int:
    """Bytes of GPU memory to leave to others (`--reserve-vram`, or what a pack sets `EXTRA_RESERVED_VRAM` to)."""
    return int(EXTRA_RESERVED_VRAM)


def minimum_inference_memory() -> int:
    """Bytes a computation needs in any case."""
    return int(MINIMUM_INFERENCE_GIB * 1024**3) + extra_reserved_memory()


# --- kinds of devices -----------------------------------------------------------------------------------------------


def is_device_type(device: Any, type: str) -> bool:
    """Whether `device` is of a torch device type."""
    return getattr(device, "type", None) == type


def is_device_cpu(device: Any) -> bool:
    """Whether `device` is the CPU."""
    return is_device_type(device, "cpu")


def is_device_mps(device: Any) -> bool:
    """Whether `device` is Apple's GPU."""
    return is_device_type(device, "mps")


def is_device_cuda(device: Any) -> bool:
    """Whether `device` is a CUDA device."""
    return is_device_type(device, "cuda")


def is_device_xpu(device: Any) -> bool:
    """Whether `device` is an Intel GPU."""
    return is_device_type(device, "xpu")


def is_nvidia() -> bool:
    """Whether this process computes on an NVIDIA GPU."""
    return get_torch_device().type == "cuda" and torch.version.cuda is not None


def is_amd() -> bool:
    """Whether this process computes on an AMD GPU."""
    return get_torch_device().type == "cuda" and torch.version.hip is not None


xpu_available = False  # there is no way here to compute on Intel's GPUs


def is_intel_xpu() -> bool:
    """Whether this process computes on an Intel GPU."""
    return get_torch_device().type == "xpu"


def is_ascend_npu() -> bool:
    """Whether this process computes on an Ascend NPU; not supported here."""
    return False


def is_mlu() -> bool:
    """Whether this process computes on an MLU; not supported here."""
    return False


def is_directml_enabled() -> bool:
    """DirectML is not supported here."""
    return directml_enabled


def cpu_mode() -> bool:
    """Whether everything runs on the CPU."""
    return get_torch_device().type == "cpu"


def mps_mode() -> bool:
    """Whether everything runs on Apple's GPU."""
    return get_torch_device().type == "mps"


# --- placement ------------------------------------------------------------------------------------------------------


def unet_offload_device() -> torch.device:
    """Where a diffusion model waits."""
    return get_torch_device() if vram_state == VRAMState.HIGH_VRAM else torch.device("cpu")


def unet_inital_load_device(parameters: int, dtype: torch.dtype) -> torch.device:  # ComfyUI's spelling
    """Where a diffusion model is built; always the CPU, so that its file stays memory-mapped until it is used."""
    return torch.device("cpu")


def text_encoder_device() -> torch.device:
    """Where text encoders compute."""
    return get_torch_device()


def text_encoder_offload_device() -> torch.device:
    """Where text encoders wait."""
    return get_torch_device() if args.gpu_only else torch.device("cpu")


def text_encoder_initial_device(load_device: torch.device, offload_device: torch.device, model_size: int = 0) -> Any:
    """Where a text encoder is built."""
    return offload_device


def intermediate_device() -> torch.device:
    """Where results between nodes live."""
    return get_torch_device() if args.gpu_only else torch.device("cpu")


def vae_device() -> torch.device:
    """Where VAEs compute."""
    return torch.device("cpu") if args.cpu_vae else get_torch_device()


def vae_offload_device() -> torch.device:
    """Where VAEs wait."""
    return get_torch_device() if args.gpu_only else torch.device("cpu")


def device_supports_non_blocking(device: Any) -> bool:
    """Whether copies to `device` may be asynchronous."""
    if args.force_non_blocking:
        return True
    return is_device_cuda(device) and not args.deterministic


def device_should_use_non_blocking(device: Any) -> bool:
    """Whether weights go to `device` by asynchronous copies; off, as unpinned memory gains nothing."""
    return False


def force_channels_last() -> bool:
    """Whether convolutions use the channels-last layout."""
    return bool(args.force_channels_last)


def cast_to(
    weight: torch.Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    stream: Any = None,
) -> torch.Tensor:
    """`weight` on `device` as `dtype`."""
    return weight.to(device=device, dtype=dtype, non_blocking=non_blocking, copy=copy)


def cast_to_device(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None, copy: bool = False
) -> torch.Tensor:
    """`cast_to` with a copy that does not block where that is safe."""
    return cast_to(tensor, dtype, device, non_blocking=device_supports_non_blocking(device), copy=copy)


# --- attention ------------------------------------------------------------------------------------------------------


def xformers_enabled() -> bool:
    """xformers is not used here."""
    return False


def xformers_enabled_vae() -> bool:
    """xformers is not used here."""
    return False


def pytorch_attention_enabled() -> bool:
    """Torch's fused attention is always on."""
    return True


def pytorch_attention_flash_attention() -> bool:
    """Whether torch's attention saves memory as flash attention does."""
    return get_torch_device().type != "cpu"


def flash_attention_enabled() -> bool:
    """Whether `--use-flash-attention` was given."""
    return bool(args.use_flash_attention)


def sage_attention_enabled() -> bool:
    """Whether `--use-sage-attention` was given."""
    return bool(args.use_sage_attention)


def force_upcast_attention_dtype() -> dict[torch.dtype, torch.dtype] | None:
    """dtypes whose attention is computed in a higher one."""
    return {torch.float16: torch.float32} if args.force_upcast_attention else None


# --- what is loaded -------------------------------------------------------------------------------------------------


def module_size(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.nelement() * t.element_size() for t in module.state_dict(keep_vars=True).values())


def soft_empty_cache(force: bool = False) -> None:
    """Give cached GPU memory back."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def debug_memory_summary() -> str:
    """Torch's memory report for the device, empty on the CPU."""
    return torch.cuda.memory_summary() if is_nvidia() or is_amd() else ""


def resolve_lowvram_weight(weight: torch.Tensor, model: Any, key: str) -> torch.Tensor:
    """The weight itself; weights that wait in host memory are ordinary tensors here."""
    return weight


# --- interrupting ---------------------------------------------------------------------------------------------------


class InterruptProcessingException(Exception):
    """The user cancelled the prompt."""


_interrupt_lock = threading.RLock()
_interrupt = False
_interrupt_check: Any = None


def interrupt_current_processing(value: bool = True) -> None:
    """Ask the prompt in progress to stop (or withdraw that)."""
    global _interrupt
    with _interrupt_lock:
        _interrupt = value


def processing_interrupted() -> bool:
    """Whether a stop was asked for."""
    with _interrupt_lock:
        return _interrupt


def set_interrupt_check(check: Any) -> None:
    """Replace what `throw_exception_if_processing_interrupted` does; several ranks must agree before they stop."""
    global _interrupt_check
    _interrupt_check = check


def throw_exception_if_processing_interrupted() -> None:
    """Raise InterruptProcessingException, once, if a stop was asked for."""
    if _interrupt_check is not None:
        _interrupt_check()
    else:
        raise_if_interrupted()


def raise_if_interrupted() -> None:
    """The check of a single rank."""
    global _interrupt
    with _interrupt_lock:
        if _interrupt:
            _interrupt = False
            raise InterruptProcessingException()
