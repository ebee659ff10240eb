"""Plain values as nodes, to be used in several places."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def primitive(node_id: str, display_name: str, value: Any, kind: Any) -> type[io.ComfyNode]:
    """A node whose only output is its only input."""

    class Primitive(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=node_id,
                display_name=display_name,
                category="utils/primitive",
                inputs=[value],
                outputs=[kind.Output()],
            )

        @classmethod
        def execute(cls, value: Any):
            return io.NodeOutput(value)

    Primitive.__name__ = Primitive.__qualname__ = node_id
    return Primitive


String = primitive("PrimitiveString", "String", io.String.Input("value"), io.String)
StringMultiline = primitive(
    "PrimitiveStringMultiline", "String (Multiline)", io.String.Input("value", multiline=True), io.String
)
Int = primitive(
    "PrimitiveInt",
    "Int",
    io.Int.Input("value", min=-sys.maxsize, max=sys.maxsize, control_after_generate=True),
    io.Int,
)
Float = primitive("PrimitiveFloat", "Float", io.Float.Input("value", min=-sys.maxsize, max=sys.maxsize), io.Float)
Boolean = primitive("PrimitiveBoolean", "Boolean", io.Boolean.Input("value"), io.Boolean)

comfy_entrypoint = extension(String, StringMultiline, Int, Float, Boolean)
