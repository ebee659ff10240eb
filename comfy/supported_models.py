"""The configurations of all model families, under ComfyUI's names; they are looked up in the families' records."""

from __future__ import annotations

from typing import Any

import comfy.families
from comfy import supported_models_base

_FAMILIES = (
    "ACEStep",
    "ChromaRadiance",
    "CosmosI2V",
    "CosmosI2VPredict2",
    "CosmosT2IPredict2",
    "CosmosT2V",
    "GenmoMochi",
    "HiDream",
    "Hunyuan3Dv2",
    "Hunyuan3Dv2_1",
    "Hunyuan3Dv2mini",
    "Omnigen2",
    "StableAudio",
    "Stable_Cascade_B",
    "Stable_Cascade_C",
    "WAN21_HuMo",
    "WAN22_Animate",
    "WAN22_S2V",
)
_look_up = comfy.families.lookup(
    "configurations", __name__, {name: f"the model family of {name}" for name in _FAMILIES}
)


def __getattr__(name: str) -> Any:
    if name != "models":
        return _look_up(name)
    # One list for the life of the process, made when it is first asked for: packs add entries.
    found: list[type[supported_models_base.BASE]] = [
        configuration for family in comfy.families.records() for configuration in family.configurations.values()
    ]
    globals()["models"] = found
    return found
