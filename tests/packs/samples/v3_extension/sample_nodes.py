"""Nodes of the V3 sample pack."""

from comfy_api.latest import io, ui


class SampleCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SampleCombine",
            display_name="Combine (sample)",
            category="samples",
            inputs=[
                io.String.Input("a"),
                io.Combo.Input("how", options=["join", "swap"]),
                io.String.Input("b", optional=True, default="?"),
                io.Float.Input("weight", default=1.0, min=0.0, max=2.0),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def validate_inputs(cls, a):
        return True if a != "forbidden" else "that word is forbidden"

    @classmethod
    async def execute(cls, a, how, weight, b="?"):
        return io.NodeOutput(f"{a}{b}" if how == "join" else f"{b}{a}")


class SampleReport(io.ComfyNode):
    loaded = False

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SampleReport",
            category="samples",
            inputs=[io.AnyType.Input("value")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, value):
        return io.NodeOutput(ui=ui.PreviewText(f"{value} {SampleReport.loaded}"))
