"""V1 nodes for tests/e2e/test_semantics.py: one for each thing a node may do, written down on every rank."""

import asyncio
import json
import os
import time

import comfy.utils
from comfy.taco_dit import runtime
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder


class AnyType(str):
    def __ne__(self, other):
        return False


ANY = AnyType("*")
INT = ("INT", {"default": 0, "min": -1000, "max": 100000})
TEXT = ("STRING", {"default": ""})


def note(label, text):
    """One line in a file of this rank's."""
    if label:
        name = f"{label}.{runtime.current().manager.rank}"
        with open(os.path.join(os.environ["TACO_TEST_RECORDS"], name), "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def asked(label):
    """What a test has written into a file for the nodes to read."""
    with open(os.path.join(os.environ["TACO_TEST_RECORDS"], f"{label}.ask"), encoding="utf-8") as file:
        return file.read()


class Base:
    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("INT",)


class SValue(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "label": TEXT}}

    def run(self, value, label):
        note(label, value)
        return (value,)


class SAdd(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": INT, "b": INT}, "optional": {"label": TEXT}}

    def run(self, a, b, label=""):
        note(label, f"{a}+{b}")
        return (a + b,)


class SShow(Base):
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,)}}

    def run(self, value):
        return {"ui": {"text": [str(value)]}}


class SSwitch(Base):
    RETURN_TYPES = (ANY,)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"first": ("BOOLEAN",)},
            "optional": {"a": (ANY, {"lazy": True}), "b": (ANY, {"lazy": True})},
        }

    def check_lazy_status(self, first, a=None, b=None):
        if first and a is None:
            return ["a"]
        return ["b"] if not first and b is None else []

    def run(self, first, a=None, b=None):
        return (a if first else b,)


class SList(Base):
    """Numbers 0..count-1 as a list, and their count as one value."""

    RETURN_TYPES = ("INT", "INT")
    OUTPUT_IS_LIST = (True, False)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": INT}}

    def run(self, count):
        return (list(range(count)), count)


class SSum(Base):
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"values": INT, "factor": INT}}

    def run(self, values, factor):
        assert isinstance(values, list) and isinstance(factor, list)
        return (sum(values) * factor[0],)


class SBlock(Base):
    """Odd values pass, even ones are blocked."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "message": TEXT}}

    def run(self, value, message):
        return (value if value % 2 else ExecutionBlocker(message or None),)


class SExpand(Base):
    """value + depth, by sub-graphs that expand again."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "depth": INT, "label": TEXT}}

    def run(self, value, depth, label):
        note(label, f"expand {depth}")
        if depth == 0:
            return (value,)
        graph = GraphBuilder()
        one = graph.node("SAdd", a=value, b=1, label=label)
        rest = graph.node("SExpand", value=one.out(0), depth=depth - 1, label=label)
        return {"result": (rest.out(0),), "expand": graph.finalize()}


class SLoop(Base):
    """A sub-graph with an output node of its own and a node that fails on demand."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "fail": ("BOOLEAN",)}}

    def run(self, value, fail):
        graph = GraphBuilder()
        inner = graph.node("SFail" if fail else "SValue", value=value, label="")
        graph.node("SShow", value=inner.out(0))
        return {"ui": {"text": ["outer"]}, "result": (inner.out(0),), "expand": graph.finalize()}


class SAsync(Base):
    """Begins, waits until the others in its group have begun too, and ends."""

    begun = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "group": TEXT, "size": INT}}

    async def run(self, value, group, size):
        self.begun[group] = self.begun.get(group, 0) + 1
        end = time.monotonic() + 10
        while self.begun[group] < size:
            assert time.monotonic() < end, "asynchronous nodes do not overlap"
            await asyncio.sleep(0.01)
        note(group, value)
        return (value,)


class SChanged(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": TEXT}}

    def run(self, label):
        note(label, "run")
        return (int(asked(label)),)

    @classmethod
    def IS_CHANGED(cls, label):
        return asked(label)


class SNeverSame(SValue):
    @classmethod
    def IS_CHANGED(cls, value, label):
        return float("nan")


class SValidate(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"min": 0, "max": 10}), "link": (ANY,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, value, input_types):
        if input_types["link"] == "STRING":
            return "no texts, please"
        return True if value != 13 else "13 brings bad luck"

    def run(self, value, link):
        return (value,)


class SHidden(Base):
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "hidden": {
            "prompt": "PROMPT", "dynamic": "DYNPROMPT", "extra": "EXTRA_PNGINFO", "me": "UNIQUE_ID",
            "token": "AUTH_TOKEN_COMFY_ORG", "key": "API_KEY_COMFY_ORG",
        }}  # fmt: skip

    def run(self, prompt, dynamic, extra, me, token, key):
        assert dynamic.get_node(me)["class_type"] == "SHidden"
        told = {"nodes": sorted(prompt), "extra": extra, "me": me, "token": len(token or ""), "key": len(key or "")}
        return {"ui": {"text": [json.dumps(told)]}}


class SFail(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT, "label": TEXT}}

    def run(self, value, label):
        raise LookupError(f"cannot find {value}")


class SProgress(Base):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": INT, "seconds": ("FLOAT", {"default": 0.0})}}

    def run(self, steps, seconds):
        bar = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            time.sleep(seconds)
            bar.update(1)
        return (steps,)


class SCount(Base):
    """Counts its own calls in its instance."""

    def __init__(self):
        self.calls = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": INT}}

    def run(self, value):
        self.calls += 1
        return (self.calls,)


NODE_CLASS_MAPPINGS = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, Base) and value is not Base
}
