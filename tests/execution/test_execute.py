"""What running a prompt means: order, caching, laziness, lists, blockers, sub-graphs, asynchronous nodes, errors."""

from __future__ import annotations

import math
import time

import pytest
from fakes import CALLS, CHANGED, Runner, make, node

import comfy.model_management
import nodes
from comfy_execution.caching import CacheType


def chain(length: int) -> dict:
    prompt = {"0": node("Value", value=1)}
    for i in range(1, length):
        prompt[str(i)] = node("Add", a=[str(i - 1), 0], b=i)
    prompt["out"] = node("Show", value=[str(length - 1), 0])
    return prompt


def test_a_chain_runs_and_shows_its_result(run, server):
    assert run(chain(4)) == {"out": {"value": [7]}}
    assert run.executor.success
    kinds = [kind for kind, _, _ in server.sent]
    assert kinds[:2] == ["execution_start", "execution_cached"]
    assert kinds[-1] == "execution_success"
    assert server.of("executing")[-1] == {
        "node": "out",
        "display_node": "out",
        "prompt_id": server.of("executing")[0]["prompt_id"],
    }
    assert server.of("executed")[0]["output"] == {"value": [7]}
    assert all(state["state"] == "finished" for state in server.of("progress_state")[-1]["nodes"].values())


def test_unchanged_nodes_are_not_run_again(run, server):
    prompt = chain(4)
    run(prompt)
    CALLS.by_thread.clear()
    assert run(chain(4)) == {"out": {"value": [7]}}
    assert CALLS.all == []
    assert server.of("execution_cached")[-1]["nodes"] == ["0", "1", "2", "3", "out"]
    assert server.of("executed")[-1]["output"] == {"value": [7]}
    changed = chain(4)
    changed["3"]["inputs"]["b"] = 10
    assert run(changed) == {"out": {"value": [14]}}
    assert CALLS.all == ["add", "show"]


def test_ids_do_not_matter_unless_a_node_asks_for_its_own(run):
    run(chain(2))
    CALLS.by_thread.clear()
    run({"a": node("Value", value=1), "b": node("Add", a=["a", 0], b=1), "c": node("Show", value=["b", 0])})
    assert CALLS.all == []
    run({"a": node("Value", value=1), "b": node("ShowMine", value=["a", 0])})
    run({"a": node("Value", value=1), "c": node("ShowMine", value=["a", 0])})
    assert CALLS.count("show") == 2


@pytest.mark.parametrize("value", [(1, 1.5), (True, 1), ("1", 1)])
def test_values_of_different_type_are_different(value):
    from comfy_execution.caching import fingerprint

    assert fingerprint(value[0]) != fingerprint(value[1])
    assert fingerprint(float("nan")) != fingerprint(float("nan"))
    assert fingerprint(object()) != fingerprint(object())
    assert fingerprint({"a": [1, {"b": None}]}) == fingerprint({"a": [1, {"b": None}]})


def test_is_changed_decides_and_nan_always_runs(run):
    prompt = {"a": node("Changing", value=3), "b": node("Show", value=["a", 0])}
    for answer, calls in ((1, 1), (1, 1), (2, 2), (math.nan, 3), (math.nan, 4)):
        CHANGED.append(answer)
        run(prompt)
        assert CALLS.count("value 3") == calls


def test_a_failing_is_changed_counts_as_changed(run):
    prompt = {"a": node("Changing", value=3), "b": node("Show", value=["a", 0])}
    run(prompt)
    run(prompt)
    assert CALLS.count("value 3") == 2


def test_lru_keeps_results_across_prompts_and_none_keeps_nothing(server):
    lru = Runner(server, cache_type=CacheType.LRU, cache_args={"lru": 20})
    lru(chain(3))
    lru({"x": node("Value", value=9), "y": node("Show", value=["x", 0])})
    CALLS.by_thread.clear()
    lru(chain(3))
    assert CALLS.all == []
    classic = Runner(server)
    classic(chain(3))
    classic({"x": node("Value", value=9), "y": node("Show", value=["x", 0])})
    CALLS.by_thread.clear()
    classic(chain(3))
    assert CALLS.count("add") == 2
    none = Runner(server, cache_type=CacheType.NONE)
    CALLS.by_thread.clear()
    assert none(chain(3)) == none(chain(3)) == {"out": {"value": [4]}}
    assert CALLS.count("add") == 4
    assert len(none.executor.caches.outputs) == 0


