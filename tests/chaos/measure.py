"""Memory, open files, threads and keys of the control store over time, and how much they grew in the second half."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil

from tests.chaos.api import Away
from tests.chaos.run import Run

EVERY_S = 30.0
WARM_UP_S = 120.0  # a process younger than this still loads code and models
FIELDS = ("rss", "pss", "files", "threads")


@dataclass(frozen=True)
class Sample:
    """One process at one moment; `at` in seconds since the start of the run, `age` in s, memory in bytes."""

    at: float
    name: str
    pid: int
    age: float
    rss: int
    pss: int
    files: int
    threads: int


class Measurements:
    """Takes samples every EVERY_S seconds until it is cancelled."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.samples: list[Sample] = []
        self.keys: list[tuple[float, int]] = []

    async def take_for_ever(self, every: float = EVERY_S) -> None:
        """Never returns."""
        while True:
            await self._take()
            await asyncio.sleep(every)

    async def _take(self) -> None:
        at = time.time() - self._run.report.begun
        processes = {f"rank {rank}": pid for rank, pid in sorted(self._run.program.rank_pids().items())}
        processes["supervisor"] = self._run.program.pid
        for name, pid in processes.items():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                sample = await asyncio.to_thread(_sample, at, name, pid)
                self.samples.append(sample)
                self._run.report.record("process", **{k: v for k, v in vars(sample).items() if k != "at"})
        keys = await self._count_keys()
        if keys is not None:
            self.keys.append((at, keys))
        load = os.getloadavg()[0]
        self._run.report.record("machine", load=load, store_keys=keys, open_prompts=len(self._run.ledger.open))

    async def _count_keys(self) -> int | None:
        """Keys of the control store, where the status names them."""
        try:
            status = await self._run.api.get("/taco_dit/status")
        except (Away, RuntimeError):
            return None
        keys = (status.get("control") or {}).get("keys")
        return None if keys is None else int(keys)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Growth in the second half of a run of `seconds`, by process; and the store's keys."""
        half = [sample for sample in self.samples if sample.at >= seconds / 2]
        by_process: dict[tuple[str, int], list[Sample]] = {}
        for sample in half:
            if sample.age >= WARM_UP_S:
                by_process.setdefault((sample.name, sample.pid), []).append(sample)
        same = [
            {"process": name, "pid": pid, "minutes": (rows[-1].at - rows[0].at) / 60, **_growths(rows)}
            for (name, pid), rows in sorted(by_process.items())
            if len(rows) >= 4
        ]
        keys = [(at, float(count)) for at, count in self.keys if at >= seconds / 2]
        return {
            "same_process": same,
            "same_age": _same_age(self.samples, seconds),
            "store_keys": None
            if not self.keys
            else {
                "first": self.keys[0][1],
                "last": self.keys[-1][1],
                "most": max(count for _, count in self.keys),
                "growth_percent_second_half": growth(keys),
            },
        }


def _sample(at: float, name: str, pid: int) -> Sample:
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    age = time.time() - process.create_time()
    return Sample(at, name, pid, age, memory.rss, memory.pss, process.num_fds(), process.num_threads())


def growth(points: list[tuple[float, float]]) -> float | None:
    """Growth in % from the first to the last moment of (time, value) points, by the median of all slopes (Theil-Sen).

    None for fewer than four points. Single peaks do not change it.
    """
    if len(points) < 4:
        return None
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2) if b[0] > a[0]]
    middle = statistics.median(value for _, value in points)
    if not slopes or middle == 0:
        return None
    slope, span = statistics.median(slopes), points[-1][0] - points[0][0]
    begin = middle - slope * span / 2
    return 100 * slope * span / begin if begin > 0 else None


def _growths(rows: list[Sample]) -> dict[str, Any]:
    out: dict[str, Any] = {"rss_mb": rows[-1].rss / 2**20, "pss_mb": rows[-1].pss / 2**20}
    for name in FIELDS:
        out[f"{name}_growth_percent"] = growth([(row.at, float(getattr(row, name))) for row in rows])
    return out


def _same_age(samples: list[Sample], seconds: float) -> list[dict[str, Any]]:
    """Ranks that are replaced again and again: memory at equal age in the third quarter of the run and in the fourth."""
    out = []
    for name in sorted({sample.name for sample in samples if sample.name.startswith("rank")}):
        for low, high in ((30, 120), (120, 300), (300, 900), (900, 3600)):
            fits = [s for s in samples if s.name == name and low <= s.age < high]
            before = [s.rss for s in fits if seconds / 2 <= s.at < seconds * 0.75]
            after = [s.rss for s in fits if s.at >= seconds * 0.75]
            if len(before) >= 3 and len(after) >= 3:
                change = 100 * (statistics.median(after) / statistics.median(before) - 1)
                out.append({"process": name, "age_s": f"{low}-{high}", "rss_growth_percent": change})
    return out
