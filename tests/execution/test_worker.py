"""The worker goes on whatever happens to a prompt, and a cancel is that of the prompt it was meant for."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fakes import FakeServer, node
from test_lockstep import Group

import comfy.model_management
import nodes
from app.routes_queue import _cancel
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.prompt_queue import PromptQueue
from comfy_execution.worker import PromptWorker

GOOD = {"v": node("Value", value=1), "out": node("Show", value=["v", 0])}


class Work:
    """A worker in a thread; `run(prompts)` puts them into the queue as p1, p2, ... and waits for all."""

    def __init__(self, **arguments):
        self.server = FakeServer()
        self.queue = PromptQueue(self.server)
        self.over = threading.Semaphore(0)
        arguments = {"on_done": lambda executor: self.over.release(), **arguments}
        self.worker = PromptWorker(self.queue, self.server, **arguments)
        self.thread = threading.Thread(target=self.worker.run, daemon=True)

    def run(self, *prompts):
        for i, prompt in enumerate(prompts, 1):
            self.queue.put((i, f"p{i}", prompt, {"client_id": f"page{i}"}, ["out"]))
        self.thread.start()
        for _ in prompts:
            assert self.over.acquire(timeout=10), "a prompt never ended"
        self.worker.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def ending(self, prompt_id):
        return self.queue.history[prompt_id]["status"]["messages"][-1]


@pytest.fixture
def leaving(monkeypatch):
    """`leaving(error)`: a prompt whose node raises it."""

    def make(error):
        def run(self, a, b):
            raise error

        monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Add"], "run", run)
        return {"a": node("Add", a=1, b=2), "out": node("Show", value=["a", 0])}

    return make


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()])
def test_what_a_node_raises_is_its_prompts_error(leaving, error):
    work = Work()
    work.run(leaving(error), GOOD)
    kind, data = work.ending("p1")
    assert kind == "execution_error"
    assert data["node_id"] == "a" and data["exception_type"].endswith(type(error).__name__)
    assert work.ending("p2")[0] == "execution_success"


def test_an_asynchronous_node_that_exits(monkeypatch):
    async def leaves(self, value):
        await asyncio.sleep(0.01)
        raise SystemExit(3)

    async def cancelled(self, value):
        task = asyncio.ensure_future(asyncio.sleep(10))
        task.cancel()
        await task

    for run in (leaves, cancelled):
        monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Slow"], "run", run)
        work = Work()
        work.run({"a": node("Slow", value=1), "out": node("Show", value=["a", 0])}, GOOD)
        assert work.ending("p1")[0] == "execution_error"
        assert work.ending("p1")[1]["node_id"] == "a"
        assert work.ending("p2")[0] == "execution_success"


def test_a_prompt_that_cannot_be_announced():
    def announce(command):
        if command["kind"] == "prompt" and command["item"][1] == "p1":
            raise TypeError("cannot pickle a lock")

    work = Work(announce=announce)
    work.run(GOOD, GOOD)
    kind, data = work.ending("p1")
    assert kind == "execution_error" and data["exception_message"].startswith("cannot pickle a lock")
    assert data["prompt_id"] == "p1" and len(work.queue.history["p1"]["status"]["messages"]) == 1
    assert work.ending("p2")[0] == "execution_success"
    assert [sid for event, _, sid in work.server.sent if event == "execution_error"] == ["page1"]


def test_a_cancel_before_the_execution_begins():
    answers = []

    def announce(command):
        if command["kind"] == "prompt" and command["item"][1] == "p1":
            answers.append(_cancel(work.server, "p1"))

    work = Work(announce=announce)
    work.run(GOOD, GOOD)
    assert answers == [True]
    assert work.ending("p1")[0] == "execution_interrupted"
    assert work.ending("p2")[0] == "execution_success"


def test_a_cancel_after_the_last_node_does_not_hit_the_next_prompt():
    answers = []

    def done(executor):
        if not answers:
            answers.append(_cancel(work.server, "p1"))
        work.over.release()

    work = Work(on_done=done)
    work.run(GOOD, GOOD)
    assert answers == [True] and comfy.model_management.processing_interrupted() is False
    assert [work.ending(prompt_id)[0] for prompt_id in ("p1", "p2")] == ["execution_success"] * 2
    assert not _cancel(work.server, "p1")


def test_a_sub_graph_whose_result_only_rank_0_has(monkeypatch):
    def expand(self, value):
        graph = GraphBuilder()
        one = graph.node("Unique", value=value)  # not idempotent: it runs on rank 0 only
        return {"result": (one.out(0),), "expand": graph.finalize()}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "run", expand)
    group = Group()
    prompt = {"e": node("Expand", value=1), "a": node("Add", a=["e", 0], b=1), "out": node("Show", value=["a", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [2]}}
    assert all(executor.success for executor in group.executors)
    assert group.calls(1) == ["add"]