def test_lru_forgets_the_oldest(server):
    lru = Runner(server, cache_type=CacheType.LRU, cache_args={"lru": 1})
    lru(chain(3))
    lru({"x": node("Value", value=9), "y": node("Show", value=["x", 0])})
    lru({"x": node("Value", value=8), "y": node("Show", value=["x", 0])})
    assert len(lru.executor.caches.outputs) <= 4


@pytest.mark.parametrize("cache", [CacheType.CLASSIC, CacheType.NONE, CacheType.LRU])
@pytest.mark.parametrize(("pick", "ran"), [(True, "value 1"), (False, "value 2")])
def test_lazy_inputs_are_run_only_when_asked_for(server, pick, ran, cache):
    prompt = {
        "a": node("Value", value=1),
        "b": node("Value", value=2),
        "s": node("Switch", pick=pick, first=["a", 0], second=["b", 0]),
        "out": node("Show", value=["s", 0]),
    }
    assert Runner(server, cache_type=cache)(prompt) == {"out": {"value": [1 if pick else 2]}}
    assert CALLS.all == [ran, "switch", "show"]


def test_lists_are_broadcast_and_joined(run):
    prompt = {
        "l": node("MakeList", count=3),
        "a": node("Add", a=["l", 0], b=10),
        "s": node("SumList", values=["a", 0]),
        "each": node("Show", value=["a", 0]),
        "sum": node("Show", value=["s", 0]),
    }
    assert run(prompt) == {"each": {"value": [10, 11, 12]}, "sum": {"value": [33]}}
    assert CALLS.count("add") == 3
    assert CALLS.count("sum") == 1


def test_an_empty_list_is_a_clear_error(run, server):
    run({"l": node("MakeList", count=0), "out": node("Show", value=["l", 0])})
    assert "input 'value' received an empty list" in server.of("execution_error")[0]["exception_message"]


def test_blockers_stop_what_follows(run, server):
    prompt = {
        "b": node("Block", value=1, message=""),
        "a": node("Add", a=["b", 0], b=1),
        "out": node("Show", value=["a", 0]),
        "v": node("Value", value=5),
        "other": node("Show", value=["v", 0]),
    }
    assert run(prompt) == {"other": {"value": [5]}}
    assert CALLS.count("add") == 0
    assert server.of("execution_error") == []
    prompt["b"]["inputs"]["message"] = "not today"
    run(prompt)
    report = server.of("execution_error")[0]
    assert report["exception_type"] == "ExecutionBlocked"
    assert report["exception_message"] == "Execution Blocked: not today"
    assert report["node_id"] == "a"
    assert run.executor.success


@pytest.mark.parametrize("cache", [CacheType.CLASSIC, CacheType.NONE, CacheType.LRU])
def test_a_node_may_expand_into_others(server, cache):
    run = Runner(server, cache_type=cache)
    prompt = {
        "v": node("Value", value=1),
        "e": node("Expand", value=["v", 0]),
        "e2": node("Expand", value=["e", 0]),
        "out": node("Show", value=["e2", 0]),
    }
    assert run(prompt) == {"out": {"value": [5]}}
    assert CALLS.count("add") == 4
    grown = [data for data in server.of("executing") if data["node"] == "e.0.0.1"]
    assert grown[0]["display_node"] == "e"


def test_parts_of_a_sub_graph_are_cached(run):
    prompt = {"v": node("Value", value=1), "e": node("Expand", value=["v", 0]), "out": node("Show", value=["e", 0])}
    run(prompt)
    run(prompt)
    assert (CALLS.count("expand"), CALLS.count("add")) == (1, 2)
    prompt["e"]["inputs"]["value"] = 7
    run(prompt)
    assert (CALLS.count("expand"), CALLS.count("add")) == (2, 4)
    assert len(run.executor.caches.outputs) <= 8


