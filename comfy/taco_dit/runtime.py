"""What belongs together in one running process: configuration, ranks, lockstep, engine.

`main` makes one `Runtime` and activates it; the patcher of a model asks `active()` for it. A process that never did so
(a test, a script that uses the library) is one rank with default configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.weights import loading
from comfy_execution.lockstep import Lockstep

from .core.config_manager import TacoConfig


@dataclass
class Runtime:
    """The parts of a running process."""

    config: TacoConfig
    manager: Any
    lockstep: Lockstep
    engine: Any


_active: Runtime | None = None


def active() -> Runtime | None:
    """The runtime that main activated, or None."""
    return _active


def activate(runtime: Runtime | None) -> None:
    """Make `runtime` the process's own; None forgets it."""
    global _active
    _active = runtime
    loading.arrange_by(None if runtime is None else runtime.engine.arranger.arrange)


def current() -> Runtime:
    """The active runtime, or that of one rank with default configuration."""
    global _active
    if _active is None:
        _active = single()
    return _active


def single(config: TacoConfig | None = None) -> Runtime:
    """A runtime of one rank."""
    import comfy.model_management

    from .core.distributed_manager import RankInfo, TACODiTDistributedManager
    from .core.execution_engine import TACODiTExecutionEngine

    config = config or TacoConfig()
    manager = TACODiTDistributedManager(RankInfo(), comfy.model_management.get_torch_device())
    lockstep = Lockstep()
    return Runtime(config, manager, lockstep, TACODiTExecutionEngine(config, manager, lockstep))
