"""`from comfy_api.latest import io`: what a V3 node is written with."""

from comfy_api.latest import _types
from comfy_api.latest._dynamic import Autogrow, DynamicCombo, DynamicInput, MatchType
from comfy_api.latest._node import ComfyNode, Hidden, HiddenHolder, NodeOutput, Schema
from comfy_api.latest._types import *  # noqa: F403
from comfy_api.latest._types import Custom, Input, Output, WidgetInput, comfytype

__all__ = [
    "Autogrow",
    "ComfyNode",
    "Custom",
    "DynamicCombo",
    "DynamicInput",
    "Hidden",
    "HiddenHolder",
    "Input",
    "MatchType",
    "NodeOutput",
    "Output",
    "Schema",
    "WidgetInput",
    "comfytype",
    *[name for name in vars(_types) if name[0].isupper() and name not in ("Any", "ClassVar", "Enum")],
]
