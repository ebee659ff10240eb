"""All ways to lay out a network on some ranks, each with its best plan, predicted time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config_manager import ConfigError, ParallelConfig, can_run, divisors
from .costs import Estimate, Memory, memory, pipefusion_ms
from .degrees import ParallelDims, Workload, share
from .layout import Layout, Placement
from .machine_profile import MachineProfile
from .network_cost import NetworkCost
from .plan import Plan, choose_plan

USABLE = 0.9
"""Of a device's memory; the rest is for its driver, communicators and kernels' workspace."""
# The configuration's key by which each strategy is turned on; those that this version cannot run are never chosen.
KEYS = {
    "sharded": "memory.shard_weights",
    "tensor": "parallel.tensor_parallel",
    "pipeline": "parallel.pipeline_parallel",
    "pipefusion": "parallel.pipefusion",
}
_NOT_IN_THIS_VERSION = "not in this version"


@dataclass(frozen=True)
class Weighed:
    """A layout with its best plan. objection: why it is not chosen though it may be fast, or empty."""

    name: str
    plan: str
    predicted: Estimate
    memory: Memory
    reason: str = ""
    objection: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in ms, memory in bytes."""
        return {
            "layout": self.name, "plan": self.plan, "predicted_ms": round(self.predicted.total, 2),
            "compute_ms": round(self.predicted.compute, 2), "exchange_ms": round(self.predicted.exchange, 2),
            "weights_ms": round(self.predicted.weights, 2), "waiting_ms": round(self.predicted.waiting, 2),
            "memory_bytes": round(self.memory.total), "reason": self.reason, "objection": self.objection,
        }  # fmt: skip


def _stages(blocks: int, stages: int) -> tuple[tuple[int, int], ...]:
    return tuple(share(blocks, stages, i) for i in range(stages))


def _layouts(network: NetworkCost, ranks: int) -> Iterator[tuple[str, Layout]]:
    """(strategy, layout) of every way to keep the weights on the devices; without the contract's blocks only whole."""
    yield "whole", Layout()
    if network.unet or ranks == 1:
        return
    yield "sharded", Layout(Placement.SHARDED)
    for degree in divisors(ranks)[1:]:
        if degree <= network.heads:
            yield "tensor", Layout(tensor_degree=degree)
    for degree in divisors(ranks)[1:]:
        if degree <= network.blocks:
            yield "pipeline", Layout(pipeline_stages=_stages(network.blocks, degree))


def _too_large(needed: Memory, profile: MachineProfile) -> str:
    """Why the smallest device cannot hold it, or nothing; devices of unknown size hold anything."""
    room = min(device.memory_bytes for device in profile.devices) * USABLE
    if not room or needed.total <= room:
        return ""
    return f"needs {needed.total / 2**30:.1f} GiB, the smallest GPU has {room / 2**30:.1f} for it"


def _weigh(name: str, plan: Plan, needed: Memory, objection: str) -> Weighed:
    assert plan.predicted is not None, "layouts are weighed with profiles whose times mean something"
    return Weighed(name, plan.dims.describe(), plan.predicted, needed, plan.reason, objection)


def weigh_layouts(
    config: ParallelConfig, network: NetworkCost, work: Workload, profile: MachineProfile
) -> list[Weighed]:
    """Every layout, the chosen one first, then those without objection by time, then the others by time.

    Layouts that leave too few copies of the network for fixed degrees are left out. When whole weights do not fit, they are
    streamed from host memory. Raises ConfigError as `choose_plan`.
    """
    ranks = len(profile.devices)
    found = []
    for strategy, layout in _layouts(network, ranks):
        try:
            plan = choose_plan(config, work, ranks, layout, profile, network)
        except ConfigError:
            if strategy == "whole":
                raise
            continue  # fixed degrees need more copies of the network than this layout leaves
        needed = memory(network, work, plan.dims, layout)
        objection = _too_large(needed, profile)
        if strategy in KEYS and not can_run(KEYS[strategy]):
            objection = _NOT_IN_THIS_VERSION
        found.append(_weigh(layout.describe(), plan, needed, objection))
    if found[0].objection:
        found.append(_offloaded(config, network, work, profile))
    if ranks > 1 and not network.unet:
        found.append(_pipefusion(network, work, profile))
    return sorted(found, key=lambda one: (bool(one.objection), one.predicted.total, one.memory.total))


def _offloaded(config: ParallelConfig, network: NetworkCost, work: Workload, profile: MachineProfile) -> Weighed:
    layout = Layout(Placement.OFFLOADED)
    plan = choose_plan(config, work, len(profile.devices), layout, profile, network)
    room = min(device.memory_bytes for device in profile.devices) * USABLE
    activations = memory(network, work, plan.dims).activations
    kept = max(0.0, room - activations)
    plan = choose_plan(config, work, len(profile.devices), layout, profile, network, network.weight_bytes - kept)
    objection = "" if activations < room else "activations alone do not fit"
    return _weigh(layout.describe(), plan, Memory(min(kept, network.weight_bytes), activations), objection)


def _pipefusion(network: NetworkCost, work: Workload, profile: MachineProfile) -> Weighed:
    stages = min(len(profile.devices), network.blocks)
    layout = Layout(pipeline_stages=_stages(network.blocks, stages))
    time = pipefusion_ms(network, work, stages, profile)
    objection = "lossy, only on request" if can_run(KEYS["pipefusion"]) else f"lossy, {_NOT_IN_THIS_VERSION}"
    needed = memory(network, work, ParallelDims(), layout)
    return Weighed(f"pipefusion {stages}", "one rank", Estimate(time, 0.0), needed, "", objection)
