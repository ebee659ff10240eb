"""TACO-DiT: the parallel core. Public names are loaded when they are first used."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"  # of this program; that of ComfyUI whose nodes it has is in comfyui_version.py

_HOMES = {
    "ConfigError": "core.config_manager",
    "TACODiTConfigManager": "core.config_in_force",
    "TACODiTDistributedManager": "core.distributed_manager",
    "TACODiTExecutionEngine": "core.execution_engine",
    "TACODiTModelPatcher": "core.model_wrapper",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
