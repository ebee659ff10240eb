"""Skip-layer guidance for any DiT."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.layer_skip import layer_numbers, with_skipped_layers, with_weak_negative
from comfy_nodes.v3 import extension, share

LAYERS = [
    io.String.Input("double_layers", default="7, 8, 9", multiline=False),
    io.String.Input("single_layers", default="7, 8, 9", multiline=False),
]


def _layers(double_layers: str, single_layers: str) -> dict[str, list[int]]:
    return {"double_block": layer_numbers(double_layers), "single_block": layer_numbers(single_layers)}


class SkipLayerGuidanceDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SkipLayerGuidanceDiT",
            category="advanced/guidance",
            is_experimental=True,
            description="Generic version of SkipLayerGuidance node that can be used on every DiT model.",
            inputs=[
                io.Model.Input("model"),
                *LAYERS,
                share("scale", 3.0, 10.0, step=0.1),
                share("start_percent", 0.01, step=0.001),
                share("end_percent", 0.15, step=0.001),
                share("rescaling_scale", 0.0, 10.0),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        start_percent: float,
        end_percent: float,
        double_layers: str = "",
        single_layers: str = "",
        rescaling_scale: float = 0,
    ):
        layers = _layers(double_layers, single_layers)
        return io.NodeOutput(with_skipped_layers(model, layers, scale, start_percent, end_percent, rescaling_scale))

    skip_guidance = execute


class SkipLayerGuidanceDiTSimple(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SkipLayerGuidanceDiTSimple",
            category="advanced/guidance",
            is_experimental=True,
            description="Simple version of the SkipLayerGuidanceDiT node that only modifies the uncond pass.",
            inputs=[
                io.Model.Input("model"),
                *LAYERS,
                share("start_percent", 0.0, step=0.001),
                share("end_percent", 1.0, step=0.001),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, start_percent: float, end_percent: float, double_layers: str = "", single_layers: str = ""
    ):
        layers = _layers(double_layers, single_layers)
        return io.NodeOutput(with_weak_negative(model, layers, start_percent, end_percent))

    skip_guidance = execute


comfy_entrypoint = extension(SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple)
