"""What every rank reports of itself while the program runs, gathered on rank 0.

A thread on each rank reads the device and the clock, once a second when idle and twice a second while sampling, and
writes the report to the control plane; rank 0's thread reads the others'. The main threads take no part, so sampling does
not wait for it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from comfy import accounting

from .events import EventLog
from .rank_sampler import RankSampler

IDLE_S, SAMPLING_S = 1.0, 0.5
SPACING_S = 0.25  # shortest time between two reports, however often `wake` is called


class Monitor:
    """One rank's reporter; on rank 0 also the reader of the others' reports.

    `events` is this rank's list; on rank 0 it holds everybody's. `on_tick` is called on rank 0 after each reading.
    """

    def __init__(self, manager: Any, engine: Any) -> None:
        self.rank = manager.rank
        self.world_size = manager.world_size
        self.events = EventLog()
        self.on_tick: Callable[[], None] = lambda: None
        self._engine = engine
        self._sampler = RankSampler(manager.device)
        self._control: Any = manager.control
        self.control_keys = 0  # what the control plane holds; on rank 0
        self._reports: dict[int, dict[str, Any]] = {}
        self._arrived: dict[int, float] = {}
        self._seen_events: dict[int, int] = {}
        self._number = 0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taco-monitor", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def wake(self) -> None:
        """Something happened that should be shown soon."""
        self._wake.set()

    @property
    def sampling(self) -> bool:
        """Whether this rank is inside a sampling run."""
        return self._engine.runner.busy

    def report(self) -> dict[str, Any]:
        """This rank's state, for JSON.

        `run` and `ever` are times of denoiser calls in ms, of the run and in all; `prompt` is `accounting`'s record of
        the prompt that runs, or ran last.
        """
        self._number += 1
        clock = self._engine.clock
        return {
            "rank": self.rank,
            "number": self._number,
            "sampling": self.sampling,
            "run": clock.run.as_dict(),
            "ever": clock.ever.as_dict(),
            "prompt": accounting.current().as_dict(),
            **self._sampler.read(),
        }

    def reports(self) -> list[dict[str, Any]]:
        """The latest report of each rank that has made one, on rank 0; `age` is seconds since it came."""
        now = time.monotonic()
        known = dict(self._reports)
        return [{**known[rank], "age": round(now - self._arrived[rank], 1)} for rank in sorted(known)]

    def forget(self, rank: int) -> None:
        """A rank's process was replaced."""
        self._reports.pop(rank, None)
        self._seen_events.pop(rank, None)

    def _run(self) -> None:
        while True:
            try:
                self._tick()
            except ConnectionError as error:  # the control plane is gone: the job is ending
                logging.debug("monitor ends: %s", error)
                return
            time.sleep(SPACING_S)
            self._wake.wait((SAMPLING_S if self.sampling else IDLE_S) - SPACING_S)
            self._wake.clear()

    def _tick(self) -> None:
        mine = self.report()
        if self.rank:
            message = {**mine, "events": self.events.as_list()[-20:]}
            self._control.set(f"monitor/{self.rank}", json.dumps(message).encode())
            return
        self._take(mine)
        for rank in range(1, self.world_size):
            report = self._control.peek(f"monitor/{rank}")
            if report:
                self._take(json.loads(report))
        self.control_keys = self._control.count() if self._control is not None else 0
        try:
            self.on_tick()
        except Exception:  # noqa: BLE001 - what cannot be shown must not end the reports
            logging.exception("the panel could not be told")

    def _take(self, report: dict[str, Any]) -> None:
        rank = report["rank"]
        events = report.pop("events", [])
        if report["number"] != self._reports.get(rank, {}).get("number"):
            self._arrived[rank] = time.monotonic()
        self._reports[rank] = report
        seen = self._seen_events.get(rank, 0)
        self.events.take(event for event in events if event["id"] > seen)
        self._seen_events[rank] = max([seen, *(event["id"] for event in events)])