def test_an_error_inside_a_sub_graph_is_reported_on_the_node(run, server, monkeypatch):
    def expand(self, value):
        return {"result": (["x.1", 0],), "expand": {"x.1": node("Fail", value=value)}}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "run", expand)
    run({"e": node("Expand", value=1), "out": node("Show", value=["e", 0])})
    report = server.of("execution_error")[0]
    assert report["node_id"] == "e"
    assert report["node_type"] == "Expand"


def test_duplicate_ids_in_a_sub_graph_are_refused(run, server, monkeypatch):
    def expand(self, value):
        return {"result": (["out", 0],), "expand": {"out": node("Value", value=value)}}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "run", expand)
    run({"e": node("Expand", value=1), "out": node("Show", value=["e", 0])})
    assert "duplicate node out" in server.of("execution_error")[0]["exception_message"]


def test_a_cycle_in_a_sub_graph_is_an_error(run, server, monkeypatch):
    def expand(self, value):
        graph = {"x": node("Add", a=["y", 0], b=1), "y": node("Add", a=["x", 0], b=1)}
        return {"result": (["x", 0],), "expand": graph}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "run", expand)
    run({"e": node("Expand", value=1), "out": node("Show", value=["e", 0])})
    error = server.of("execution_error")[0]
    assert "Dependency cycle detected" in error["exception_message"]
    assert (error["node_id"], error["node_type"]) == ("e", "Expand")  # the page knows only nodes of the workflow


@pytest.mark.parametrize("returned, declared", [((4,), 3), ((), 2), ({"ui": {"text": ["a"]}}, 1)])
def test_a_node_that_returns_less_than_it_declares_gives_none_for_the_rest(run, monkeypatch, returned, declared):
    few = make("Few", {"required": {}}, ("INT",) * declared, lambda self: returned)
    seen = make("Seen", {"value": ("INT", {})}, ("INT",), lambda self, value: (-1 if value is None else value,))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Few", few)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Seen", seen)
    prompt = {"few": node("Few"), "s": node("Seen", value=["few", declared - 1]), "out": node("Show", value=["s", 0])}
    assert run(prompt) == {"out": {"value": [-1]}} | ({} if isinstance(returned, tuple) else {"few": {"text": ["a"]}})


def test_asynchronous_nodes_overlap(run):
    prompt = {
        "a": node("Slow", value=1),
        "b": node("Slow", value=2),
        "s": node("Add", a=["a", 0], b=["b", 0]),
        "out": node("Show", value=["s", 0]),
    }
    assert run(prompt) == {"out": {"value": [3]}}
    assert CALLS.all[:2] == ["slow 1 begins", "slow 2 begins"]


def test_an_error_is_reported_with_its_inputs(run, server):
    prompt = {"v": node("Value", value=4), "f": node("Fail", value=["v", 0]), "out": node("Show", value=["f", 0])}
    run(prompt)
    assert not run.executor.success
    report = server.of("execution_error")[0]
    assert report["node_id"] == "f"
    assert report["node_type"] == "Fail"
    assert report["exception_message"] == "cannot work on 4\n"
    assert report["exception_type"] == "ValueError"
    assert report["current_inputs"] == {"value": [4]}
    assert report["executed"] == ["v"]
    assert any("_fail" in line for line in report["traceback"])
    assert run(chain(2)) == {"out": {"value": [2]}}


def test_an_interrupt_ends_the_prompt_at_the_next_node(run, server, monkeypatch):
    def interrupting(self, value):
        nodes.interrupt_processing()
        return (value,)

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "run", interrupting)
    run({"v": node("Value", value=4), "out": node("Show", value=["v", 0])})
    assert server.of("execution_interrupted")[0]["node_id"] == "out"
    assert CALLS.all == []
    assert not comfy.model_management.processing_interrupted()


def test_an_interrupt_ends_a_prompt_that_waits_for_something_outside(run, server, monkeypatch):
    import asyncio

    async def endless(self, value):
        nodes.interrupt_processing()
        await asyncio.Event().wait()

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Slow"], "run", endless)
    run({"s": node("Slow", value=4), "out": node("Show", value=["s", 0])})
    assert server.of("execution_interrupted")
    assert run(chain(2)) == {"out": {"value": [2]}}


