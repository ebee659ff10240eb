"""What a rank's device does at this moment: memory, use, temperature. An unavailable value is None."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import torch


class _Gpu:
    """An NVIDIA GPU, read through NVML, which does not disturb the device's work."""

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._device = device
        self._nvml = pynvml
        self._handle: Any = None
        # The name of a GPU that stays the same whatever CUDA_VISIBLE_DEVICES says.
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        for kind in ("GPU", "MIG"):
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                self._handle = self._handle or pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")

    def _ask(self, question: Any, *arguments: Any) -> Any:
        if self._handle is None:
            return None
        try:
            return question(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def read(self) -> dict[str, Any]:
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        free, total = torch.cuda.mem_get_info(self._device) if memory is None else (memory.free, memory.total)
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates)
        return {
            "memory_total": int(total),
            "memory_free": int(free),
            "memory_used": int(total - free),
            "utilisation": None if rates is None else rates.gpu / 100,
            "temperature": self._ask(self._nvml.nvmlDeviceGetTemperature, self._nvml.NVML_TEMPERATURE_GPU),
        }


class RankSampler:
    """Reads one rank's device; on the CPU, this process's memory and its share of all cores."""

    def __init__(self, device: torch.device) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # psutil's first value has nothing to compare with
        self._cores = psutil.cpu_count() or 1
        self._gpu = _Gpu(device) if device.type == "cuda" else None

    def read(self) -> dict[str, Any]:
        """Bytes of memory, `utilisation` from 0 to 1, `temperature` in degrees Celsius."""
        process = self._process.memory_info().rss
        if self._gpu is not None:
            return {**self._gpu.read(), "process_memory": process}
        machine = psutil.virtual_memory()
        return {
            "memory_total": machine.total,
            "memory_free": machine.available,
            "memory_used": process,
            "utilisation": min(1.0, self._process.cpu_percent() / 100 / self._cores),
            "temperature": None,
            "process_memory": process,
        }
