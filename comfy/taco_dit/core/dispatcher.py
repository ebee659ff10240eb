"""Which ranks a sampling run is given, and how they share it: what the xDiT nodes hand from loader to sampler.

The only group known here is this process's own ranks. Device numbers are ranks: the order of the visible GPUs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from comfy.taco_dit import runtime

from .config_manager import ConfigError, ParallelConfig
from .layout import Layout, Placement

STRATEGIES = ("PipeFusion", "USP", "Hybrid", "Tensor", "CFG")
POLICIES = ("round_robin", "least_loaded", "weighted_round_robin", "adaptive")
_DEGREES = (
    "sequence_parallel_degree",
    "ulysses_degree",
    "ring_degree",
    "data_parallel_degree",
    "spatial_parallel_degree",
)
_FREE: dict[str, Any] = {**dict.fromkeys(_DEGREES), "auto_detect": True}


@dataclass(frozen=True)
class RunPlan:
    """Settings of one run. note: what was asked for and is not done, with the reason; empty when all is."""

    parallel: ParallelConfig
    note: str = ""


@dataclass(frozen=True)
class Dispatcher:
    """An XDIT_DISPATCHER. Raises ConfigError for devices that are not numbers and for names that do not exist."""

    devices: tuple[int, ...]
    strategy: str
    scheduling: str
    enabled: bool = True

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("parallel_strategy", self.strategy, STRATEGIES),
            ("scheduling_strategy", self.scheduling, POLICIES),
        ):
            if value not in allowed:
                raise ConfigError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The devices of each group that can be given a run."""
        return (tuple(range(runtime.current().manager.world_size)),)

    def plan(self, model: Any) -> RunPlan:
        """The plan of a run of a model (`BaseModel`) with this dispatcher's own settings."""
        return self.plan_for(self.devices, self.strategy, model)

    def plan_for(self, devices: tuple[int, ...], strategy: str, model: Any) -> RunPlan:
        """How a run of `model` is computed on `devices`; the same on every rank."""
        current = runtime.current()
        configured, layout = current.config.parallel, current.engine.arranger.layout_of(model)
        if not self.enabled:
            return self._one_gpu(configured, layout, "")
        (group,) = self.groups()
        missing = [str(device) for device in devices if device not in group]
        why = f"gpu_devices names {', '.join(missing)}, and there are only {', '.join(map(str, group))}"
        if missing and not set(group) <= set(devices):
            return self._one_gpu(configured, layout, why)
        if missing and len(group) > 1:  # such as the nodes' default on a machine with fewer GPUs
            found = self.plan_for(group, strategy, model)
            return RunPlan(found.parallel, found.note or f"all {len(group)} GPUs that there are: {why}")
        if len(group) == 1 or len(devices) == 1:
            return self._one_gpu(configured, layout, "")
        if set(devices) != set(group):
            why = f"gpu_devices names {len(devices)} of {len(group)} GPUs, which are one group and cannot be divided"
            return self._one_gpu(configured, layout, why)
        if not configured.enabled:
            return RunPlan(configured, "one GPU: parallel.enabled is false in the configuration")
        free = dataclasses.replace(configured, **_FREE)
        if strategy == "Hybrid":
            kinds: dict[str, Any] = {
                "sequence_parallel": True,
                "cfg_parallel": True,
                "data_parallel": True,
                "spatial_parallel": True,
            }
            return RunPlan(dataclasses.replace(free, **kinds))
        if strategy in ("Tensor", "PipeFusion"):
            return self._as_laid_out(configured, layout, strategy)
        return self._calls_split(free, layout, strategy, model, len(group))

    def _as_laid_out(self, configured: ParallelConfig, layout: Layout, strategy: str) -> RunPlan:
        degree = layout.tensor_degree if strategy == "Tensor" else layout.stages
        if degree == 1:
            key = "tensor_parallel" if strategy == "Tensor" else "pipeline_parallel"
            why = f"{strategy} needs weights that are cut when they are loaded: set parallel.{key}: true"
            return self._one_gpu(configured, layout, why)
        exact = strategy == "PipeFusion" and not configured.pipefusion
        return RunPlan(configured, "an exact pipeline: parallel.pipefusion is false" if exact else "")

    def _calls_split(self, free: ParallelConfig, layout: Layout, strategy: str, model: Any, ranks: int) -> RunPlan:
        if strategy == "USP" and not hasattr(model.diffusion_model, "block_list"):
            name = type(model.diffusion_model).__name__
            return self._one_gpu(free, layout, f"USP shares tokens, and {name} cannot run on a part of its tokens")
        only: dict[str, Any] = {"data_parallel": False, "spatial_parallel": False, "cfg_parallel": strategy == "CFG"}
        degree = ranks // layout.ranks if strategy == "USP" else None
        only |= {"sequence_parallel": strategy == "USP"}
        return RunPlan(dataclasses.replace(free, **only, sequence_parallel_degree=degree))

    @staticmethod
    def _one_gpu(configured: ParallelConfig, layout: Layout, why: str) -> RunPlan:
        """Every rank computes everything; with a network that is cut over ranks they have to work together all the same."""
        if layout.ranks > 1 or layout.placement is Placement.SHARDED:
            return RunPlan(configured, f"all GPUs, as weights are {layout.describe()}" + (why and f": {why}"))
        return RunPlan(dataclasses.replace(configured, enabled=False), why and f"one GPU: {why}")


def parse_devices(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2), each once. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"gpu_devices is {text!r}; write numbers of GPUs with commas between, such as 0,1")
    return tuple(dict.fromkeys(int(part) for part in parts))
