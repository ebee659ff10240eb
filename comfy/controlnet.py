"""ControlNets: not in this version; the names exist for packs that import them."""

from __future__ import annotations

from comfy.missing import missing_class, missing_function

ControlBase = missing_class("ControlBase", "ControlNet")
ControlNet = missing_class("ControlNet", "ControlNet")
ControlLora = missing_class("ControlLora", "ControlNet")
T2IAdapter = missing_class("T2IAdapter", "T2I-Adapter")
load_controlnet = missing_function("ControlNet")
load_t2i_adapter = missing_function("T2I-Adapter")
