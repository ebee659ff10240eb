"""What ComfyUI's executor promises to nodes and pages, through a real server with one rank and with two.

Every prompt here is made of the nodes of `semantics_pack` (V1) and `semantics_pack_v3.py` (V3), which write down what
ran on each rank: ranks must run the same, and two ranks must answer as one does.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid

import pytest

from tests.e2e.server import Server, wait_until
from tests.e2e.workflows import node

HERE = os.path.dirname(os.path.abspath(__file__))
RANKS = [1, 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base directory with the two packs and no models."""
    folder = tmp_path_factory.mktemp("semantics")
    shutil.copytree(os.path.join(HERE, "semantics_pack"), folder / "custom_nodes" / "semantics_pack")
    shutil.copy(os.path.join(HERE, "semantics_pack_v3.py"), folder / "custom_nodes")
    return str(folder)


@pytest.fixture(scope="module", params=RANKS, ids=lambda n: f"{n}-ranks")
def server(request, home):
    with Server(home, request.param) as running:
        yield running


@pytest.fixture
def label():
    return f"t{uuid.uuid4().hex[:8]}-"


def ask(server, label, text):
    """Tell nodes something that is not in the prompt."""
    with open(os.path.join(server.record_folder, f"{label}.ask"), "w", encoding="utf-8") as file:
        file.write(str(text))


def ran(server, label):
    """What nodes wrote down under a label, which must be the same on every rank."""
    records = server.records(label)
    assert all(lines == records[0] for lines in records.values()), records
    assert len(records) in (0, server.ranks), records
    return records.get(0, [])


def shown(outcome, name="show"):
    """The text an SShow node shows."""
    return outcome.outputs[name]["text"]


def started(outcome):
    return [data["node"] for data in outcome.of("executing") if data["node"] is not None]


def show(value, **nodes):
    return {**nodes, "show": node("SShow", value=value)}


# ---- caching -------------------------------------------------------------------------------------------------------


def test_only_what_changed_runs_again(server, label):
    def prompt(last):
        return show(
            ["sum", 0],
            one=node("SValue", value=1, label=label),
            two=node("SValue", value=last, label=label),
            sum=node("SAdd", a=["one", 0], b=["two", 0], label=label),
        )

    first = server.run(prompt(2))
    assert shown(first) == ["3"] and ran(server, label) == ["1", "2", "1+2"]
    assert first.of("execution_cached")[0]["nodes"] == []
    again = server.run(prompt(2))
    assert shown(again) == ["3"] and started(again) == [] and len(ran(server, label)) == 3
    assert set(again.of("execution_cached")[0]["nodes"]) == {"one", "two", "sum", "show"}
    assert again.of("executed")[0]["output"] == {"text": ["3"]}, "a page must see cached results, too"
    part = server.run(prompt(5))
    assert shown(part) == ["6"] and set(started(part)) == {"two", "sum", "show"}
    assert ran(server, label)[3:] == ["5", "1+5"]
    renamed = {f"x{name}": value for name, value in prompt(5).items()}
    renamed["xsum"]["inputs"] |= {"a": ["xone", 0], "b": ["xtwo", 0]}
    renamed["xshow"]["inputs"]["value"] = ["xsum", 0]
    assert shown(server.run(renamed), "xshow") == ["6"] and len(ran(server, label)) == 5, "ids do not matter"


@pytest.mark.parametrize("kind", ["SChanged", "S3Changed"])
def test_a_node_says_when_it_has_changed(server, label, kind):
    prompt = show(["changed", 0], changed=node(kind, label=label))
    for text, runs in (("4", 1), ("4", 1), ("5", 2)):
        ask(server, label, text)
        assert shown(server.run(prompt)) == [text]
        assert len(ran(server, label)) == runs


def test_nan_is_never_the_same(server, label):
    prompt = show(["never", 0], never=node("SNeverSame", value=1, label=label))
    for runs in (1, 2, 3):
        server.run(prompt)
        assert ran(server, label) == ["1"] * runs


def test_a_failing_is_changed_counts_as_changed(server, label):
    """Its file is not there at first."""
    prompt = show(["changed", 0], changed=node("SChanged", label=label))
    assert server.run(prompt).error["exception_type"] == "FileNotFoundError"
    ask(server, label, 7)
    assert shown(server.run(prompt)) == ["7"]


def test_an_instance_lives_as_long_as_its_node_is_in_the_prompts(server):
    def count(value):
        return shown(server.run(show(["count", 0], count=node("SCount", value=value))))

    assert [count(1), count(2), count(2), count(3)] == [["1"], ["2"], ["2"], ["3"]]
    server.run(show(["other", 0], other=node("SValue", value=1, label="")))
    server.run(show(["other", 0], other=node("SValue", value=2, label="")))
    assert count(4) == ["1"]


