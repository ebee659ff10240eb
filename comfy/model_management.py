"""Devices, dtypes, and which model is where.

Nothing is asked of a device at import. Which device a process uses is decided once by the launcher
(`bind_device`), for all its threads: CUDA's own current device is per thread, ours is not.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import torch

from comfy.cli_args import PerformanceFeature, args


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
    global vram_state, set_vram_to, cpu_state, DISABLE_SMART_MEMORY
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


def extra_reserved_memory() -> int:
    """Bytes of GPU memory to leave to others (`--reserve-vram`)."""
    return int((0.4 if args.reserve_vram is None else args.reserve_vram) * 1024**3)


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


# --- dtypes ---------------------------------------------------------------------------------------------------------


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
    device = get_torch_device() if device is None else device
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
    device = get_torch_device() if device is None else device
    if args.force_fp32 or device.type == "cpu":
        return False
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "xpu"


def supports_fp8_compute(device: torch.device | None = None) -> bool:
    """Whether tensor cores of `device` multiply fp8 (Ada and newer)."""
    if args.supports_fp8_compute:
        return True
    device = get_torch_device() if device is None else device
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def supports_dtype(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether weights of `dtype` can be computed with on `device`."""
    if dtype == torch.float32 or dtype is None:
        return dtype is not None
    if is_device_cpu(device):
        return False
    return dtype in (torch.float16, torch.bfloat16)


def supports_cast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights can be stored as `dtype` on `device` and cast for use."""
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return True
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and not is_device_mps(device)


def pick_weight_dtype(dtype: torch.dtype | None, fallback_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype` if it can be stored on `device`, else `fallback_dtype`."""
    if dtype is None or dtype_size(dtype) > dtype_size(fallback_dtype) or not supports_cast(device, dtype):
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
        if weight_dtype == torch.float32 and not is_device_cpu(device or get_torch_device()):
            return unet_compute_dtype(device or get_torch_device(), supported_dtypes)
        return weight_dtype
    return unet_compute_dtype(device or get_torch_device(), supported_dtypes)


def unet_compute_dtype(device: torch.device, supported_dtypes: Iterable[torch.dtype] = _ALL_FLOATS) -> torch.dtype:
    """The first dtype of `supported_dtypes` that computes fast on `device`; fp32 else."""
    if args.force_fp32:
        return torch.float32
    for dtype in supported_dtypes:
        if dtype == torch.float16 and should_use_fp16(device):
            return dtype
        if dtype == torch.bfloat16 and should_use_bf16(device):
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
    if weight_dtype == torch.float16 and should_use_fp16(inference_device) and weight_dtype in supported_dtypes:
        return None
    if weight_dtype == torch.bfloat16 and should_use_bf16(inference_device) and weight_dtype in supported_dtypes:
        return None
    return unet_compute_dtype(inference_device, supported_dtypes)


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
    return torch.float32 if is_device_cpu(device) else torch.float16


