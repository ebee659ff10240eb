"""Which attention kernel a GPU uses: measured among the exact ones that are installed, or named by the configuration.

Kernels of torch (cuDNN's and torch's own choice) are always there; packages are used where they are installed:
flash-attn 2, 3 and 4 (exact), and sageattention, which multiplies in eight bits (Zhang et al. 2024) and is therefore used
only when it is asked for. The measurement takes a fraction of a second, at a typical size of each head size, and is kept in
a file until the GPU or a version changes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from utils import atomic_files

HEAD_SIZES = (64, 128)
TYPICAL = (1, 24, 4608)  # pictures, heads, tokens: FLUX.1 at 1024 x 1024
_REPEATS = 5
_PACKAGES = {"flash": ("flash_attn_interface", "flash_attn"), "sage": ("sageattention",)}
_OF_TORCH = ("sdpa", "cudnn")
_SAGE_SIZES = (64, 96, 128)


class Kernel(NamedTuple):
    """An attention without mask on one GPU: `run(q, k, v)`, [B, H, L, D] each, in half precision."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    lossy: bool = False


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out


def _flash() -> Kernel | None:
    """flash-attn, of the first generation in this order that is installed."""
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):  # 3, 2, 4
        if importlib.util.find_spec(name.partition(".")[0]) is None or importlib.util.find_spec(name) is None:
            continue
        function = getattr(importlib.import_module(name), "flash_attn_func", None)
        if function is not None:
            break
    else:
        return None

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Kernel("flash", run)


def _sage() -> Kernel | None:
    if importlib.util.find_spec("sageattention") is None:
        return None
    from sageattention import sageattn

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[-1] not in _SAGE_SIZES:
            return F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
        return out

    return Kernel("sage", run, lossy=True)


_LOADERS = {"flash": _flash, "sage": _sage}


@functools.cache
def kernel_of_package(name: str) -> Kernel | None:
    """The kernel of an optional package (flash, sage); None, with a warning, where it cannot be used."""
    try:
        found = _LOADERS[name]()
        reason = "is not installed"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or GPU
        found, reason = None, f"cannot be used: {str(error).splitlines()[0]}"
    if found is None:
        logging.warning("TACO-DiT: %s attention %s", name, reason)
    return found


def is_installed(name: str) -> bool:
    """Whether a kernel needs no package, or one that is there."""
    return name not in _PACKAGES or any(importlib.util.find_spec(package) for package in _PACKAGES[name])


def available() -> dict[str, Kernel]:
    """The kernels that are installed, by name."""
    found: list[Kernel | None] = [Kernel("sdpa", F.scaled_dot_product_attention)]
    if torch.version.cuda is not None and torch.backends.cudnn.is_available():
        found.append(Kernel("cudnn", _cudnn))
    found += [kernel_of_package(name) for name in _LOADERS if is_installed(name)]
    return {kernel.name: kernel for kernel in found if kernel is not None}


def _milliseconds(kernel: Kernel, device: torch.device, size: int) -> float | None:
    """Time of one typical attention; None where the kernel does not run on the GPU."""
    batch, heads, tokens = TYPICAL
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(batch, tokens, heads, size, **place).transpose(1, 2) for _ in range(3))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        with torch.inference_mode():
            for _ in range(2):
                kernel.run(q, k, v)
            start.record()
            for _ in range(_REPEATS):
                kernel.run(q, k, v)
            stop.record()
            torch.cuda.synchronize(device)
    except RuntimeError:
        return None
    return start.elapsed_time(stop) / _REPEATS


def identity(device: torch.device, names: list[str]) -> list[Any]:
    """What a measurement depends on: the GPU, and the versions of everything that has a kernel."""
    versions = [torch.__version__, torch.version.cuda, torch.backends.cudnn.version()]
    for package in ("flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [torch.cuda.get_device_name(device), *versions, *names]


def measured(
    names: list[str],
    key: list[Any],
    path: str,
    measure: Callable[[str, int], float | None],
) -> dict[int, dict[str, float]]:
    """{head size: {kernel: ms}} from the file at `path` if it is of this `key`, else by `measure(name, head size)`.

    A file that cannot be written to is named in a warning.
    """
    try:
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
        if kept["key"] == key:
            return {int(size): {name: float(ms) for name, ms in times.items()} for size, times in kept["ms"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is none, or not of this form: it is made anew
    found = {}
    for size in HEAD_SIZES:
        times = {name: measure(name, size) for name in names}
        found[size] = {name: ms for name, ms in times.items() if ms is not None}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        atomic_files.write(path, json.dumps({"key": key, "ms": found}))
    except OSError as error:
        logging.warning(
            "TACO-DiT: %s cannot be written (%s): attention is measured again at the next start", path, error
        )
    return found


def choose(device: torch.device, wanted: str, path: str) -> tuple[dict[int, Kernel], str]:
    """({head size: kernel}, why) for a configured `wanted`; no kernels: torch's choice. path: file of the measurement.

    wanted: a kernel's name, `auto` for the fastest exact one, `pytorch` for the fastest of torch.

    Raises ValueError, with what to do, for a kernel that is not there.
    """
    if device.type != "cuda":
        if wanted in ("auto", "sdpa", "pytorch"):
            return {}, ""
        raise ValueError(f"attention is {wanted!r}, which needs an NVIDIA GPU; allowed on {device.type}: auto, sdpa")
    kernels = available()
    if wanted not in ("auto", "pytorch"):
        if wanted not in kernels:
            packages = " or ".join(_PACKAGES.get(wanted, ("a torch with cuDNN",)))
            there = ", ".join(["auto", *kernels])
            raise ValueError(f"attention is {wanted!r}, for which {packages} must be installed; allowed here: {there}")
        return dict.fromkeys(HEAD_SIZES, kernels[wanted]), "as configured"
    exact = [name for name, kernel in kernels.items() if not kernel.lossy and (wanted == "auto" or name in _OF_TORCH)]
    times = measured(
        exact, identity(device, exact), path, lambda name, size: _milliseconds(kernels[name], device, size)
    )
    fastest = {size: min(of, key=lambda name: of[name]) for size, of in times.items() if of}
    said = "; ".join(
        f"head size {size}: "
        + ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(of.items(), key=lambda at: at[1]))
        for size, of in times.items()
    )
    return {size: kernels[name] for size, name in fastest.items() if name in kernels}, f"measured: {said}"
