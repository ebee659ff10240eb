"""What the TACO-DiT panel of the page, `/taco_dit/status` and `/metrics` show: the ranks at work, on rank 0."""

from __future__ import annotations

import collections
import json
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from comfy.taco_dit.core.launcher import START_MESSAGES
from comfy.taco_dit.utils.events import EventHandler, remedy_for
from comfy.taco_dit.utils.metrics import Metrics
from comfy.taco_dit.utils.monitor import Monitor
from comfy.taco_dit.utils.performance_monitor import RunStatistics
from comfy_nodes.packs import FAILED

EVENT = "taco_dit"
WEB_NAME = "taco_dit"
WEB_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "web")
_KEPT_PROMPTS = 50
_MEMORY_GRAIN = 32 * 2**20
_RESULTS = {"execution_success": "done", "execution_interrupted": "cancelled"}


class Panel:
    """Combines the ranks' reports and sends them to the pages that watch."""

    def __init__(self, server: Any, current: Any, monitor: Monitor) -> None:
        self.server = server
        self.monitor = monitor
        self.events = monitor.events
        self.metrics = Metrics(self.ranks, self._queue_length)
        self.rank_infos: list[dict[str, Any]] = []
        self._current = current
        self.prompts: collections.deque[dict[str, Any]] = collections.deque(maxlen=_KEPT_PROMPTS)
        self._watching: set[str] = set()
        self._shown: Any = None
        current.engine.clock.observer = self.metrics.step
        monitor.on_tick = self._tell

    # --- what there is to show --------------------------------------------------------------------------------------

    def ranks(self) -> list[dict[str, Any]]:
        """Every rank: what it is, and its latest report."""
        reports = {report["rank"]: report for report in self.monitor.reports()}
        return [{**info, **reports.get(info["rank"], {})} for info in self.rank_infos]

    def set_ranks(self, infos: list[dict[str, Any]]) -> None:
        """The members of the job; called again when one was replaced, whose report and event numbers restart."""
        known = {info["rank"]: info["pid"] for info in self.rank_infos}
        self.rank_infos = infos
        for info in infos:
            if known.get(info["rank"], info["pid"]) != info["pid"]:
                self.monitor.forget(info["rank"])
                self.events.add("error", f"rank {info['rank']} ended and was started again", info["rank"])
        self.monitor.wake()

    def status(self) -> dict[str, Any]:
        """`GET /taco_dit/status` and the WebSocket message: ranks, configuration, plan, runs, events."""
        current, ranks = self._current, self.ranks()
        engine = current.engine.status()
        times = [rank["run"] for rank in ranks if "run" in rank]
        run = RunStatistics(ranks=times)
        return {
            "enabled": current.config.parallel.enabled and current.manager.world_size > 1,
            "world_size": current.manager.world_size,
            "ranks": ranks,
            **engine,
            "current_run": {
                "sampling": self.monitor.sampling,
                "calls": int(times[0]["calls"]) if times else 0,
                "ranks": times,
                "mean_call_ms": run.mean_call_ms,
            },
            "last_prompts": list(self.prompts),
            "control": {"keys": self.monitor.control_keys},
            "events": self.events.as_list(),
            "failed_packs": [failure.as_dict() for failure in FAILED.values()],
        }

    def _queue_length(self) -> int:
        return int(self.server.get_queue_info()["exec_info"]["queue_remaining"])

    # --- pages ------------------------------------------------------------------------------------------------------

    def watch(self, client_id: str, enabled: bool) -> None:
        """Send news to a page from now on, or no more."""
        if enabled:
            self._watching.add(client_id)
        else:
            self._watching.discard(client_id)

    def clear_events(self) -> None:
        """Forget warnings and errors, on all pages."""
        self.events.clear()
        self.monitor.wake()

    def _tell(self) -> None:
        """Called by the monitor's thread: send the status if somebody watches and something changed."""
        self._watching -= {client_id for client_id in self._watching.copy() if client_id not in self.server.sockets}
        watching = self._watching.copy()
        if not watching:
            return
        status = self.status()
        digest = _digest(status)
        if digest == self._shown and not status["current_run"]["sampling"]:
            return
        self._shown = digest
        for client_id in watching:
            self.server.send_sync(EVENT, status, client_id)

    # --- what happens -----------------------------------------------------------------------------------------------

    def collect_warnings(self, environ: Mapping[str, str]) -> None:
        """Note warnings from now on, and what was said before this process began."""
        logging.getLogger().addHandler(EventHandler(self.events, self.monitor.rank))
        for message in filter(None, environ.get(START_MESSAGES, "").split("\n")):
            self.events.add("warning", message, 0)
        restarts = self._current.manager.info.restart
        if restarts:
            self.events.add("error", f"the launcher started all ranks again, {restarts} times so far", 0)

    def prompt_done(self, executor: Any) -> None:
        """Called by the prompt worker after each prompt."""
        ending, data = executor.status_messages[-1]
        result = _RESULTS.get(ending, "failed")
        record = {**executor.record.as_dict(), "result": result, "ended": time.time()}
        self.prompts.append(record)
        self.metrics.times(record)
        rank = executor.failed_rank if result == "failed" else None
        self.metrics.prompt(result, rank)
        if result == "failed":
            text = data["exception_message"]
            if not text.startswith("rank "):
                text = f"{data['exception_type']}: {text}"
            node = f"{data['node_id']} ({data['node_type']})" if data["node_id"] else None
            self.events.add("error", text, rank or 0, remedy_for(text, node), node)
        self.monitor.wake()


def _digest(status: dict[str, Any]) -> str:
    """The part of a status whose change is worth a message; small movements of an idle machine are not."""
    ranks = [
        (rank["rank"], rank.get("memory_used", 0) // _MEMORY_GRAIN, round(rank.get("utilisation") or 0, 1),
         (rank.get("temperature") or 0) // 3, rank.get("age", 0) > 5)
        for rank in status["ranks"]
    ]  # fmt: skip
    rest = [status[key] for key in ("active_plan", "reason", "total_calls", "last_prompts", "events")]
    return json.dumps([ranks, *rest, status["current_run"]["sampling"]])
