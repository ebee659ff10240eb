"""A server that only listens, and a few nodes that count their calls."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter
from typing import Any

import execution
from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder


class FakeServer:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any, Any]] = []
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        self.sent.append((event, data, sid))

    def queue_updated(self) -> None:
        self.sent.append(("status", None, None))

    def of(self, event: str) -> list[Any]:
        return [data for kind, data, _ in self.sent if kind == event]


class Calls:
    """Calls of nodes, per rank (a thread stands for a rank in the tests with several)."""

    def __init__(self) -> None:
        self.by_thread: dict[str, list[str]] = {}

    def note(self, what: str) -> None:
        self.by_thread.setdefault(threading.current_thread().name.partition(":")[0], []).append(what)

    @property
    def all(self) -> list[str]:
        return [what for calls in self.by_thread.values() for what in calls]

    def count(self, what: str) -> int:
        return Counter(self.all)[what]


CALLS = Calls()


def make(name: str, inputs: dict[str, Any], returns: tuple[Any, ...], function: Any, **attributes: Any) -> type:
    """A V1 node class."""
    declared = inputs if "required" in inputs else {"required": inputs}
    return type(
        name,
        (),
        {
            "INPUT_TYPES": classmethod(lambda cls: declared),
            "RETURN_TYPES": returns,
            "FUNCTION": "run",
            "CATEGORY": "test",
            "run": function,
            **attributes,
        },
    )


def _value(self, value):
    CALLS.note(f"value {value}")
    return (value,)


def _add(self, a, b):
    CALLS.note("add")
    return (a + b,)


def _show(self, value, **hidden):
    CALLS.note("show")
    return {"ui": {"value": [value]}}


def _switch(self, pick, first=None, second=None):
    CALLS.note("switch")
    return (first if pick else second,)


def _fail(self, value):
    CALLS.note("fail")
    raise ValueError(f"cannot work on {value}")


def _make_list(self, count):
    return (list(range(count)),)


def _sum_list(self, values):
    CALLS.note("sum")
    return (sum(values),)


def _block(self, value, message):
    return (ExecutionBlocker(message or None),)


def _expand_twice(self, value):
    CALLS.note("expand")
    graph = GraphBuilder()
    one = graph.node("Add", a=value, b=1)
    two = graph.node("Add", a=one.out(0), b=1)
    return {"result": (two.out(0),), "expand": graph.finalize()}


async def _slow(self, value):
    CALLS.note(f"slow {value} begins")
    await asyncio.sleep(0.01)
    CALLS.note(f"slow {value} ends")
    return (value,)


def _changing(cls, value):
    CALLS.note("is_changed")
    return CHANGED.pop(0)


CHANGED: list[Any] = []
ANY_INT = ("INT", {"default": 0})
CLASSES = {
    "Value": make("Value", {"value": ANY_INT}, ("INT",), _value),
    "Add": make("Add", {"a": ANY_INT, "b": ANY_INT}, ("INT",), _add),
    "Show": make("Show", {"value": ANY_INT}, (), _show, OUTPUT_NODE=True),
    "ShowMine": make(
        "ShowMine", {"required": {"value": ANY_INT}, "hidden": {"node": "UNIQUE_ID"}}, (), _show, OUTPUT_NODE=True
    ),
    "Switch": make(
        "Switch",
        {"pick": ("BOOLEAN", {}), "first": ("INT", {"lazy": True}), "second": ("INT", {"lazy": True})},
        ("INT",),
        _switch,
        check_lazy_status=lambda self, pick, first=None, second=None: (
            ["first"] if pick and first is None else ["second"] if not pick and second is None else []
        ),
    ),
    "Fail": make("Fail", {"value": ANY_INT}, ("INT",), _fail),
    "MakeList": make("MakeList", {"count": ANY_INT}, ("INT",), _make_list, OUTPUT_IS_LIST=(True,)),
    "SumList": make("SumList", {"values": ANY_INT}, ("INT",), _sum_list, INPUT_IS_LIST=True),
    "Block": make("Block", {"value": ANY_INT, "message": ("STRING", {})}, ("INT",), _block),
    "Expand": make("Expand", {"value": ANY_INT}, ("INT",), _expand_twice),
    "Slow": make("Slow", {"value": ANY_INT}, ("INT",), _slow),
    "Changing": make("Changing", {"value": ANY_INT}, ("INT",), _value, IS_CHANGED=classmethod(_changing)),
    "Unique": make("Unique", {"value": ANY_INT}, ("INT",), _value, NOT_IDEMPOTENT=True),
}


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


class Runner:
    """Validates and runs prompts on one executor."""

    def __init__(self, server: FakeServer, **arguments: Any) -> None:
        self.server = server
        self.executor = execution.PromptExecutor(server, **arguments)

    def __call__(self, prompt: dict[str, Any], client_id: str | None = "page", targets: Any = None) -> dict[str, Any]:
        """Outputs shown by node id; AssertionError when the prompt is not valid."""
        prompt_id = uuid.uuid4().hex
        valid, error, outputs, _ = asyncio.run(execution.validate_prompt(prompt_id, prompt, targets))
        assert valid, error
        extra = {} if client_id is None else {"client_id": client_id}
        self.executor.execute(prompt, prompt_id, extra, outputs)
        return self.executor.history_result["outputs"]
