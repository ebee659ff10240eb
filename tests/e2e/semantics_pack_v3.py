"""V3 nodes for tests/e2e/test_semantics.py."""

import asyncio
import json
import os

from comfy.taco_dit import runtime
from comfy_api.latest import ComfyExtension, io, ui
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder


def note(label, text):
    name = f"{label}.{runtime.current().manager.rank}"
    with open(os.path.join(os.environ["TACO_TEST_RECORDS"], name), "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


class Twice(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Twice",
            inputs=[io.Int.Input("value", min=0, max=100), io.String.Input("label", default="")],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def validate_inputs(cls, value, label):
        return True if value != 13 else "13 brings bad luck"

    @classmethod
    async def execute(cls, value, label):
        await asyncio.sleep(0.02)
        note(label, value)
        return io.NodeOutput(value * 2)


class Changed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="S3Changed", inputs=[io.String.Input("label")], outputs=[io.Int.Output()])

    @classmethod
    def fingerprint_inputs(cls, label):
        with open(os.path.join(os.environ["TACO_TEST_RECORDS"], f"{label}.ask"), encoding="utf-8") as file:
            return file.read()

    @classmethod
    def execute(cls, label):
        note(label, "run")
        return io.NodeOutput(int(cls.fingerprint_inputs(label)))


class Switch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Switch",
            inputs=[
                io.Boolean.Input("first"),
                io.Int.Input("a", lazy=True, optional=True),
                io.Int.Input("b", lazy=True, optional=True),
            ],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def check_lazy_status(cls, first, a=None, b=None):
        name = "a" if first else "b"
        return [name] if (a if first else b) is None else []

    @classmethod
    def execute(cls, first, a=None, b=None):
        return io.NodeOutput(a if first else b)


class Range(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Range", inputs=[io.Int.Input("count")], outputs=[io.Int.Output(is_output_list=True)]
        )

    @classmethod
    def execute(cls, count):
        return io.NodeOutput(list(range(count)))


class Sum(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Sum", inputs=[io.Int.Input("values")], outputs=[io.Int.Output()], is_input_list=True
        )

    @classmethod
    def execute(cls, values):
        return io.NodeOutput(sum(values))


class Block(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Block",
            inputs=[io.Int.Input("value"), io.String.Input("message", default="")],
            outputs=[io.Int.Output()],
        )

    @classmethod
    def execute(cls, value, message):
        if value % 2:
            return io.NodeOutput(value)
        return io.NodeOutput(block_execution=message) if message else io.NodeOutput(ExecutionBlocker(None))


class Expand(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="S3Expand", inputs=[io.Int.Input("value")], outputs=[io.Int.Output()], enable_expand=True
        )

    @classmethod
    def execute(cls, value):
        graph = GraphBuilder()
        node = graph.node("S3Twice", value=value, label="")
        return io.NodeOutput(graph.node("S3Twice", value=node.out(0), label="").out(0), expand=graph.finalize())


class Hidden(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        hidden = [io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.api_key_comfy_org]
        return io.Schema(node_id="S3Hidden", inputs=[], outputs=[], hidden=hidden, is_output_node=True)

    @classmethod
    def execute(cls):
        told = {"me": cls.hidden.unique_id, "nodes": sorted(cls.hidden.prompt), "extra": cls.hidden.extra_pnginfo,
                "key": len(cls.hidden.api_key_comfy_org or "")}  # fmt: skip
        return io.NodeOutput(ui=ui.PreviewText(json.dumps(told)))


class Semantics(ComfyExtension):
    async def get_node_list(self):
        return [Twice, Changed, Switch, Range, Sum, Block, Expand, Hidden]


async def comfy_entrypoint():
    return Semantics()
