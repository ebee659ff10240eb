"""Versions, devices, links between them, memory and disk of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from comfy.taco_dit.utils.events import remedy_for

from .findings import OK, PROBLEM, WARNING, Finding

GIB = 1024**3
LEAST_DISK = 2 * GIB
LEAST_MEMORY = 4 * GIB
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:(==|>=)\s*([\w.]+))?")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def versions(requirements: str) -> Iterator[Finding]:
    """The interpreter, torch with what it was built for, and every package of a requirements file."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    parts = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda or 'none'}"]
    if torch.version.cuda and torch.cuda.is_available():
        parts.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
        parts.append(f"cuDNN {torch.backends.cudnn.version()}")
    yield Finding(OK, "torch", ", ".join(parts))
    with open(requirements, encoding="utf-8") as file:
        wanted = [match for line in file if (match := _REQUIREMENT.match(line.strip()))]
    for match in wanted:
        name, relation, version = match.groups()
        yield from _package(name, relation, version)


def _package(name: str, relation: str | None, version: str | None) -> Iterator[Finding]:
    remedy = f"run ./setup_environment.sh, or: pip install '{name}{relation or ''}{version or ''}'"
    try:
        present = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PROBLEM, name, "is not installed", remedy)
        return
    if relation == ">=" and version and _numbers(present) < _numbers(version):
        yield Finding(PROBLEM, name, f"{present} is older than {version}", remedy)
    elif relation == "==" and version and _numbers(present) != _numbers(version):
        yield Finding(WARNING, name, f"{present}, tested with {version}", remedy)
    elif name != "torch":
        yield Finding(OK, name, present)


def devices(gpus: Sequence[int], cpu: bool, messages: Sequence[str]) -> Iterator[Finding]:
    """The devices ranks would get; `messages` are the warnings of the start."""
    for message in messages:
        # A machine without GPUs may be intended; a GPU that was named and does not exist is a mistake.
        level = WARNING if message.startswith("no NVIDIA GPU") else PROBLEM
        yield Finding(level, "GPUs", message, remedy_for(message)[1])
    yield Finding(OK, "CPU", f"{os.cpu_count()} cores, {psutil.cpu_percent(0.1):.0f}% busy")
    if cpu:
        return
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no usable driver"
        remedy = (
            "remove .venv and run ./setup_environment.sh, which installs the build for this machine; check nvidia-smi"
        )
        yield Finding(PROBLEM, "torch", f"the machine has NVIDIA GPUs but torch {built}", remedy)
        return
    import pynvml

    pynvml.nvmlInit()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        yield Finding(OK, "driver", driver if isinstance(driver, str) else driver.decode())
        for gpu in gpus:
            yield from _gpu(pynvml, gpu)
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, gpu: int) -> Iterator[Finding]:
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    degrees = nvml.nvmlDeviceGetTemperature(handle, 0)
    text = (
        f"{name if isinstance(name, str) else name.decode()}, {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB "
        f"free, {rates.gpu}% busy, {degrees} C"
    )
    if memory.free < LEAST_MEMORY:
        yield Finding(WARNING, f"GPU {gpu}", text, "end other programs on this GPU (nvidia-smi names them)")
    else:
        yield Finding(OK, f"GPU {gpu}", text)


def topology(gpus: Sequence[int]) -> Iterator[Finding]:
    """How each pair of GPUs is connected."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in gpus]
        for i, a in enumerate(gpus):
            for j in range(i + 1, len(gpus)):
                direct = torch.cuda.can_device_access_peer(i, j)
                try:
                    level = pynvml.nvmlDeviceGetTopologyCommonAncestor(handles[i], handles[j])
                    joined = _LEVELS.get(level, f"level {level}")
                except pynvml.NVMLError:
                    joined = "unknown path"
                links = _nvlinks(pynvml, handles[i])
                path = f"NVLink ({links} links)" if links else joined
                text = f"{path}, {'direct access' if direct else 'no direct access'}"
                remedy = "ranks exchange through host memory: slower; prefer CFG parallel, or GPUs of one switch"
                yield Finding(OK if direct else WARNING, f"GPU {a} - GPU {gpus[j]}", text, "" if direct else remedy)
    finally:
        pynvml.nvmlShutdown()


_LEVELS = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one PCIe host bridge",
    40: "one CPU socket",
    50: "between CPU sockets",
}


def _nvlinks(pynvml: Any, handle: Any) -> int:
    """Active NVLinks of a GPU; 0 where there are none."""
    count = 0
    for link in range(18):
        try:
            count += bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
        except Exception:  # NVML raises for links the GPU does not have, with a kind that differs by driver
            break
    return count


def resources(folders: Mapping[str, str]) -> Iterator[Finding]:
    """Free memory of the host and disk of the folders (name -> path), which must be writable."""
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    remedy = "end other programs; models wait in host memory while they are not computing"
    yield Finding(OK if memory.available > LEAST_MEMORY else WARNING, "host memory", text, remedy)
    shared = "/dev/shm"
    if os.path.isdir(shared):
        free = shutil.disk_usage(shared).free
        remedy = "in a container, give it more shared memory (docker: --shm-size=1g)"
        enough = free > 64 * 1024**2
        yield Finding(
            OK if enough else WARNING, "shared memory", f"{free / GIB:.2f} GiB free", "" if enough else remedy
        )
    for name, path in folders.items():
        yield _folder(name, path)


def _folder(name: str, path: str) -> Finding:
    existing = path
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 1024 * 1024)
            file.flush()
    except OSError as error:
        remedy = f"free space there or allow writing, or choose another folder (--{name}-directory, --base-directory)"
        return Finding(PROBLEM, f"{name} folder", f"{path} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(existing).free
    text = f"{path}, {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return Finding(
            WARNING, f"{name} folder", text, "free space there; pictures and videos will soon fail to be saved"
        )
    return Finding(OK, f"{name} folder", text)