CACHES = {
    "classic": (["--cache-classic"], 3),
    "lru": (["--cache-lru", "20"], 2),
    "none": (["--cache-none"], 4),
    "plenty of memory": (["--cache-ram", "0.001"], 2),
    "no memory": (["--cache-ram", "1000000"], 4),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("mode", CACHES)
def test_cache_flags(home, mode, ranks):
    """Prompts A, A, B, A: how often the value was computed. Memory that is always short is like keeping nothing."""
    flags, runs = CACHES[mode]

    def prompt(last):
        values = {f"v{i}": node("SAdd", a=last if i == 0 else [f"v{i - 1}", 0], b=i, label="cache") for i in range(6)}
        branch = {"expand": node("SExpand", value=["v5", 0], depth=2, label="")}
        lazy = {"lazy": node("SSwitch", first=True, a=["expand", 0], b=["v0", 0])}
        return show(["lazy", 0], **values, **branch, **lazy)

    with Server(home, ranks, flags) as server:
        for last, result in ((1, "18"), (1, "18"), (2, "19"), (1, "18")):
            assert shown(server.run(prompt(last))) == [result]
        assert len(ran(server, "cache")) == 6 * runs


# ---- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SSwitch", "S3Switch"])
@pytest.mark.parametrize("first", [True, False])
def test_lazy_inputs_run_only_when_asked_for(server, label, kind, first):
    prompt = show(
        ["switch", 0],
        a=node("SValue", value=1, label=label),
        b=node("SValue", value=2, label=label),
        switch=node(kind, first=first, a=["a", 0], b=["b", 0]),
    )
    result = "1" if first else "2"
    assert shown(server.run(prompt)) == [result] and ran(server, label) == [result]


def test_lists_go_through_nodes_item_by_item(server, label):
    prompt = show(
        ["add", 0],
        list=node("SList", count=4),
        add=node("SAdd", a=["list", 0], b=["list", 1], label=label),
        sum=node("SSum", values=["add", 0], factor=10),
        total=node("SShow", value=["sum", 0]),
        range=node("S3Range", count=5),
        three=node("S3Sum", values=["range", 0]),
        v3=node("SShow", value=["three", 0]),
    )
    outcome = server.run(prompt)
    assert shown(outcome) == ["4", "5", "6", "7"] and ran(server, label) == ["0+4", "1+4", "2+4", "3+4"]
    assert shown(outcome, "total") == ["220"] and shown(outcome, "v3") == ["10"]


def test_an_empty_list_is_a_clear_error(server):
    error = server.run(show(["list", 0], list=node("SList", count=0))).error
    assert error["node_id"] == "show" and "'value' received an empty list" in error["exception_message"]


@pytest.mark.parametrize("kind", ["SBlock", "S3Block"])
def test_a_blocker_stops_what_follows(server, label, kind):
    prompt = show(
        ["after", 0],
        block=node(kind, value=2, message=""),
        after=node("SAdd", a=["block", 0], b=1, label=label),
        free=node("SValue", value=5, label=""),
        other=node("SShow", value=["free", 0]),
    )
    outcome = server.run(prompt)
    assert outcome.outputs == {"other": {"text": ["5"]}} and ran(server, label) == []
    prompt["block"]["inputs"]["message"] = "even numbers are not allowed"
    told = server.run(prompt).error
    assert told["exception_type"] == "ExecutionBlocked" and told["node_id"] == "after"
    assert told["exception_message"] == "Execution Blocked: even numbers are not allowed"


def test_a_blocker_in_a_list_blocks_its_item_only(server):
    prompt = show(["block", 0], list=node("SList", count=6), block=node("SBlock", value=["list", 0], message=""))
    assert shown(server.run(prompt)) == ["1", "3", "5"]


def test_nodes_expand_into_sub_graphs(server, label):
    prompt = show(["grow", 0], grow=node("SExpand", value=10, depth=3, label=label))
    outcome = server.run(prompt)
    assert shown(outcome) == ["13"]
    assert ran(server, label) == ["expand 3", "10+1", "expand 2", "11+1", "expand 1", "12+1", "expand 0"]
    grown = [data for data in outcome.of("executing") if data["node"] and data["node"].startswith("grow.")]
    assert grown and all(data["display_node"] == "grow" for data in grown)
    # what a sub-graph computed is kept like anything else
    prompt["grow"]["inputs"]["value"] = 10
    prompt["more"] = node("SExpand", value=["grow", 0], depth=1, label=label)
    prompt["show"]["inputs"]["value"] = ["more", 0]
    assert shown(server.run(prompt)) == ["14"]
    assert ran(server, label)[7:] == ["expand 1", "13+1", "expand 0"]
    three = server.run(show(["grow", 0], grow=node("S3Expand", value=5)))
    assert shown(three) == ["20"]


def test_lists_expand_item_by_item(server):
    prompt = show(["grow", 0], list=node("SList", count=3), grow=node("SExpand", value=["list", 0], depth=2, label=""))
    assert shown(server.run(prompt)) == ["2", "3", "4"]


def test_an_output_inside_a_sub_graph_is_shown(server):
    outcome = server.run({"loop": node("SLoop", value=7, fail=False), "show": node("SShow", value=["loop", 0])})
    inner = [name for name in outcome.outputs if name.startswith("loop.")]
    assert [outcome.outputs[name]["text"] for name in inner] == [["7"]]
    assert shown(outcome) == ["7"] and outcome.outputs["loop"]["text"] == ["outer"]
    meta = server.json(f"/history/{outcome.prompt_id}")[outcome.prompt_id]["meta"]
    assert meta[inner[0]]["real_node_id"] == "loop" and meta[inner[0]]["display_node"] == "loop"


def test_asynchronous_nodes_overlap(server, label):
    names = ["a", "b", "c"]
    prompt = {name: node("SAsync", value=i, group=label, size=3) for i, name in enumerate(names)}
    prompt |= {f"show {name}": node("SShow", value=[name, 0]) for name in names}
    outcome = server.run(prompt)
    assert [shown(outcome, f"show {name}") for name in names] == [["0"], ["1"], ["2"]]
    assert {rank: sorted(lines) for rank, lines in server.records(label).items()} == {
        rank: ["0", "1", "2"] for rank in range(server.ranks)
    }


def test_an_asynchronous_v3_node(server, label):
    prompt = show(["twice", 0], list=node("SList", count=3), twice=node("S3Twice", value=["list", 0], label=label))
    assert shown(server.run(prompt)) == ["0", "2", "4"]


# ---- checks and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SValidate", "S3Twice"])
def test_a_node_checks_its_inputs(server, kind):
    more = {"link": ["other", 0]} if kind == "SValidate" else {"label": ""}

    def post(value, **inputs):
        prompt = show(["check", 0], other=node("SList", count=1), check=node(kind, value=value, **{**more, **inputs}))
        status, content = server.request("/prompt", {"prompt": prompt})
        return status, json.loads(content)

    assert post(5)[0] == 200
    status, answer = post(13)
    error = answer["node_errors"]["check"]["errors"][0]
    assert status == 400 and error["type"] == "custom_validation_failed"
    assert error["details"] == "value - 13 brings bad luck"
    assert answer["node_errors"]["check"]["dependent_outputs"] == ["show"]
    # a node that looks at an input itself is not second-guessed about its limits
    assert post(11)[0] == 200


def test_the_types_of_links_can_be_checked(server):
    prompt = show(["check", 0], text=node("StringConcatenate", string_a="", string_b="", delimiter=""),
                  check=node("SValidate", value=1, link=["text", 0]))  # fmt: skip
    status, content = server.request("/prompt", {"prompt": prompt})
    assert status == 400 and "no texts, please" in content.decode()


def test_one_bad_output_does_not_stop_the_others(server):
    prompt = show(["good", 0], good=node("SValue", value=1, label=""), bad=node("SShow", value=["nothing", 0]))
    answer = server.json("/prompt", {"prompt": prompt})
    assert list(answer["node_errors"]) == ["bad"]
    assert wait_until(lambda: server.json(f"/history/{answer['prompt_id']}") != {}, 20)
    assert server.json(f"/history/{answer['prompt_id']}")[answer["prompt_id"]]["outputs"] == {"show": {"text": ["1"]}}


def test_an_error_names_node_inputs_and_traceback(server, label):
    prompt = show(
        ["fail", 0],
        before=node("SValue", value=1, label=label),
        fail=node("SFail", value=["before", 0], label="text"),
    )
    before = len(server.log)
    outcome = server.run(prompt)
    error = outcome.error
    assert error["node_id"] == "fail" and error["node_type"] == "SFail" and error["exception_type"] == "LookupError"
    assert error["exception_message"] == "cannot find 1\n"
    assert error["current_inputs"] == {"value": [1], "label": ["text"]} and error["executed"] == ["before"]
    assert any("raise LookupError" in line for line in error["traceback"]), error["traceback"]
    entry = server.json(f"/history/{outcome.prompt_id}")[outcome.prompt_id]
    assert entry["status"]["status_str"] == "error" and not entry["status"]["completed"]
    messages = dict(entry["status"]["messages"])
    assert messages["execution_error"]["node_id"] == "fail" and "execution_success" not in messages
    said = "\n".join(server.log[before:])
    assert said.count("Traceback") == 1, "the traceback is told by rank 0 alone"
    assert said.count("cannot find 1") <= 1 + server.ranks
    # what was computed before the error is kept, if every rank got that far
    del prompt["fail"]
    prompt["show"]["inputs"]["value"] = ["before", 0]
    assert shown(server.run(prompt)) == ["1"]
    assert server.ranks > 1 or ran(server, label) == ["1"]


def test_an_error_inside_a_sub_graph_is_shown_on_the_node(server):
    error = server.run(show(["loop", 0], loop=node("SLoop", value=7, fail=True))).error
    assert (
        error["node_id"] == "loop" and error["node_type"] == "SLoop" and "cannot find 7" in error["exception_message"]
    )


# ---- what nodes and pages are told ---------------------------------------------------------------------------------


def test_hidden_inputs(server):
    extra = {"extra_pnginfo": {"workflow": {"id": "w"}}, "auth_token_comfy_org": "four", "api_key_comfy_org": "secret"}
    outcome = server.run({"one": node("SHidden"), "three": node("S3Hidden")}, extra_data=extra)
    told = json.loads(outcome.outputs["one"]["text"][0])
    assert told == {"nodes": ["one", "three"], "extra": extra["extra_pnginfo"], "me": "one", "token": 4, "key": 6}
    told = json.loads(outcome.outputs["three"]["text"][0])
    assert told == {"nodes": ["one", "three"], "extra": extra["extra_pnginfo"], "me": "three", "key": 6}
    for path in ("/history", "/queue", "/jobs", f"/jobs/{outcome.prompt_id}", "/object_info", "/internal/logs"):
        assert "secret" not in server.request(path)[1].decode(), path
    assert not any("secret" in line for line in server.log)


def test_progress_of_each_node(server):
    prompt = show(["work", 0], work=node("SProgress", steps=5, seconds=0.0), late=node("SShow", value=["work", 0]))
    outcome = server.run(prompt)
    told = [(data["node"], data["value"], data["max"]) for data in outcome.of("progress")]
    assert told == [("work", value, 5) for value in range(1, 6)], "told once, whatever the number of ranks"
    states = outcome.of("progress_state")
    assert all(data["prompt_id"] == outcome.prompt_id for data in states)
    last = states[-1]["nodes"]
    assert {name: state["state"] for name, state in last.items()} == dict.fromkeys(prompt, "finished")
    assert last["work"]["value"] == last["work"]["max"] == 5
    assert last["work"]["display_node_id"] == last["work"]["real_node_id"] == "work"
    running = [
        data["nodes"]["work"]["value"] for data in states if data["nodes"].get("work", {}).get("state") == "running"
    ]
    assert running == sorted(running) and running[-1] == 5


def test_order_of_the_queue(server, label):
    """While a prompt runs, others are queued: with a number, without, at the front."""
    slow = show(["work", 0], work=node("SProgress", steps=100000, seconds=0.01))
    with server.page() as page:
        running = page.post(slow)
        page.wait("progress")
        ids = {}
        for name, more in (
            ("last", {"number": 1e9}),
            ("plain", {}),
            ("front", {"front": True}),
            ("first", {"number": -1e9}),
        ):
            value = node("SValue", value=len(ids), label=label)
            ids[name] = server.json("/prompt", {"prompt": show(["v", 0], v=value), **more})["prompt_id"]
        queue = server.json("/queue")
        assert [item[1] for item in queue["queue_running"]] == [running]
        order = [ids[name] for name in ("first", "front", "plain", "last")]
        assert [item[1] for item in queue["queue_pending"]] == order
        server.request("/interrupt", {"prompt_id": ids["plain"]})
        assert server.json("/queue")["queue_running"], "only the running prompt can be interrupted"
        server.request("/interrupt", {"prompt_id": running})
        assert page.finish().of("execution_interrupted")
    assert wait_until(lambda: server.json("/prompt")["exec_info"]["queue_remaining"] == 0, 30)
    assert ran(server, label) == ["3", "2", "1", "0"]
    done = list(server.json("/history?max_items=5"))
    assert done == [running, *order]


def test_only_the_targets_run(server, label):
    prompt = {}
    for i, name in enumerate("abc"):
        prompt[f"v{name}"] = node("SValue", value=i, label=label)
        prompt[name] = node("SShow", value=[f"v{name}", 0])
    outcome = server.run(prompt, partial_execution_targets=["b"])
    assert outcome.outputs == {"b": {"text": ["1"]}} and ran(server, label) == ["1"]
    status, content = server.request("/prompt", {"prompt": prompt, "partial_execution_targets": ["vb"]})
    assert status == 400 and b"prompt_no_outputs" in content
