"""Many clients over WebSocket and HTTP with kills and restarts in between: each accepted prompt ends once, at its client."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tests.chaos.actions import RECOVER_S
from tests.chaos.api import Away
from tests.chaos.ledger import Entry
from tests.chaos.prompts import SUCCESS
from tests.chaos.report import Report, table
from tests.chaos.run import Run, Settings

SETTINGS: dict[str, Any] = {}
ACCEPT_S = 300.0  # how long a client tries to have a prompt accepted
POLL_S = 2.0  # how often a client without a WebSocket asks
END_S = 600.0
DISTURBANCES = ("kill follower", "kill rank 0", "restart")


def build_parser(common: Callable[[argparse.ArgumentParser, int], None]) -> argparse.ArgumentParser:
    """Flags of this mode."""
    parser = argparse.ArgumentParser("python -m tests.chaos clients", description=__doc__)
    common(parser, 2)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1000, help="of all clients together")
    parser.add_argument("--disturbances", type=int, default=9, help="kills of a follower, of rank 0, restarts, in turn")
    return parser


def work_of(arguments: argparse.Namespace, seed: int) -> Callable[[Settings, Report], Awaitable[dict[str, Any]]]:
    """What the command line asks for."""
    if arguments.clients < 1 or arguments.prompts < arguments.clients:
        raise ValueError(f"--prompts {arguments.prompts} must be at least --clients {arguments.clients}, and that 1")

    async def work(settings: Settings, report: Report) -> dict[str, Any]:
        async with Run(settings, report) as run:
            return await _work(run, arguments, seed)

    return work


async def _work(run: Run, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    before = len(run.ledger.entries)
    disturbing = asyncio.ensure_future(_disturb(run, arguments, before))
    shares = [arguments.prompts // arguments.clients] * arguments.clients
    for index in range(arguments.prompts % arguments.clients):
        shares[index] += 1
    begun = time.time()
    await asyncio.gather(*(_client(run, index, share, seed) for index, share in enumerate(shares)))
    seconds = time.time() - begun
    disturbing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await disturbing
    await run.finish(END_S)
    mine = [entry for entry in list(run.ledger.entries.values())[before:] if entry.made.kind == "smallest"]
    accepted = [entry for entry in mine if entry.accepted]
    for entry in accepted:
        if entry.outcome == SUCCESS and len(entry.files) != 1:
            run.report.finding("result", f"{entry} has {len(entry.files)} results, not one")
    ended = [entry for entry in accepted if entry.outcome is not None]
    return {
        "clients": arguments.clients,
        "accepted": len(accepted),
        "ended": len(ended),
        "outcomes": dict(Counter(str(entry.outcome) for entry in accepted)),
        "prompts_per_second": len(ended) / seconds,
        "faults": [
            {"kind": fault.kind, "http_away_s": fault.http_away, "right_picture_s": fault.right_picture}
            for fault in run.ledger.faults
        ],
        "slowest_http_answer_s": run.probe.longest,
    }


async def _client(run: Run, index: int, prompts: int, seed: int) -> None:
    """Posts prompts one after the other and waits for each: every second client by WebSocket, the others by asking."""
    rng = random.Random(f"{seed}/client/{index}")
    page = run.add_page() if index % 2 == 0 else None
    client = page.id if page is not None else f"client{index}of{seed}"
    for _ in range(prompts):
        told = asyncio.Event()

        def watch(kind: str, data: dict[str, Any], told: asyncio.Event = told) -> None:
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                told.set()

        picture = rng.randrange(8)
        try:
            entry = await run.post_patiently(client, lambda p=picture: run.prompts.smallest(p), ACCEPT_S, watch=watch)
        except TimeoutError as error:
            run.report.finding("refused", f"client {index}: {error}")
            return
        if page is not None:
            await _either(told, entry)
        else:
            await _ask(run, entry)


async def _either(told: asyncio.Event, entry: Entry) -> None:
    """Until the page was told the end, or the history has it (the page may have been away when it was told)."""
    waits = [asyncio.ensure_future(event.wait()) for event in (told, entry.done)]
    _, pending = await asyncio.wait(waits, timeout=END_S, return_when="FIRST_COMPLETED")
    for wait in pending:
        wait.cancel()


async def _ask(run: Run, entry: Entry) -> None:
    """Ask for the history of the prompt until it is there, as a client without a WebSocket does."""
    end = time.monotonic() + END_S
    while time.monotonic() < end and not entry.done.is_set():
        with contextlib.suppress(Away, RuntimeError):
            found = await run.api.get(f"/history/{entry.id}")
            if entry.id in found and found[entry.id]["prompt"][1] == entry.id:
                return
        await asyncio.sleep(POLL_S)


async def _disturb(run: Run, arguments: argparse.Namespace, before: int) -> None:
    """Kill and restart at equal distances of ended prompts."""
    for turn in range(arguments.disturbances):
        due = arguments.prompts * (turn + 1) / (arguments.disturbances + 1)
        while sum(e.outcome is not None for e in list(run.ledger.entries.values())[before:]) < due:
            await asyncio.sleep(0.2)
        kind = DISTURBANCES[turn % len(DISTURBANCES)]
        if kind == "restart":
            fault = await run.restart()
        else:
            fault = await run.kill(0 if kind == "kill rank 0" else 1 + turn % (run.settings.ranks - 1))
        await run.right_picture(fault, RECOVER_S)
        run.report.say(f"{fault.kind}: right picture after {fault.right_picture or -1:.1f} s")


def lines(summary: dict[str, Any]) -> list[str]:
    """The summary as text."""
    faults = [[f["kind"], f["http_away_s"], f["right_picture_s"]] for f in summary["faults"]]
    return [
        f"{summary['clients']} clients: {summary['accepted']} prompts accepted, {summary['ended']} ended "
        f"{summary['outcomes']}; {summary['prompts_per_second']:.1f} prompts a second; "
        f"slowest HTTP answer {summary['slowest_http_answer_s']:.2f} s",
        *table(["fault", "HTTP away s", "picture s"], faults),
    ]