def test_a_progress_bar_is_told_of(run, server, monkeypatch):
    import comfy.utils
    from comfy_execution.progress import install_progress_hook

    def slow(self, value):
        comfy.utils.ProgressBar(4).update_absolute(3, 4)
        return (value,)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    install_progress_hook(server)
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "run", slow)
    run(chain(2))
    message = server.of("progress")[0]
    assert (message["value"], message["max"], message["node"]) == (3, 4, "0")
    states = [data["nodes"]["0"]["state"] for data in server.of("progress_state")]
    assert states[0] == "running"
    assert states[-1] == "finished"


def test_the_last_state_of_many_nodes_is_never_lost(run, server):
    run(chain(300))
    messages = server.of("progress_state")
    assert len(messages) < 100
    assert len(messages[-1]["nodes"]) == 301
    assert {state["state"] for state in messages[-1]["nodes"].values()} == {"finished"}


def test_out_of_memory_unloads_the_models(run, server, monkeypatch):
    unloaded = []
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: unloaded.append(True))

    def greedy(self, value):
        raise comfy.model_management.OOM_EXCEPTION("no memory left")

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "run", greedy)
    run({"v": node("Value", value=4), "out": node("Show", value=["v", 0])})
    assert unloaded == [True]
    assert "TIPS" in server.of("execution_error")[0]["exception_message"]


def test_only_the_wanted_outputs_run(run):
    prompt = {"v": node("Value", value=1), "a": node("Show", value=["v", 0]), "b": node("ShowMine", value=["v", 0])}
    assert list(run(prompt, targets=["b"])) == ["b"]


def test_outputs_run_in_the_order_of_the_prompt(run, server):
    prompt = {f"o{i}": node("ShowMine", value=i) for i in (3, 1, 2, 5, 4)}
    run(prompt)
    assert [data["node"] for data in server.of("executing")] == ["o3", "o1", "o2", "o5", "o4"]


def test_nodes_run_without_gradients(run, monkeypatch):
    import torch

    seen = []
    monkeypatch.setattr(
        nodes.NODE_CLASS_MAPPINGS["Value"],
        "run",
        lambda self, value: (seen.append(torch.is_inference_mode_enabled()) or value,),
    )
    run(chain(2))
    assert seen == [True]


def test_time_grows_linearly(server):
    run = Runner(server)
    run(chain(5))

    def seconds(length):
        before = time.perf_counter()
        run(chain(length))
        return time.perf_counter() - before

    assert seconds(200) < 0.4
    assert seconds(200) < 0.1
    assert seconds(1000) < 2.0


def test_stack_frames_show_what_packs_look_for(run):
    import inspect

    seen = []

    class Curious(nodes.NODE_CLASS_MAPPINGS["Add"]):
        @classmethod
        def INPUT_TYPES(cls):
            names = [frame.function for frame in inspect.stack()[1:3]]
            if "get_input_info" in names:
                seen.append(names)
            return {"required": {"a": ("INT",), "b": ("INT",)}}

    nodes.NODE_CLASS_MAPPINGS["Add"] = Curious
    run(chain(2))
    assert ["get_input_info", "get_input_info"] in seen


def test_any_input_declared_by_an_object(run):
    class Everything:
        def __contains__(self, name):
            return True

        def __getitem__(self, name):
            return ("*",)

    cls = nodes.NODE_CLASS_MAPPINGS["Show"]
    open_class = type(
        "Open",
        (cls,),
        {
            "INPUT_TYPES": classmethod(lambda c: {"required": {}, "optional": Everything(), "hidden": Everything()}),
            "run": lambda self, **values: {"ui": {"names": sorted(values)}},
        },
    )
    nodes.NODE_CLASS_MAPPINGS["Show"] = open_class
    prompt = {"v": node("Value", value=1), "out": node("Show", x=["v", 0], y=3)}
    assert run(prompt) == {"out": {"names": ["x", "y"]}}
