"""Choosing between values, and values of a choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension

LOGIC = "utils/logic"
# stands for an input that is not connected; None is one that is not computed yet
NOTHING = object()


class ComfySwitchNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kind = io.MatchType.Template("switch")
        return io.Schema(
            node_id="ComfySwitchNode",
            display_name="If/Else Switch",
            category=LOGIC,
            is_experimental=True,
            description="Passes on one of two inputs; the other is not computed.",
            inputs=[
                io.Boolean.Input("switch"),
                io.MatchType.Input("on_false", template=kind, lazy=True, optional=True),
                io.MatchType.Input("on_true", template=kind, lazy=True, optional=True),
            ],
            outputs=[io.MatchType.Output(template=kind, display_name="output")],
        )

    @classmethod
    def check_lazy_status(cls, switch: bool, on_false: Any = NOTHING, on_true: Any = NOTHING):
        name, chosen = ("on_true", on_true) if switch else ("on_false", on_false)
        return [name] if chosen is None else []

    @classmethod
    def execute(cls, switch: bool, on_false: Any = None, on_true: Any = None):
        return io.NodeOutput(on_true if switch else on_false)


class CustomCombo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CustomCombo",
            display_name="Custom Combo",
            category="utils",
            is_experimental=True,
            description="A choice whose options are written on the node.",
            inputs=[io.Combo.Input("choice", options=[])],
            outputs=[io.String.Output(display_name="STRING"), io.Int.Output(display_name="INDEX")],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, choice: str, index: int = 0, **options: Any):
        """The options are the page's, so any choice is right."""
        return True

    @classmethod
    def execute(cls, choice: str, index: int = 0, **options: Any):
        return io.NodeOutput(choice, index)


class ComfyNotNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ComfyNotNode",
            display_name="Not",
            category=LOGIC,
            description="True for a value that is false, 0 or empty.",
            inputs=[io.AnyType.Input("value")],
            outputs=[io.Boolean.Output()],
        )

    @classmethod
    def execute(cls, value: Any):
        return io.NodeOutput(not value)


def joined(node_id: str, display_name: str, description: str, join: Callable[[Any], bool]) -> type[io.ComfyNode]:
    """A node that makes one truth of many."""

    class Joined(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            values = io.Autogrow.TemplatePrefix(io.AnyType.Input("value"), prefix="value", min=1)
            return io.Schema(
                node_id=node_id,
                display_name=display_name,
                category=LOGIC,
                description=description,
                inputs=[io.Autogrow.Input("values", template=values)],
                outputs=[io.Boolean.Output()],
            )

        @classmethod
        def execute(cls, values: dict[str, Any]):
            return io.NodeOutput(join(values.values()))

    Joined.__name__ = Joined.__qualname__ = node_id
    return Joined


And = joined("ComfyAndNode", "And", "True when all values are true.", all)
Or = joined("ComfyOrNode", "Or", "True when any value is true.", any)


class ComfyPassOrNoneNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kind = io.MatchType.Template("value")
        return io.Schema(
            node_id="ComfyPassOrNoneNode",
            display_name="Pass or None",
            category=LOGIC,
            description="Passes on a value, or another one where it is missing.",
            inputs=[
                io.MatchType.Input("anything", template=kind, optional=True),
                io.MatchType.Input("default", template=kind, optional=True),
            ],
            outputs=[io.MatchType.Output(template=kind, id="output"), io.Boolean.Output("is_none")],
        )

    @classmethod
    def execute(cls, anything: Any = None, default: Any = None):
        return io.NodeOutput(*((default, default is None) if anything is None else (anything, False)))


comfy_entrypoint = extension(ComfySwitchNode, CustomCombo, ComfyNotNode, And, Or, ComfyPassOrNoneNode)
