"""ControlNets under ComfyUI's names; see `comfy.control`."""

from __future__ import annotations

from comfy.control.base import ControlBase, StrengthType, broadcast_image_to
from comfy.control.loading import load_controlnet, load_controlnet_state_dict
from comfy.control.network import ControlNet
from comfy.missing import missing_class, missing_function

__all__ = [
    "ControlBase", "ControlLora", "ControlNet", "ControlNetSD35", "StrengthType", "T2IAdapter", "broadcast_image_to",
    "load_controlnet", "load_controlnet_state_dict", "load_t2i_adapter",
]  # fmt: skip

ControlLora = missing_class("ControlLora", "ControlNet for UNets")
ControlNetSD35 = missing_class("ControlNetSD35", "ControlNet for SD3.5")
T2IAdapter = missing_class("T2IAdapter", "T2I-Adapter")
load_t2i_adapter = missing_function("T2I-Adapter")
