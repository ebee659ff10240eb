"""Nodes written against comfy_api run like the others."""

from __future__ import annotations

import asyncio

import pytest
from fakes import node

import nodes
from comfy_api.latest import ComfyExtension, io, ui


class Double(io.ComfyNode):
    seen: list = []

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Double",
            inputs=[io.Int.Input("value", min=0, max=9), io.Int.Input("more", optional=True)],
            outputs=[io.Int.Output(display_name="twice")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, value, more=0):
        cls.seen.append(cls.hidden.unique_id)
        return io.NodeOutput(value * 2 + more)


class Later(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Later", inputs=[io.Int.Input("value", lazy=True)], outputs=[io.Int.Output()])

    @classmethod
    def check_lazy_status(cls, value):
        return ["value"] if value is None else []

    @classmethod
    async def execute(cls, value):
        await asyncio.sleep(0)
        return io.NodeOutput(value + 1)


class Text(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Text", inputs=[io.Int.Input("value")], outputs=[], is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, value):
        return float("nan")

    @classmethod
    def validate_inputs(cls, value):
        return value != 3 or "not three"

    @classmethod
    def execute(cls, value):
        return io.NodeOutput(ui=ui.PreviewText(str(value)))


class Grow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Grow", inputs=[io.Int.Input("value")], outputs=[io.Int.Output()], enable_expand=True)

    @classmethod
    def execute(cls, value):
        if value == 0:
            return io.NodeOutput(block_execution="nothing to grow")
        return io.NodeOutput(["g.1", 0], expand={"g.1": node("Double", value=value)})


@pytest.fixture(autouse=True)
def register(monkeypatch):
    for cls in (Double, Later, Text, Grow):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)
    Double.seen.clear()


def test_values_and_hidden_inputs(run):
    prompt = {
        "d": node("Double", value=4, more=1),
        "l": node("Later", value=["d", 0]),
        "t": node("Text", value=["l", 0]),
    }
    assert run(prompt) == {"t": {"text": ("10",)}} or run.executor.history_result["outputs"] == {"t": {"text": ["10"]}}
    assert Double.seen == ["d"]
    run(prompt)
    assert Double.seen == ["d"]


def test_validation(run):
    with pytest.raises(AssertionError, match="bigger than max"):
        run({"d": node("Double", value=10), "t": node("Text", value=["d", 0])})
    with pytest.raises(AssertionError, match="not three"):
        run({"t": node("Text", value=3)})


def test_expansion_and_blocking(run, server):
    prompt = {"g": node("Grow", value=4), "t": node("Text", value=["g", 0])}
    assert run(prompt) == {"t": {"text": ["8"]}}
    prompt["g"]["inputs"]["value"] = 0
    assert run(prompt) == {}
    assert "nothing to grow" in server.of("execution_error")[0]["exception_message"]


def test_every_input_may_be_accepted(run):
    class Open(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Open", is_output_node=True, accept_all_inputs=True)

        @classmethod
        def execute(cls, **values):
            return io.NodeOutput(ui={"names": sorted(values)})

    nodes.NODE_CLASS_MAPPINGS["Open"] = Open
    try:
        assert run({"d": node("Double", value=1), "o": node("Open", x=["d", 0], y=2)}) == {"o": {"names": ["x", "y"]}}
    finally:
        del nodes.NODE_CLASS_MAPPINGS["Open"]


def test_an_input_id_is_used_once():
    class Twice(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Twice", inputs=[io.Int.Input("a"), io.Float.Input("a")])

        @classmethod
        def execute(cls):
            return io.NodeOutput()

    with pytest.raises(ValueError, match="'a' is used twice"):
        Twice.GET_SCHEMA()


def test_a_pack_is_loaded_by_its_entry_point(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text(
        "from comfy_api.latest import ComfyExtension, io\n"
        "class One(io.ComfyNode):\n"
        "    @classmethod\n"
        "    def define_schema(cls):\n"
        "        return io.Schema(node_id='PackOne', display_name='One')\n"
        "    @classmethod\n"
        "    def execute(cls):\n"
        "        return io.NodeOutput()\n"
        "class Pack(ComfyExtension):\n"
        "    async def get_node_list(self):\n"
        "        return [One]\n"
        "async def comfy_entrypoint():\n"
        "    return Pack()\n"
    )
    try:
        assert asyncio.run(nodes.load_custom_node(str(tmp_path / "pack")))
        info = nodes.NODE_CLASS_MAPPINGS["PackOne"].GET_NODE_INFO_V1()
        assert info["python_module"] == "custom_nodes.pack"
        assert nodes.NODE_DISPLAY_NAME_MAPPINGS["PackOne"] == "One"
    finally:
        for mapping in (nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS):
            mapping.pop("PackOne", None)
        nodes.LOADED_MODULE_DIRS.pop("pack", None)


def test_kinds_of_inputs():
    assert io.Combo.Input("c", options=["a"], default="a").as_dict() == {
        "multiselect": False,
        "options": ["a"],
        "default": "a",
    }
    assert io.MultiType.Input(io.Float.Input("m", default=1.0), [io.Int]).get_io_type() == "FLOAT,INT"
    assert io.Custom("MINE").Output().get_io_type() == "MINE"
    assert io.File3DGLB.Output().get_io_type() == "FILE_3D_GLB"
    assert io.Int.Input("i", display_mode=io.NumberDisplay.slider).as_dict() == {"display": "slider"}
    assert issubclass(ComfyExtension, object)
