"""The long run: random actions at a pace, reference pictures in between, measurements all the time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from typing import Any

from tests.chaos.actions import RECOVER_S, Actions, perform
from tests.chaos.measure import EVERY_S, Measurements
from tests.chaos.report import Report, table
from tests.chaos.run import Run, Settings

PAGES = 4
BACKLOG = 12  # prompts that may be open before the next action waits


async def soak(
    settings: Settings,
    report: Report,
    minutes: float,
    seed: int,
    pace: float = 2.0,
    without: frozenset[str] = frozenset(),
    reference_every: int = 50,
    kills_until: float | None = None,
    every: float = EVERY_S,
) -> dict[str, Any]:
    """Run for `minutes` and return the summary. `kills_until`: minutes after which no rank is killed or restarted."""
    async with Run(settings, report) as run:
        for _ in range(PAGES - 1):
            run.add_page()
        if "disk" not in without and run.disk.possible:
            report.say(f"no full disk: {run.disk.possible}")
        measurements = Measurements(run)
        run.background(measurements.take_for_ever(every))
        wild = Actions(run, seed, without)
        calm = Actions(run, seed, without | {"kills", "restarts"})
        begun = time.time()
        number, next_reference = 0, reference_every
        try:
            while time.time() - begun < minutes * 60:
                over = kills_until is not None and time.time() - begun > kills_until * 60
                await perform(run, number, calm if over else wild)
                number += 1
                if run.report.counts["accepted"] >= next_reference:
                    next_reference += reference_every
                    await run.post(run.pages[0].id, run.prompts.reference())
                await asyncio.sleep(random.Random(f"{seed}/pace/{number}").expovariate(1 / pace))
                await _backlog(run, begun + minutes * 60)
            report.say(f"{number} actions are done; waiting for the prompts that are left")
            await run.finish(RECOVER_S)
        except asyncio.CancelledError:
            report.finding("tool", "ended by a signal before its time; the figures are those until then")
        finally:
            wild.close()
            calm.close()
        return {"actions": number, **_summary(run, measurements, time.time() - report.begun)}


async def _backlog(run: Run, end: float) -> None:
    while len(run.ledger.open) > BACKLOG and time.time() < end:
        await asyncio.sleep(0.2)


def _summary(run: Run, measurements: Measurements, seconds: float) -> dict[str, Any]:
    faults: dict[str, Any] = {}
    for kind in sorted({fault.kind for fault in run.ledger.faults}):
        same = [fault for fault in run.ledger.faults if fault.kind == kind]
        faults[kind] = {
            "times": len(same),
            "right_picture_s": _spread([f.right_picture for f in same]),
            "http_away_s": _spread([f.http_away for f in same]),
        }
    with contextlib.suppress(ZeroDivisionError):
        run.report.record("rate", prompts_per_minute=60 * len(run.ledger.entries) / seconds)
    return {
        "pictures_compared": run.pictures.compared,
        "furthest_picture": run.pictures.furthest,
        "slowest_http_answer_s": run.probe.longest,
        "faults": faults,
        **measurements.summary(seconds),
    }


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "most": max(known)} if known else None


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary as text."""
    out = [
        f"{summary['actions']} actions; {summary['pictures_compared']} pictures compared, the furthest differs by "
        f"{summary['furthest_picture']}/255; slowest HTTP answer {summary['slowest_http_answer_s']:.2f} s",
        "",
        "Faults (seconds):",
        *table(["fault", "times", "picture median", "most", "HTTP away median", "most"], _fault_rows(summary)),
        "",
        "Growth in the second half, same process (%):",
        *table(
            ["process", "pid", "minutes", "RSS MB", "RSS", "PSS", "files", "threads"],
            [
                [row["process"], row["pid"], row["minutes"], row["rss_mb"]]
                + [row[f"{name}_growth_percent"] for name in ("rss", "pss", "files", "threads")]
                for row in summary["same_process"]
            ],
        ),
        "",
        "Growth of RSS from the third quarter to the fourth at equal age of replaced processes (%):",
        *table(
            ["process", "age s", "RSS"],
            [[row["process"], row["age_s"], row["rss_growth_percent"]] for row in summary["same_age"]],
        ),
        "",
    ]
    keys = summary["store_keys"]
    out.append("Keys of the control store: " + ("not in the status" if keys is None else str(keys)))
    return out


def _fault_rows(summary: dict[str, Any]) -> list[list[Any]]:
    rows = []
    for kind, fault in summary["faults"].items():
        spreads = [fault[name] or {"median": None, "most": None} for name in ("right_picture_s", "http_away_s")]
        rows.append([kind, fault["times"], *(spread[name] for spread in spreads for name in ("median", "most"))])
    return rows
