"""The worker goes on whatever happens to a prompt, and a cancel is that of the prompt it was meant for."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fakes import CALLS, FakeServer, make, node
from test_lockstep import Group

import comfy.model_management
import nodes
from app.routes_queue import _cancel
from comfy_execution.executor import PromptExecutor
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.lockstep import Lockstep
from comfy_execution.progress import ProgressHandler, add_progress_handler
from comfy_execution.prompt_queue import PromptQueue
from comfy_execution.prompt_store import open_store
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


# ---- whatever fails, the next prompt ends in its own name --------------------------------------------------------------


def picture(value):
    return {"v": node("Value", value=value), "out": node("Show", value=["v", 0])}


def check_own_results(work, count):
    """Each prompt ended once, is told to its page only, and its entry holds its own result and error."""
    assert list(work.queue.history) == [f"p{i}" for i in range(1, count + 1)]
    assert not work.queue.currently_running
    for event, data, sid in work.server.sent:
        if event.startswith("execution") if isinstance(event, str) else False:
            assert sid == f"page{data['prompt_id'][1:]}", (event, data["prompt_id"], sid)
    for i in range(1, count + 1):
        entry = work.queue.history[f"p{i}"]
        assert {data["prompt_id"] for _, data in entry["status"]["messages"]} == {f"p{i}"}
        endings = [
            event for event, _ in entry["status"]["messages"] if event in ("execution_success", "execution_error")
        ]
        assert len(endings) == 1 and (endings == ["execution_success"]) == (entry["status"]["status_str"] == "success")
        assert entry["outputs"] in ({}, {"out": {"value": [i]}})


def fails_for(prompt_id, error):
    def announce(command):
        if command["kind"] == "prompt" and command["item"][1] == prompt_id:
            raise error

    return announce


@pytest.mark.parametrize("error", [TypeError("no"), SystemExit(1), GeneratorExit(), asyncio.CancelledError()])
def test_an_error_before_the_execution_is_the_posters(error):
    work = Work(announce=fails_for("p2", error))
    work.run(picture(1), picture(2), picture(3))
    check_own_results(work, 3)
    assert [work.ending(f"p{i}")[0] for i in (1, 2, 3)] == ["execution_success", "execution_error", "execution_success"]
    assert work.ending("p2")[1]["exception_type"].endswith(type(error).__name__)
    assert work.queue.history["p2"]["outputs"] == {}


def test_ranks_that_cannot_be_prepared_or_told():
    class Broken(Lockstep):
        def prepare(self):
            raise RuntimeError("no rank came back")

        def refuse(self, prompt_id, error):
            raise OSError("the store is gone")

    work = Work(lockstep=Broken())
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert "no rank came back" in work.ending("p1")[1]["exception_message"]


def test_the_error_of_a_prompt_that_cannot_even_be_reported(monkeypatch):
    def broken(*args):
        raise MemoryError("no memory for a report")

    monkeypatch.setattr(PromptExecutor, "handle_execution_error", broken)
    work = Work(announce=fails_for("p1", TypeError("the cause")))
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert "the cause" in work.ending("p1")[1]["exception_message"]


def test_a_prompt_that_ended_stays_as_it_is_when_something_fails_after_it(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "DISABLE_SMART_MEMORY", True)

    def fails():
        raise RuntimeError("cannot unload")

    monkeypatch.setattr(comfy.model_management, "unload_all_models", fails)
    work = Work()
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert [work.ending(f"p{i}")[0] for i in (1, 2)] == ["execution_success"] * 2


def test_callbacks_that_raise():
    work = Work(on_done=None, summary=None)

    def done(executor):
        work.over.release()
        raise SystemExit("on purpose")

    def summary():
        raise ValueError("on purpose")

    work.worker.on_done, work.worker.summary = done, summary
    work.run(picture(1), picture(2))
    check_own_results(work, 2)


def test_a_page_that_cannot_be_told(monkeypatch):
    work = Work()
    send = work.server.send_sync

    def replaced(event, data, sid=None):
        if event in ("execution_start", "execution_success", "executing") and sid == "page1":
            raise RuntimeError("a pack's send_sync")
        send(event, data, sid)

    work.server.send_sync = replaced
    work.run({"out": node("Show", value=1)}, picture(2))
    assert list(work.queue.history) == ["p1", "p2"]
    assert work.ending("p2")[0] == "execution_success"


@pytest.mark.parametrize("error", [RuntimeError("driver"), SystemExit(1)])
def test_freeing_memory_that_raises(monkeypatch, error):
    def fails(*args):
        raise error

    work = Work()
    monkeypatch.setattr(comfy.model_management, "unload_all_models", fails)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", fails)
    monkeypatch.setattr(work.worker.executor, "reset", fails)
    monkeypatch.setattr("comfy_execution.worker.GC_INTERVAL_S", 0)
    work.queue.set_flag("free_memory", True)
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert [work.ending(f"p{i}")[0] for i in (1, 2)] == ["execution_success"] * 2


def test_a_follower_that_cannot_free_memory_follows_on(monkeypatch):
    def fails():
        raise RuntimeError("driver")

    monkeypatch.setattr(comfy.model_management, "unload_all_models", fails)
    worker = PromptWorker(None, FakeServer())
    item = (0, "p1", picture(1), {}, ["out"])
    worker.follow([{"kind": "free", "unload_models": True, "free_memory": True}, {"kind": "prompt", "item": item}])
    assert worker.executor.history_result["outputs"] == {"out": {"value": [1]}}


def test_an_error_between_prompts(monkeypatch):
    monkeypatch.setattr("comfy_execution.worker.PAUSE_S", 0)
    work = Work()
    get_flags = work.queue.get_flags
    errors = [RuntimeError("no"), SystemExit(1)]

    def fails(reset=True):
        if errors:
            raise errors.pop()
        return get_flags(reset)

    work.queue.get_flags = fails
    work.run(picture(1), picture(2), picture(3))
    check_own_results(work, 3)


def test_results_that_cannot_be_kept(monkeypatch):
    class Stubborn(dict):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    work = Work()
    add = PromptExecutor.add_message

    def odd(self, event, data, broadcast):
        add(self, event, Stubborn(data) if data["prompt_id"] == "p1" else data, broadcast)
        if data["prompt_id"] == "p1":
            self.status_messages[-1] = (event, Stubborn(data))

    monkeypatch.setattr(PromptExecutor, "add_message", odd)
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert "cannot be kept in the history" in work.ending("p1")[1]["exception_message"]


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), asyncio.CancelledError(), KeyboardInterrupt()])
def test_is_changed_that_raises_anything_counts_as_changed(monkeypatch, error):
    def raises(cls, value):
        raise error

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Changing"], "IS_CHANGED", classmethod(raises))
    work = Work()
    prompt = {"v": node("Changing", value=1), "out": node("Show", value=["v", 0])}
    work.run(prompt, prompt | {"out": node("Show", value=2)})
    assert [work.ending(f"p{i}")[0] for i in (1, 2)] == ["execution_success"] * 2


def test_a_progress_handler_that_fails_does_not_fail_the_next_prompt(monkeypatch):
    class Handler(ProgressHandler):
        def reset(self):
            raise RuntimeError("a pack's handler")

    def value(self, value):
        add_progress_handler(Handler("odd"))
        return (value,)

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "run", value)
    work = Work()
    work.run(picture(1), picture(2))
    check_own_results(work, 2)
    assert [work.ending(f"p{i}")[0] for i in (1, 2)] == ["execution_success"] * 2


# ---- after a restart --------------------------------------------------------------------------------------------------


class Restarted(Work):
    """A worker whose queue comes from the file of a process that ended."""

    def __init__(self, path):
        super().__init__()
        self.queue = self.worker.queue = PromptQueue(self.server, open_store(path))

    def go(self, count):
        self.thread.start()
        for _ in range(count):
            assert self.over.acquire(timeout=10), "a prompt never ended"
        self.worker.stop()
        self.thread.join(10)
        self.queue.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "prompts.sqlite3")


def queued(path, *prompts, begun=0, **extra):
    """Prompts p1, p2, ... of a process that ended; the first ran when it and `begun - 1` before it did."""
    queue = PromptQueue(FakeServer(), open_store(path))
    for i, prompt in enumerate(prompts, 1):
        queue.put((i, f"p{i}", prompt, {"client_id": f"page{i}", **extra}, ["out"]))
    for _ in range(begun):
        assert queue.get(0)[0][1] == "p1"
        queue.close()
        queue = PromptQueue(FakeServer(), open_store(path))
    queue.close()


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_the_running_prompt_runs_once_more_and_then_ends_in_an_error(path, begun):
    queued(path, picture(1), picture(2), begun=begun)
    work = Restarted(path)
    work.go(2)
    check_own_results(work, 2)
    kind, data = work.ending("p1")
    assert kind == ("execution_error" if begun == 2 else "execution_success")
    if begun == 2:
        assert "the server ended twice while this prompt ran" in data["exception_message"]
        assert CALLS.count("value 1") == 0
    assert work.ending("p2")[0] == "execution_success"
    assert PromptQueue(FakeServer(), open_store(path)).queue == []


def test_a_prompt_whose_nodes_are_gone(path):
    queued(path, {"v": node("Gone"), "out": node("Show", value=["v", 0])}, picture(2))
    work = Restarted(path)
    work.go(2)
    check_own_results(work, 2)
    kind, data = work.ending("p1")
    assert (
        kind == "execution_error"
        and "Gone" in data["exception_message"]
        and "started again" in data["exception_message"]
    )
    assert work.ending("p2")[0] == "execution_success"


@pytest.mark.parametrize("asked", [False, True])
def test_a_prompt_that_needs_a_key_says_so(path, monkeypatch, asked):
    hidden = {"key": "API_KEY_COMFY_ORG"} if asked else {}
    kind = make("Paid", {"required": {"value": ("INT", {})}, "hidden": hidden}, (), lambda self, value, key=None: {},
                OUTPUT_NODE=True)  # fmt: skip
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Paid", kind)
    queued(path, {"out": node("Paid", value=1)}, api_key_comfy_org="secret")
    work = Restarted(path)
    work.go(1)
    ending, data = work.ending("p1")
    assert ending == ("execution_error" if asked else "execution_success")
    if asked:
        assert "node out needs api_key_comfy_org, which is never written to disk" in data["exception_message"]
