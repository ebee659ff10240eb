"""Numbers: expressions, conversion, seeds, sizes of pictures."""

from __future__ import annotations

import math
import string
import sys
from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

HIGHEST_POWER = 4000
RATIOS = {
    "1:1 (Square)": (1, 1),
    "3:2 (Photo)": (3, 2),
    "4:3 (Standard)": (4, 3),
    "16:9 (Widescreen)": (16, 9),
    "21:9 (Ultrawide)": (21, 9),
    "2:3 (Portrait Photo)": (2, 3),
    "3:4 (Portrait Standard)": (3, 4),
    "9:16 (Portrait Widescreen)": (9, 16),
}


def _sum(*values: Any) -> Any:
    """Of one list, or of its arguments."""
    return sum(values[0] if len(values) == 1 and isinstance(values[0], list) else values)


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > HIGHEST_POWER:
        raise ValueError(f"the exponent {exponent} is too large; use one up to {HIGHEST_POWER}")
    return base**exponent


FUNCTIONS = {
    "sum": _sum,
    "pow": _power,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "float": float,
    **{name: getattr(math, name) for name in ("sqrt", "ceil", "floor", "log", "log2", "log10", "sin", "cos", "tan")},
}


def evaluate(expression: str, values: dict[str, Any]) -> int | float | bool:
    """The value of an expression of numbers. Raises ValueError saying what is wrong with it."""
    from simpleeval import InvalidExpression, simple_eval

    if not expression.strip():
        raise ValueError("the expression is empty; write one such as a + b")
    try:
        result = simple_eval(expression, names={**values, "values": list(values.values())}, functions=FUNCTIONS)
    except (InvalidExpression, SyntaxError, ArithmeticError, TypeError) as error:
        raise ValueError(f"the expression {expression!r} cannot be computed: {error}") from error
    if not isinstance(result, int | float):
        raise ValueError(f"the expression {expression!r} gives {result!r}, which is no number")
    if not abs(result) <= sys.float_info.max:
        raise ValueError(f"the expression {expression!r} gives {result}, which is not finite")
    return result


class ComfyMathExpression(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        value = io.MultiType.Input("value", [io.Float, io.Int, io.Boolean], optional=True)
        values = io.Autogrow.TemplateNames(value, names=list(string.ascii_lowercase), min=1)
        return io.Schema(
            node_id="ComfyMathExpression",
            display_name="Math Expression",
            category="utils",
            description=f"Computes with inputs a to z. Functions: {', '.join(FUNCTIONS)}.",
            inputs=[
                io.String.Input("expression", default="a + b", multiline=True),
                io.Autogrow.Input("values", template=values),
            ],
            outputs=[
                io.Float.Output(display_name="FLOAT"),
                io.Int.Output(display_name="INT"),
                io.Boolean.Output(display_name="BOOL"),
            ],
        )

    @classmethod
    def execute(cls, expression: str, values: dict[str, Any]):
        result = evaluate(expression, values)
        return io.NodeOutput(float(result), int(result), bool(result))


class ComfyNumberConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ComfyNumberConvert",
            display_name="Number Convert",
            category="utils",
            inputs=[io.MultiType.Input("value", [io.Int, io.Float, io.String, io.Boolean])],
            outputs=[io.Float.Output(display_name="FLOAT"), io.Int.Output(display_name="INT")],
        )

    @classmethod
    def execute(cls, value: Any):
        """Whole numbers stay exact; others are cut towards 0."""
        try:
            whole = value if isinstance(value, int) else None
            if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
                whole = int(value)
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{value!r} is no number; connect a number, a text such as 12.5, or a switch") from error
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not finite, so there is no INT for it")
        return io.NodeOutput(number, int(number if whole is None else whole))


class SeedNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SeedNode",
            display_name="Seed",
            category="utils",
            inputs=[io.Int.Input("seed", default=0, min=0, max=sys.maxsize, control_after_generate=True)],
            outputs=[io.Int.Output(display_name="seed")],
        )

    @classmethod
    def execute(cls, seed: int):
        return io.NodeOutput(seed)


class ResolutionSelector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ResolutionSelector",
            display_name="Resolution Selector",
            category="utils",
            description="Width and height of a shape and a number of pixels.",
            inputs=[
                io.Combo.Input("aspect_ratio", options=list(RATIOS), default="1:1 (Square)"),
                share("megapixels", 1.0, 16.0, 0.1, 0.1, tooltip="1 is 1024 x 1024."),
                io.Int.Input(
                    "multiple",
                    default=8,
                    min=1,
                    max=256,
                    step=1,
                    optional=True,
                    tooltip="Width and height are multiples of this.",
                ),
            ],
            outputs=[io.Int.Output("width"), io.Int.Output("height")],
        )

    @classmethod
    def execute(cls, aspect_ratio: str, megapixels: float, multiple: int = 8):
        across, down = RATIOS[aspect_ratio]
        unit = math.sqrt(megapixels * 1024 * 1024 / (across * down))
        return io.NodeOutput(*(max(1, round(side * unit / multiple)) * multiple for side in (across, down)))


comfy_entrypoint = extension(ComfyMathExpression, ComfyNumberConvert, SeedNode, ResolutionSelector)
