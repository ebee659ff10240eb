"""The panel on rank 0: warnings of the start, how prompts ended, who is told."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from app.panel import Panel
from comfy import accounting
from comfy.taco_dit.core.launcher import START_MESSAGES, LaunchPlan, worker_environment
from comfy.taco_dit.utils.monitor import Monitor
from comfy.taco_dit.utils.performance_monitor import Clock


class Engine:
    """As much of the engine as is shown."""

    def __init__(self):
        self.clock = Clock(torch.device("cpu"))
        self.runner = SimpleNamespace(busy=False)
        self.calls = 0

    def status(self):
        return {"active_plan": None, "reason": None, "total_calls": self.calls}


@pytest.fixture
def panel():
    """A panel of one rank, and what its server sent: `panel.server.sent`."""
    info = SimpleNamespace(restart=0)
    manager = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), info=info, control=None)
    engine = Engine()
    config = SimpleNamespace(parallel=SimpleNamespace(enabled=True))
    current = SimpleNamespace(manager=manager, engine=engine, config=config)
    sent = []
    server = SimpleNamespace(
        sockets={"page": object()},
        sent=sent,
        send_sync=lambda event, data, sid: sent.append((event, sid)),
        get_queue_info=lambda: {"exec_info": {"queue_remaining": 0}},
    )
    made = Panel(server, current, Monitor(manager, engine))
    made.rank_infos = [{"rank": 0, "device": "cpu"}]
    handlers = logging.getLogger().handlers[:]
    yield made
    logging.getLogger().handlers[:] = handlers


def ended(message, failed_rank=None, **data):
    messages = [("execution_start", {}), (message, data)]
    return SimpleNamespace(status_messages=messages, failed_rank=failed_rank, record=accounting.Record())


def test_what_was_said_before_the_ranks_began_is_shown(panel):
    plan = LaunchPlan(1, True, messages=("no NVIDIA GPU found: computing on the CPU, which is slow",))
    panel._current.manager.info.restart = 2
    panel.collect_warnings(worker_environment(plan, {}))
    logging.getLogger("tests").warning("a later one")
    texts = [event["text"] for event in panel.status()["events"]]
    assert texts == [plan.messages[0], "the launcher started all ranks again, 2 times so far", "a later one"]
    assert "driver" in panel.status()["events"][0]["cure"]


def test_nothing_was_said_where_all_is_well(panel):
    panel.collect_warnings(worker_environment(LaunchPlan(2, False, (0, 1)), {START_MESSAGES: "of an older start"}))
    assert panel.status()["events"] == []


def test_only_failures_become_events(panel):
    panel.prompt_done(ended("execution_success"))
    panel.prompt_done(ended("execution_interrupted"))
    assert panel.status()["events"] == []
    panel.prompt_done(ended("execution_error", 0, exception_message="bad size\n", exception_type="ValueError",
                            node_id="4", node_type="KSampler"))  # fmt: skip
    (event,) = panel.status()["events"]
    assert (
        event["text"] == "ValueError: bad size" and event["node"] == "4 (KSampler)" and "4 (KSampler)" in event["cure"]
    )
    text = panel.metrics.text().decode()
    assert all(f'taco_dit_prompts_total{{result="{name}"}} 1.0' in text for name in ("done", "failed", "cancelled"))


def test_pages_are_told_of_changes_only_and_forgotten_when_gone(panel):
    panel._tell()
    assert panel.server.sent == [], "nobody watches"
    panel.watch("page", True)
    panel.watch("gone", True)
    for _ in range(3):
        panel._tell()
    assert panel.server.sent == [("taco_dit", "page")]
    panel.events.add("warning", "news", 0)
    panel._tell()
    assert len(panel.server.sent) == 2
    panel.monitor._engine.runner.busy = True
    panel._tell()
    panel._tell()
    assert len(panel.server.sent) == 4, "while sampling every tick is sent"
    panel.watch("page", False)
    panel._tell()
    assert len(panel.server.sent) == 4 and panel._watching == set()
