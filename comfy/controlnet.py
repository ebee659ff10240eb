"""ControlNets under ComfyUI's names; see `comfy.control`."""

from __future__ import annotations

from comfy.control.base import ControlBase, StrengthType, broadcast_image_to
from comfy.control.loading import load_controlnet, load_controlnet_state_dict
from comfy.control.lora import ControlLora
from comfy.control.network import ControlNet
from comfy.control.sd3 import ControlNetSD35
from comfy.control.t2i import T2IAdapter, load_t2i_adapter

__all__ = [
    "ControlBase", "ControlLora", "ControlNet", "ControlNetSD35", "StrengthType", "T2IAdapter", "broadcast_image_to",
    "load_controlnet", "load_controlnet_state_dict", "load_t2i_adapter",
]  # fmt: skip
