"""A run: server, pages, the record of all prompts, and the checks that are made all the time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.chaos import ledger as rules
from tests.chaos.api import Api, Away
from tests.chaos.disk import Disk
from tests.chaos.ledger import TERMINALS, Entry, Fault, Ledger, Watcher
from tests.chaos.pages import Page
from tests.chaos.pictures import Pictures
from tests.chaos.probe import Probe
from tests.chaos.program import Program, make_base
from tests.chaos.prompts import BIG, REFUSED, SUCCESS, Made, Prompts, named
from tests.chaos.report import Report

MISSING_S = 4.0  # how long a prompt may be neither in the queue nor in the history before it counts as gone
LATE_S = 10.0  # how long after its end the messages of a prompt are looked at
TRIM = 20  # old entries of the history are deleted so many at a time
HANG_S = 150.0  # nothing ended for so long although prompts wait


@dataclass(frozen=True)
class Settings:
    """What all kinds of runs share.

    `persistence`: whether the queue must survive the end of rank 0; `keep_history`: entries that the server's history
    keeps, None: all.
    """

    ranks: int
    out: str
    gpu: bool = False
    models: str | None = None
    workflow: str | None = None
    persistence: bool = True
    tolerance: int = 1
    start_s: float = 120.0
    sweep_s: float = 1.0
    probe_s: float = 0.5
    small_disk: bool = False
    keep_history: int | None = None


class Run:
    """Use it as an asynchronous context manager: inside, the server answers and the reference picture is known."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings, self.report = settings, report
        self.ledger = Ledger()
        self.prompts = Prompts(settings.workflow)
        self.pages: list[Page] = []
        self._scratch = tempfile.mkdtemp(prefix="taco_chaos_")
        self.base = os.path.join(self._scratch, "base")
        self.program = Program(self.base, settings.ranks, os.path.join(report.folder, "server.log"), settings.gpu)
        self.api: Api
        self.probe = Probe(self.program.port, lambda: self._rank_0, settings.probe_s)
        self.pictures = Pictures(self.program.output, settings.tolerance)
        self.disk = Disk(self.program.output)
        self._tasks: list[asyncio.Task[None]] = []
        self._late: deque[tuple[float, Entry]] = deque()
        self._last_end = time.time()
        self._judged_absences = 0
        self._kept: list[Entry] = []  # ended ones that the history of the server may still have
        self._rank_0: int | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Run:
        try:
            await self._set_up()
        except BaseException:  # Ctrl-C too
            await self.__aexit__()
            raise
        return self

    async def _set_up(self) -> None:
        self.api = Api(self.program.port)
        await asyncio.to_thread(make_base, self.base, self.settings.models)
        if self.settings.small_disk:
            self.disk.mount()
        self.program.start()
        await self.wait_ready()
        self.probe.start()
        self.add_page()
        for work in (self._sweeps, self._watch_program):
            self.background(work())
        for _ in range(2):
            first = await self.post(self.pages[0].id, self.prompts.reference())
            if first is None:
                raise RuntimeError(f"the reference prompt was not accepted\n{self.program.tail()}")
            await asyncio.wait_for(first.done.wait(), self.settings.start_s * 2)
            if first.outcome != SUCCESS:
                raise RuntimeError(f"the reference prompt ended with {first.outcome}\n{self.program.tail()}")
        self.report.say(f"the server with {self.settings.ranks} ranks answers, and the reference picture is known")

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(page.close() for page in self.pages))
        if self.probe.answers:
            await asyncio.to_thread(self.probe.stop)
        if not await self.program.stop():
            self.report.finding("end", "the server did not end within 30 s of SIGTERM and was killed")
        await self.api.close()
        self.disk.unmount()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def background(self, work: Any) -> None:
        """Do something until the run ends; an error in it is a finding of kind `tool`."""

        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - a check that ends unnoticed would find nothing more
                self.report.finding("tool", f"{type(error).__name__}: {error}")

        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.get_running_loop().create_task(guarded()))

    def add_page(self) -> Page:
        """Open a page."""
        page = Page(self.program.port, self._take_message)
        page.open()
        self.pages.append(page)
        return page

    async def wait_ready(self) -> None:
        """Until HTTP answers. Raises RuntimeError when the program ends before, or needs longer than `start_s`."""
        end = time.monotonic() + self.settings.start_s
        while time.monotonic() < end:
            with contextlib.suppress(Away, RuntimeError):
                await self.api.get("/prompt", timeout=2)
                return
            if self.program.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.program.poll()}\n{self.program.tail()}")
            await asyncio.sleep(0.1)
        raise RuntimeError(f"no answer within {self.settings.start_s} s of the start\n{self.program.tail()}")

    async def pid(self, rank: int, seconds: float = 60.0) -> int:
        """Process id of a rank, waiting for it while it is being replaced. Raises RuntimeError after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.program.rank_pids()
            if rank in found:
                return found[rank]
            await asyncio.sleep(0.05)
        raise RuntimeError(f"rank {rank} has had no process for {seconds:.0f} s")

    # --- prompts ---------------------------------------------------------------------------------------------------

    async def post(self, client: str, made: Made, front: bool = False, watch: Watcher | None = None) -> Entry | None:
        """Post a prompt; its entry, or None when it was not accepted (which is judged here).

        `watch(type, data)` gets each message about it.
        """
        entry = self.ledger.new(made, client)
        if watch is not None:
            entry.watchers.append(watch)
        body: dict[str, Any] = {"prompt": named(made.prompt, entry.prefix), "client_id": client, "prompt_id": entry.id}
        if front:
            body["front"] = True
        try:
            status, content = await self.api.call("POST", "/prompt", body)
        except Away as away:
            self.report.counts["POST without an answer" if away.sent else "POST without a connection"] += 1
            if away.sent:
                entry.unanswered = True
                self.ledger.open[entry.id] = entry
            else:
                self.ledger.forget(entry)
            if self.ledger.forgotten(entry.posted, time.time()) is None:
                self.report.finding("http", f"POST of {entry} had no answer: {away}")
            return None
        self.report.record("post", number=entry.number, id=entry.id, kind=made.kind, client=client, status=status)
        self.report.counts[f"posted: {made.kind}"] += 1
        if status == 200:
            entry.accepted = time.time()
            self.ledger.open[entry.id] = entry
            self.report.counts["accepted"] += 1
            if made.ends == {REFUSED}:
                self.report.finding("accepted", f"{entry} cannot run, but was accepted")
            return entry
        entry.outcome = REFUSED
        self.report.counts["refused"] += 1
        excused = self.ledger.excuse(entry.posted, time.time()) is not None and status >= 500
        if (REFUSED not in made.ends or status >= 500) and not excused:
            self.report.finding("refused", f"{entry} was answered {status}: {content[:300]!r}")
        return None

    async def post_patiently(
        self, client: str, made: Callable[[], Made], seconds: float, front: bool = False, watch: Watcher | None = None
    ) -> Entry:
        """Post until one is accepted. Raises TimeoutError after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = await self.post(client, made(), front, watch)
            if entry is not None:
                return entry
            await asyncio.sleep(0.1)
        raise TimeoutError(f"no prompt was accepted within {seconds} s")

    def _take_message(self, page: Page, message: dict[str, Any]) -> None:
        data, kind = message.get("data"), message.get("type")
        entry = self.ledger.entries.get(str(data.get("prompt_id"))) if isinstance(data, dict) else None
        if entry is None:
            return
        if entry.client != page.id:
            if kind != "execution_interrupted":
                self.report.finding("wrong client", f"{kind} of {entry} went to page {page.id}, not to {entry.client}")
            return
        if kind in TERMINALS:
            entry.messages.append((time.time(), TERMINALS[kind]))
            self.report.record("message", number=entry.number, kind=kind)
            if entry.outcome == rules.REMOVED:
                self.report.finding("ended twice", f"{entry} {rules.repeated(self.ledger, entry)}")
        elif kind == "executed":
            images = (data.get("output") or {}).get("images") or ()
            foreign = [i["filename"] for i in images if i.get("type") == "output" and entry.prefix not in i["filename"]]
            if foreign:
                self.report.finding("wrong result", f"executed of {entry} names {foreign}")
        for watcher in entry.watchers:
            watcher(str(kind), data)

    # --- checks all the time ---------------------------------------------------------------------------------------

    async def _sweeps(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            with contextlib.suppress(Away):
                await self._sweep()
                await self._trim_history()
            self._look_at_late_messages()
            self._judge_absences()
            await self._look_for_hang()

    async def _sweep(self) -> None:
        """Compare what we know with queue and history. The queue first: prompts move from there to the history."""
        begun = time.time()
        if not self.ledger.open:
            return
        queue = await self.api.get("/queue")
        running = {item[1] for item in queue["queue_running"]}
        waiting = {item[1] for item in queue["queue_pending"]}
        for entry in list(self.ledger.open.values()):
            if entry.id in running:
                entry.seen_running = entry.seen_running or time.time()
            if entry.id in running or entry.id in waiting:
                entry.missing_since = None
                if entry.unanswered:
                    entry.unanswered, entry.accepted = False, time.time()
                    self.report.counts["accepted without an answer"] += 1
                continue
            if (entry.accepted or entry.posted) > begun:
                continue
            found = await self.api.get(f"/history/{entry.id}")
            if entry.id in found:
                await self._settle(entry, found[entry.id])
            elif self.ledger.forgotten(begun, time.time()) is None:
                self._missing(entry)

    async def _settle(self, entry: Entry, found: dict[str, Any]) -> None:
        outcome, wrong = rules.judge(self.ledger, entry, found["status"])
        problems = [] if wrong is None else [wrong]
        if outcome == SUCCESS:
            problems += await asyncio.to_thread(self.pictures.check, entry, found["outputs"])
            extra = set(await asyncio.to_thread(self.pictures.of, entry)) - set(entry.files)
            if extra and self.ledger.forgotten(entry.posted, time.time()) is None:
                problems.append(f"saved {sorted(extra)}, which its result does not name: it ran twice")
        self._close(entry, outcome)
        for problem in problems:
            self.report.finding("prompt", f"{entry} {problem}")
        if not problems:
            await asyncio.to_thread(self.pictures.delete, entry)

    def _missing(self, entry: Entry) -> None:
        """It is neither in the queue nor in the history."""
        now = time.time()
        entry.missing_since = entry.missing_since or now
        if now - entry.missing_since < MISSING_S:
            return
        forgotten = None if entry.accepted is None else self.ledger.forgotten(entry.accepted, now)
        lost = forgotten is not None and not self.settings.persistence
        if lost and entry.messages:  # it ended, and the history was lost
            entry.files = self.pictures.of(entry)
            self._close(entry, entry.messages[-1][1])
        elif entry.removed is not None:
            self._close(entry, rules.REMOVED)
        elif entry.unanswered:
            self._close(entry, "never accepted")
        elif lost:
            self._close(entry, rules.LOST)
        else:
            self._close(entry, "gone")
            cause = f" after {forgotten.kind}" if forgotten else ""
            told = f"; its page was told {entry.messages}" if entry.messages else ""
            self.report.finding("lost", f"{entry} was accepted and is neither in queue nor history{cause}{told}")

    def _close(self, entry: Entry, outcome: str) -> None:
        self.ledger.settle(entry, outcome)
        self._last_end = time.time()
        self._late.append((time.time() + LATE_S, entry))
        self._kept.append(entry)
        entry.made = replace(entry.made, prompt={})  # of two hours, among them big ones
        self.report.counts[f"ended: {outcome}"] += 1
        seconds = round(entry.ended - entry.posted, 3) if entry.ended else None
        self.report.record("ended", number=entry.number, kind=entry.made.kind, outcome=outcome, seconds=seconds)

    def _look_at_late_messages(self, all_of_them: bool = False) -> None:
        while self._late and (all_of_them or self._late[0][0] < time.time()):
            _, entry = self._late.popleft()
            problem = rules.repeated(self.ledger, entry)
            page = next((page for page in self.pages if page.id == entry.client), None)
            connected = page is not None and page.since is not None and page.since < entry.posted
            if problem is None and connected and not entry.messages and entry.outcome in TERMINALS.values():
                problem = f"ended with {entry.outcome}, but its page was connected all the time and was told nothing"
            if problem is not None:
                self.report.finding("end message", f"{entry} {problem}")

    def _judge_absences(self) -> None:
        absences = self.probe.absences[self._judged_absences :]
        self._judged_absences += len(absences)
        for absence in absences:
            self.report.record("http absence", seconds=round(absence.seconds, 3), stalled=round(absence.stalled, 3))
            if self.ledger.forgotten(absence.start, absence.end) is not None:
                continue
            if absence.busy:
                self.report.counts["HTTP late because processors were busy"] += 1
            else:
                self.report.finding("http", f"no answer for {absence.seconds:.2f} s while rank 0 lived")

    async def _look_for_hang(self) -> None:
        recent = max([self._last_end, *(fault.end or fault.start for fault in self.ledger.faults[-3:])])
        if not self.ledger.open or time.time() - recent < HANG_S:
            return
        self._last_end = time.time()
        self.report.finding("hang", f"nothing ended for {HANG_S:.0f} s, {len(self.ledger.open)} prompts are open")
        self.report.record("console", text=self.program.tail(60))
        try:
            await self.restart("restart because nothing ended")
        except RuntimeError as error:
            self.report.finding("start", str(error))

    async def _watch_program(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._rank_0 = (await asyncio.to_thread(self.program.rank_pids)).get(0)
            if self.program.poll() is not None and not self.program.expected_to_end:
                self.report.finding("program ended", f"status {self.program.poll()}: {self.program.last_words()}")
                self.report.record("console", text=self.program.tail(60))
                fault = self.ledger.fault("end of the program", ends_prompts=True, forgets=True)
                self.program.start()
                try:
                    await self.wait_ready()
                except RuntimeError as error:
                    self.report.finding("start", str(error))
                    await asyncio.sleep(5)
                fault.end = time.time()

    async def _trim_history(self) -> None:
        """Delete old entries, and big ones at once: rank 0's memory must not grow with what a history keeps."""
        self._kept = [entry for entry in self._kept if entry.outcome != rules.REMOVED]
        keep = self.settings.keep_history
        if keep is None:
            return
        old = self._kept[: max(0, len(self._kept) - keep)]
        old += [entry for entry in self._kept[len(old) :] if entry.made.kind == BIG]
        if len(old) >= TRIM or any(entry.made.kind == BIG for entry in old):
            await self.api.post("/history", {"delete": [entry.id for entry in old]})
            self._kept = [entry for entry in self._kept if entry not in old]

    # --- faults ----------------------------------------------------------------------------------------------------

    async def kill(self, rank: int) -> Fault:
        """SIGKILL to a rank; the fault is over when the next process answers (rank 0) or at once (followers)."""
        pid = await self.pid(rank)
        waiting = await self._surely_waiting()
        fault = self.ledger.fault(f"kill of rank {rank}", ends_prompts=True, forgets=rank == 0, rank=rank)
        fault.waiting = waiting
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.report.counts[fault.kind] += 1
        if rank:
            fault.end = fault.start
        else:
            self.background(self._until_back(fault, pid))
        return fault

    async def _surely_waiting(self) -> frozenset[str]:
        """Ids of prompts that wait, but for the next one, which may begin at any moment."""
        with contextlib.suppress(Away, RuntimeError):
            queue = await self.api.get("/queue", timeout=2)
            return frozenset(item[1] for item in sorted(queue["queue_pending"], key=lambda item: item[0])[1:])
        return frozenset()

    async def _until_back(self, fault: Fault, pid: int) -> None:
        while True:
            with contextlib.suppress(Away, RuntimeError):
                await self.api.get("/prompt", timeout=2)
                if self.program.rank_pids().get(0, pid) != pid:
                    fault.end = time.time()
                    return
            await asyncio.sleep(0.1)

    async def restart(self, kind: str = "restart") -> Fault:
        """SIGTERM, and start again; returns when it answers."""
        waiting = await self._surely_waiting()
        fault = self.ledger.fault(kind, ends_prompts=True, forgets=True)
        fault.waiting = waiting
        self.report.counts[kind] += 1
        if not await self.program.stop():
            self.report.finding("end", "the server did not end within 30 s of SIGTERM and was killed")
        self.program.start()
        await self.wait_ready()
        fault.end = time.time()
        fault.http_away = fault.end - fault.start
        return fault

    async def right_picture(self, fault: Fault, seconds: float) -> None:
        """Post references before all others until one ends with the right picture; note when in the fault."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                entry = await self.post_patiently(self.pages[0].id, self.prompts.reference, seconds, front=True)
                await asyncio.wait_for(entry.done.wait(), max(1.0, end - time.monotonic()))
            except TimeoutError:
                break
            if entry.outcome == SUCCESS and entry.ended is not None:
                fault.right_picture = entry.ended - fault.start
                fault.http_away = self.probe.absence_after(fault.start)
                self.report.record("recovered", **vars(fault))
                return
        self.report.finding("recovery", f"no right picture within {seconds:.0f} s of {fault.kind}")

    async def finish(self, seconds: float) -> None:
        """Wait until every accepted prompt has ended; those that have not by then are findings."""
        end = time.monotonic() + seconds
        while self.ledger.open and time.monotonic() < end:
            await asyncio.sleep(0.2)
        for entry in list(self.ledger.open.values()):
            self.report.finding("lost", f"{entry} has not ended {seconds:.0f} s after the last action")
        await asyncio.sleep(2.0)  # messages on their way
        self._look_at_late_messages(all_of_them=True)
        self._judge_absences()
