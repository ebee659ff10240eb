"""ControlNets: not in this version; the names exist for packs that import them."""

from __future__ import annotations

from comfy.missing import missing_class, missing_function

ControlBase = missing_class("ControlBase", "ControlNet")
ControlNet = missing_class("ControlNet", "ControlNet")
ControlLora = missing_class("ControlLora", "ControlNet")
ControlNetSD35 = missing_class("ControlNetSD35", "ControlNet")
T2IAdapter = missing_class("T2IAdapter", "T2I-Adapter")
StrengthType = missing_class("StrengthType", "ControlNet")
broadcast_image_to = missing_function("ControlNet")
load_controlnet = missing_function("ControlNet")
load_t2i_adapter = missing_function("T2I-Adapter")
