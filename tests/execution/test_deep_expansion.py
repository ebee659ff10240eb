"""Nodes that expand into nodes that expand: each expansion costs what it adds, however deep it is."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
from fakes import FakeServer, Runner, make, node

import nodes
from comfy_execution import progress
from comfy_execution.caching import CacheType
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.progress import WebUIProgressHandler


def _expand(self, left, value):
    """One more than the node it expands into, which does the same `left` times."""
    if left <= 0:
        return (value,)
    graph = GraphBuilder()
    deeper = graph.node("Deep", left=left - 1, value=value)
    return {"result": (graph.node("Add", a=deeper.out(0), b=1).out(0),), "expand": graph.finalize()}


@pytest.fixture(autouse=True)
def deep(monkeypatch):
    kind = make("Deep", {"left": ("INT", {"max": 10**6}), "value": ("INT", {})}, ("INT",), _expand)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Deep", kind)
    # how many messages are sent depends on the clock
    monkeypatch.setattr(WebUIProgressHandler, "INTERVAL", 1e9)


def chain(depth, value=0):
    return {
        "v": node("Value", value=value),
        "e": node("Deep", left=depth, value=["v", 0]),
        "out": node("Show", value=["e", 0]),
    }


def operations(work):
    """Lines of Python that `work()` executes in this thread."""
    count = [0]

    def note(frame, event, argument):
        count[0] += 1
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return count[0]


@pytest.mark.parametrize("kind", list(CacheType))
def test_the_cost_of_an_expansion_does_not_grow_with_depth(kind):
    costs = {}
    for depth in (50, 200):
        runner = Runner(FakeServer(), cache_type=kind, cache_args={"lru": 10000, "ram": 0.001})

        def first(depth=depth, runner=runner):
            assert runner(chain(depth)) == {"out": {"value": [depth]}}

        def again(depth=depth, runner=runner):
            assert runner(chain(depth)) == {"out": {"value": [depth]}}

        def changed(depth=depth, runner=runner):
            assert runner(chain(depth, 7)) == {"out": {"value": [depth + 7]}}

        costs[depth] = [operations(work) for work in (first, again, changed)]
    for shallow, deep in zip(costs[50], costs[200], strict=True):
        assert deep < 4 * shallow * 1.2, costs


def test_very_deep_expansion_works_and_its_ids_stay_short():
    server = FakeServer()
    runner = Runner(server)
    assert runner(chain(1500)) == {"out": {"value": [1500]}}
    begun = [message["node"] for message in server.of("executing")]
    assert len(begun) == len(set(begun)) == 2 * 1500 + 3
    assert max(map(len, begun)) < 120
    assert {message["display_node"] for message in server.of("executing")} == {"v", "e", "out"}
    assert all(
        entry["real_node_id"] in ("v", "e", "out") for entry in server.of("progress_state")[-1]["nodes"].values()
    )


def test_a_node_shown_on_itself():
    prompt = DynamicPrompt({"1": node("Value", value=1)})
    prompt.add_ephemeral_node("1.0.0.1", node("Value", value=1), "1", "1.0.0.1")
    prompt.add_ephemeral_node("1.0.0.2", node("Value", value=1), "1.0.0.1", "1.0.0.1")
    assert prompt.get_display_node_id("1.0.0.2") == "1.0.0.1" and prompt.get_real_node_id("1.0.0.2") == "1"
    assert prompt.get_display_node_id("1.0.0.1") == "1.0.0.1" and prompt.get_display_node_id("9") == "9"


def test_messages_of_a_large_prompt_are_sent_in_proportion_less_often(monkeypatch):
    monkeypatch.setattr(WebUIProgressHandler, "INTERVAL", 0.05)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 100.0))
    waits = []

    class Timer:
        def __init__(self, interval, function):
            waits.append(interval)

        def start(self):
            pass

    monkeypatch.setattr(threading, "Timer", Timer)
    for count in (100, 5000):
        handler = WebUIProgressHandler(FakeServer())
        handler.set_registry(SimpleNamespace(nodes=dict.fromkeys(range(count)), prompt_id="p"))
        handler._sent_at = 100.0
        handler._changed()
    assert waits == pytest.approx([0.05, 0.5])
