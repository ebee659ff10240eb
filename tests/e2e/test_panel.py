"""What two ranks say of themselves: /taco_dit/status, /metrics and the WebSocket message."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.server import Server, wait_until
from tests.e2e.workflows import flux, insert


def slow(label, steps, **fault):
    options = {"label": label, "slow_ms": 50, "fail": "never", "fail_rank": 1, "fail_step": 3, **fault}
    return insert(flux(seed=501, steps=steps, cfg=4.5), "watch", "TestModel", **options)


def metrics(server):
    status, content = server.request("/metrics")
    assert status == 200
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k != "device")): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def watch(server, page, enabled=True):
    return server.json("/taco_dit/watch", {"clientId": page.id, "enabled": enabled})


@pytest.fixture(scope="module")
def server(base):
    """Its own server, for its counters."""
    with Server(base, 2, ["--use-sage-attention", "--taco-measure"]) as server:
        yield server


def test_every_rank_reports_of_itself(server):
    assert wait_until(lambda: all("age" in rank for rank in server.json("/taco_dit/status")["ranks"]), 10)
    first = server.json("/taco_dit/status")["ranks"]
    assert [rank["rank"] for rank in first] == [0, 1]
    for rank in first:
        assert 0 < rank["memory_used"] < rank["memory_total"] and rank["temperature"] is None
    time.sleep(2.5)
    second = server.json("/taco_dit/status")["ranks"]
    assert all(new["number"] > old["number"] and new["age"] < 2 for old, new in zip(first, second))


def test_warnings_of_the_start_are_there(server):
    (event,) = [e for e in server.json("/taco_dit/status")["events"] if "without effect" in e["text"]]
    assert event["level"] == "warning" and "--use-sage-attention" in event["text"] and event["cure"]


def test_metrics_count(server):
    before = metrics(server)
    assert before["taco_dit_ranks",] == 2
    steps = 3
    server.pictures(slow("metrics-", steps))
    assert wait_until(lambda: metrics(server)["taco_dit_rank_steps_total", "1"] >= steps, 5)
    after = metrics(server)
    assert after["taco_dit_prompts_total", "done"] == before["taco_dit_prompts_total", "done"] + 1
    assert after["taco_dit_step_seconds_count",] == before["taco_dit_step_seconds_count",] + steps
    for rank in ("0", "1"):
        for name in ("taco_dit_rank_compute_seconds_total", "taco_dit_rank_exchange_seconds_total"):
            assert after[name, rank] > before[name, rank]
        assert after["taco_dit_rank_memory_used_bytes", rank] > 0
    assert after["taco_dit_queue_length",] == 0


def test_a_failure_of_rank_1_is_counted_and_explained_and_can_be_cleared(server):
    before = metrics(server)
    outcome = server.run(slow("fails-", 6, fail="wrapper"))
    assert outcome.error is not None
    after = metrics(server)
    assert after["taco_dit_prompts_total", "failed"] == before["taco_dit_prompts_total", "failed"] + 1
    assert after["taco_dit_rank_failures_total", "1"] == before.get(("taco_dit_rank_failures_total", "1"), 0) + 1
    (event,) = [e for e in server.json("/taco_dit/status")["events"] if "on purpose" in e["text"]]
    assert event["level"] == "error" and event["ranks"] == [1] and event["node"] == "sample (KSampler)"
    assert event["text"].startswith("rank 1 (cpu) failed: ArithmeticError: on purpose") and event["cure"]
    assert server.request("/taco_dit/events", {"clear": True})[0] == 200
    assert server.json("/taco_dit/status")["events"] == []


def test_a_cancelled_prompt_is_neither_done_nor_failed(server):
    before = metrics(server)
    with server.page() as page:
        page.post(slow("cancel-", 100))
        page.wait("progress", lambda m: m["data"]["value"] == 2)
        server.request("/interrupt", {})
        page.finish()
    after = metrics(server)
    counted = {name: after["taco_dit_prompts_total", name] - before["taco_dit_prompts_total", name]
               for name in ("done", "failed", "cancelled")}  # fmt: skip
    assert counted == {"done": 0, "failed": 0, "cancelled": 1}
    assert server.json("/taco_dit/status")["events"] == []


def test_only_who_watches_gets_messages_and_not_too_many(server):
    with server.page() as watching, server.page() as other:
        assert watch(server, watching)["world_size"] == 2
        begun = time.monotonic()
        watching.post(slow("watch-", 40))
        watching.wait("taco_dit", lambda m: m["data"]["current_run"]["sampling"] and m["data"]["current_run"]["calls"])
        outcome = watching.finish()
        seconds = time.monotonic() - begun
        news = [m["data"] for m in watching.messages if m["type"] == "taco_dit"]
        assert outcome.error is None and 2 <= len(news) <= 4 * seconds + 2
        during = [n for n in news if n["current_run"]["sampling"]]
        assert during[-1]["current_run"]["calls"] > during[0]["current_run"]["calls"]
        assert during[-1]["active_plan"] == "cfg 2" and during[-1]["workload"]["conds"] == 2
        best = during[-1]["considered"][0]
        assert best["plan"] == "cfg 2" and best["predicted_ms"] == during[-1]["predicted_ms"] > 0
        assert during[-1]["machine"]["measured"] and "2 x CPU" in during[-1]["machine"]["text"]
        last = server.json("/taco_dit/status")["last_run"]
        assert last["predicted_ms"] > 0 and f"(predicted {last['predicted_ms']:.1f}), cfg 2" in server.tail(200)
        assert not [m for m in other.messages if m["type"] == "taco_dit"]
        watch(server, watching, enabled=False)
        told = len([m for m in watching.messages if m["type"] == "taco_dit"])
        server.run(slow("unwatched-", 10))
        assert len([m for m in watching.messages if m["type"] == "taco_dit"]) <= told + 1


def test_bad_requests_are_refused(server):
    assert server.request("/taco_dit/watch", [1])[0] == 400
    assert server.request("/taco_dit/events", "clear")[0] == 400


def test_the_panel_belongs_to_the_program_not_to_the_packs(base):
    with Server(base, 1, ["--disable-all-custom-nodes"]) as server:
        scripts = [name for name in server.json("/extensions") if name.startswith("/extensions/taco_dit/")]
        assert "/extensions/taco_dit/taco_dit.js" in scripts
        assert all(server.request(name)[0] == 200 for name in [*scripts, "/extensions/taco_dit/panel/panel.css"])