def vae_dtype(
    device: torch.device | None = None, allowed_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> torch.dtype:
    """The dtype in which a VAE computes."""
    for flag, dtype in (("fp16_vae", torch.float16), ("bf16_vae", torch.bfloat16), ("fp32_vae", torch.float32)):
        if getattr(args, flag):
            return dtype
    device = vae_device() if device is None else device
    for dtype in allowed_dtypes:
        if dtype == torch.float16 and should_use_fp16(device):
            return dtype
        if dtype == torch.bfloat16 and should_use_bf16(device):
            return dtype
    return torch.float32


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


class LoadedModel:
    """A model patcher whose model is on its load device, wholly or partly."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # weak: a model that no node holds any more is freed
        self.device = model.load_device
        self.currently_used = True
        self.real_model: Any = None
        self.model_finalizer: Any = None

    @property
    def model(self) -> Any:
        """The patcher, or None once nobody holds it."""
        return self._model()

    def model_memory(self) -> int:
        """Bytes of all weights."""
        return self.model.model_size()

    def model_loaded_memory(self) -> int:
        """Bytes on the load device."""
        return self.model.loaded_size()

    def model_offloaded_memory(self) -> int:
        """Bytes that wait elsewhere."""
        return self.model.model_size() - self.model.loaded_size()

    def model_memory_required(self, device: torch.device) -> int:
        """Bytes that loading to `device` would add."""
        if device == self.model.current_loaded_device():
            return self.model_offloaded_memory()
        return self.model_memory()

    def model_load(self, lowvram_model_memory: int = 0, force_patch_weights: bool = False) -> Any:
        """Bring weights to the load device, at most `lowvram_model_memory` bytes if that is not 0."""
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        self.model.patch_model(
            device_to=self.device, lowvram_model_memory=lowvram_model_memory, load_weights=True,
            force_patch_weights=force_patch_weights,
        )  # fmt: skip
        self.real_model = weakref.ref(self.model.model)
        return self.model.model

    def should_reload_model(self, force_patch_weights: bool = False) -> bool:
        """Whether patched weights must be patched again."""
        return force_patch_weights and self.model.lowvram_patch_counter() > 0

    def model_unload(self, memory_to_free: int | None = None, unpatch_weights: bool = True) -> bool:
        """Free `memory_to_free` bytes if part of the model is enough; else unload it. True when all is unloaded."""
        partly = memory_to_free is not None and memory_to_free < self.model.loaded_size()
        if partly and self.model.partially_unload(self.model.offload_device, memory_to_free) >= memory_to_free:
            return False
        self.model.detach(unpatch_weights)
        self.real_model = None
        return True

    def model_use_more_vram(self, extra_memory: int, force_patch_weights: bool = False) -> int:
        """Load up to `extra_memory` further bytes."""
        return self.model.partially_load(self.device, extra_memory, force_patch_weights=force_patch_weights)

    def is_dead(self) -> bool:
        """Whether nobody holds the patcher any more."""
        return self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is other.model

    def __hash__(self) -> int:
        return id(self)


current_loaded_models: list[LoadedModel] = []
_memory_holders: list[Callable[[], None]] = []


def add_memory_holder(release: Callable[[], None]) -> None:
    """Register somebody who keeps GPU memory for speed only and gives it up when `release` is called."""
    _memory_holders.append(release)


def loaded_models(only_currently_used: bool = False) -> list[Any]:
    """The patchers of loaded models."""
    entries = [m for m in current_loaded_models if not m.is_dead()]
    return [m.model for m in entries if m.currently_used or not only_currently_used]


def free_memory(
    memory_required: int, device: torch.device, keep_loaded: Sequence[LoadedModel] = ()
) -> list[LoadedModel]:
    """Unload models from `device`, least recently used first, until `memory_required` bytes are free."""
    cleanup_models_gc()
    unloaded: list[LoadedModel] = []
    candidates = [m for m in reversed(current_loaded_models) if m.device == device and m not in keep_loaded]
    if is_device_cpu(device) and memory_required < 1e20:
        return unloaded  # weights on the CPU are pages of their files: the system drops them when it must
    if _memory_holders and get_free_memory(device) < memory_required:
        for release in _memory_holders:
            release()
        soft_empty_cache()
    for entry in candidates:
        if entry.is_dead():
            current_loaded_models.remove(entry)
            continue
        if not DISABLE_SMART_MEMORY:
            missing = memory_required - get_free_memory(device)
            if missing <= 0:
                break
        else:
            missing = None
        entry.currently_used = False
        if entry.model_unload(None if missing is None or memory_required >= 1e20 else int(missing)):
            current_loaded_models.remove(entry)
            unloaded.append(entry)
    if unloaded:
        soft_empty_cache()
    return unloaded


def load_models_gpu(
    models: Sequence[Any],
    memory_required: float = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: float | None = None,
    force_full_load: bool = False,
) -> None:
    """Bring models to their load devices, leaving `memory_required` bytes for computation.

    What does not fit stays in host memory and is brought to the device layer by layer. Models of other prompts are
    unloaded first when memory is short.
    """
    cleanup_models_gc()
    needed = max(minimum_inference_memory(), memory_required + extra_reserved_memory())
    minimum = needed if minimum_memory_required is None else max(
        minimum_inference_memory(), minimum_memory_required + extra_reserved_memory()
    )  # fmt: skip
    wanted: list[Any] = []
    for model in models:
        for patcher in (model, *getattr(model, "model_patches_models", list)()):
            if not any(patcher is w for w in wanted):
                wanted.append(patcher)
    entries = [_entry_for(patcher) for patcher in wanted]
    for entry in entries:
        _retire_clones(entry)
    by_device: dict[torch.device, int] = {}
    for entry in entries:
        by_device[entry.device] = by_device.get(entry.device, 0) + entry.model_memory_required(entry.device)
    for device, size in by_device.items():
        if not is_device_cpu(device):
            free_memory(int(size * 1.1 + needed), device, keep_loaded=entries)
    for entry in entries:
        _load_entry(entry, needed, minimum, force_patch_weights, force_full_load)
        if entry in current_loaded_models:
            current_loaded_models.remove(entry)
        current_loaded_models.insert(0, entry)


def _entry_for(patcher: Any) -> LoadedModel:
    for entry in current_loaded_models:
        if entry.model is patcher:
            entry.currently_used = True
            return entry
    return LoadedModel(patcher)


def _retire_clones(entry: LoadedModel) -> None:
    """Unload other patchers of the same network: one network holds one set of patched weights."""
    for other in list(current_loaded_models):
        if other.is_dead():  # collected since the list was cleaned
            current_loaded_models.remove(other)
        elif other is not entry and other.model.is_clone(entry.model):
            other.model.detach(unpatch_all=not other.model.clone_has_same_weights(entry.model))
            current_loaded_models.remove(other)


def _load_entry(
    entry: LoadedModel, needed: float, minimum: float, force_patch_weights: bool, force_full_load: bool
) -> None:
    device, budget = entry.device, 0
    if not is_device_cpu(device) and vram_state != VRAMState.HIGH_VRAM and not force_full_load:
        free = get_free_memory(device)
        to_load = entry.model_memory_required(device)
        if vram_state == VRAMState.NO_VRAM:
            budget = 1
        elif to_load > free - needed or vram_state == VRAMState.LOW_VRAM:
            limit = get_total_memory(device) * MIN_WEIGHT_MEMORY_RATIO if vram_state == VRAMState.LOW_VRAM else free
            budget = max(1, int(min(limit, free - minimum)))
            logging.info(
                "%s: %.0f of %.0f MiB of weights fit on %s; the rest stays in host memory",
                type(entry.model.model).__name__, budget / 2**20, to_load / 2**20, device,
            )  # fmt: skip
    entry.model_load(budget, force_patch_weights=force_patch_weights)


def load_model_gpu(model: Any) -> None:
    """`load_models_gpu` for one model."""
    load_models_gpu([model])


def cleanup_models_gc() -> None:
    """Drop entries whose model is gone."""
    if any(entry.is_dead() for entry in current_loaded_models):
        cleanup_models()
        gc.collect()


def cleanup_models() -> None:
    """Remove dead entries from the list."""
    for entry in [m for m in current_loaded_models if m.is_dead()]:
        current_loaded_models.remove(entry)


def unload_all_models() -> None:
    """Unload everything everywhere."""
    cleanup_models()
    for entry in list(current_loaded_models):
        entry.model_unload()
        current_loaded_models.remove(entry)
    soft_empty_cache(True)


def unload_model_clones(model: Any, unload_weights_only: bool = True, force_unload: bool = True) -> None:
    """Unload every patcher of the same network."""
    for entry in [m for m in current_loaded_models if not m.is_dead() and m.model.is_clone(model)]:
        entry.model_unload()
        current_loaded_models.remove(entry)


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
