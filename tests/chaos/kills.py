"""kill -9 of each rank in turn, in each phase of a prompt: how long HTTP is away and when the next right picture comes."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from tests.chaos.ledger import LOST, Entry, Fault
from tests.chaos.prompts import ERROR, SUCCESS
from tests.chaos.report import Report, table
from tests.chaos.run import Run, Settings

PHASES = ("idle", "loading", "sampling", "decoding")
SETTINGS = {"probe_s": 0.1, "sweep_s": 0.25}
PHASE_S = 120.0  # how long a prompt may take to reach its phase
PENDING = 2


@dataclass
class Killed:
    """One kill. Seconds from the kill; `victim`: how the prompt that ran ended; `hit`: whether it was hit in its phase."""

    rank: int
    phase: str
    http_away: float
    picture: float | None
    victim: str
    hit: bool


def build_parser(common: Callable[[argparse.ArgumentParser, int], None]) -> argparse.ArgumentParser:
    """Flags of this mode."""
    parser = argparse.ArgumentParser("python -m tests.chaos kills", description=__doc__)
    common(parser, 3)
    parser.add_argument("--times", type=int, default=20, help="kills of each rank; phases take turns")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: all four)")
    parser.add_argument("--http-follower", type=float, default=1.0, help="HTTP may be away, s, when a follower dies")
    parser.add_argument("--http-rank0", type=float, default=10.0, help="the same when rank 0 dies")
    parser.add_argument("--picture-follower", type=float, default=8.0, help="next right picture, s after a follower")
    parser.add_argument("--picture-rank0", type=float, default=12.0, help="the same after rank 0")
    parser.add_argument("--wait", type=float, default=300.0, help="longest wait for a right picture, s")
    return parser


def work_of(arguments: argparse.Namespace, seed: int) -> Callable[[Settings, Report], Awaitable[dict[str, Any]]]:
    """What the command line asks for. Raises ValueError for a phase that does not exist."""
    phases = [phase for phase in arguments.phases.split(",") if phase]
    unknown = [phase for phase in phases if phase not in PHASES]
    if unknown or not phases:
        raise ValueError(f"--phases {arguments.phases}: use some of {', '.join(PHASES)}")

    async def work(settings: Settings, report: Report) -> dict[str, Any]:
        async with Run(settings, report) as run:
            rows = [
                await _one(run, rank, phases[turn % len(phases)], arguments)
                for turn in range(arguments.times)
                for rank in range(settings.ranks)
            ]
            await run.finish(arguments.wait)
            return {"kills": [asdict(row) for row in rows], "pictures_compared": run.pictures.compared}

    return work


async def _one(run: Run, rank: int, phase: str, limits: argparse.Namespace) -> Killed:
    victim: Entry | None = None
    pending: list[Entry] = []
    reached = asyncio.Event()
    page = run.pages[0]
    if phase == "loading":
        await run.api.post("/free", {"unload_models": True, "free_memory": True})
        await asyncio.sleep(0.5)
    if phase != "idle":
        made = run.prompts.long(2.0 if phase == "sampling" else 0.3, decode_more=phase == "decoding")
        victim = await _accepted(run, made, phase, reached)
        for _ in range(PENDING):
            entry = await run.post(page.id, run.prompts.reference())
            if entry is not None:
                pending.append(entry)
        try:
            await asyncio.wait_for(reached.wait(), PHASE_S)
        except TimeoutError:
            run.report.finding("phase", f"no prompt reached {phase} within {PHASE_S:.0f} s")
    fault = await run.kill(rank)
    await run.right_picture(fault, limits.wait)
    await _ended(run, [*pending, *([victim] if victim else [])], limits.wait)
    pictures = [fault.right_picture] + [
        entry.ended - fault.start
        for entry in pending
        if entry.outcome == SUCCESS and entry.ended and entry.ended > fault.start
    ]
    times = [seconds for seconds in pictures if seconds is not None]
    hit = victim is None or victim.ended is None or victim.ended >= fault.start
    row = Killed(
        rank, phase, run.probe.absence_after(fault.start), min(times, default=None),
        "-" if victim is None else str(victim.outcome), hit,
    )  # fmt: skip
    run.report.record("killed", **asdict(row))
    shown = "none" if row.picture is None else f"{row.picture:.1f} s"
    run.report.say(f"rank {rank}, {phase}: HTTP away {row.http_away:.1f} s, right picture after {shown}")
    _judge(run, row, fault, pending, limits)
    return row


async def _accepted(run: Run, made: Any, phase: str, reached: asyncio.Event) -> Entry | None:
    """Post the prompt that will be hit; `reached` is set when it is in its phase."""
    classes = {name: entry["class_type"] for name, entry in made.prompt.items()}

    def look(kind: str, data: dict[str, Any]) -> None:
        running = classes.get(str(data.get("node")), "")
        now = {
            "loading": kind == "executing" and "Load" in running,
            "sampling": kind == "progress" and "Sampl" in running and 1 <= data["value"] < data["max"],
            "decoding": (kind == "executing" and "Decode" in running)
            or (kind == "progress" and "Sampl" in running and data["value"] == data["max"]),
        }
        if now[phase]:
            reached.set()

    return await run.post(run.pages[0].id, made, watch=look)


async def _ended(run: Run, entries: list[Entry], seconds: float) -> None:
    waits = [asyncio.wait_for(entry.done.wait(), seconds) for entry in entries]
    results = await asyncio.gather(*waits, return_exceptions=True)
    for entry, result in zip(entries, results):
        if isinstance(result, TimeoutError):
            run.report.finding("lost", f"{entry} has not ended {seconds:.0f} s after the kill")


def _judge(run: Run, row: Killed, fault: Fault, pending: list[Entry], limits: argparse.Namespace) -> None:
    http, picture = (
        (limits.http_follower, limits.picture_follower) if row.rank else (limits.http_rank0, limits.picture_rank0)
    )
    where = f"rank {row.rank} killed while {row.phase}"
    if row.http_away > http:
        run.report.finding("limit", f"{where}: HTTP was away for {row.http_away:.1f} s, not at most {http:g} s")
    if row.picture is not None and row.picture > picture:
        run.report.finding("limit", f"{where}: right picture after {row.picture:.1f} s, not at most {picture:g} s")
    lost = {LOST} if not run.settings.persistence and run.ledger.forgotten(fault.start, time.time()) else set()
    for index, entry in enumerate(pending):
        # the first one ran already when the kill came after the end of the prompt before it
        allowed = {SUCCESS, *lost, *([] if row.hit or index else [ERROR])}
        if entry.outcome not in allowed:
            run.report.finding("pending", f"{where}: {entry}, which waited, ended with {entry.outcome}")
    if not row.hit:
        run.report.counts["kills that came after the end of the prompt"] += 1


def lines(summary: dict[str, Any]) -> list[str]:
    """The table, and the most of each column by kind of rank."""
    kills = summary["kills"]
    rows = [
        [k["rank"], k["phase"], k["http_away"], k["picture"], k["victim"], "yes" if k["hit"] else "no"] for k in kills
    ]
    out = table(["rank", "phase", "HTTP away s", "picture s", "prompt that ran", "hit"], rows)
    for name, group in (
        ("rank 0", [k for k in kills if k["rank"] == 0]),
        ("followers", [k for k in kills if k["rank"]]),
    ):
        pictures = [k["picture"] for k in group if k["picture"] is not None]
        if pictures:
            away = max(k["http_away"] for k in group)
            out.append(
                f"{name}: {len(group)} kills, HTTP away at most {away:.2f} s, picture at most {max(pictures):.2f} s"
            )
    return out
