"""Every prompt that was posted, what is known of it, and the rules of how it may end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.prompts import ERROR, INTERRUPTED, SUCCESS, Made

SLACK_S = 1.0  # a fault and a prompt count as simultaneous within this time
Watcher = Callable[[str, dict[str, Any]], Any]
REMOVED, LOST = "removed", "lost with rank 0"
TERMINALS = {"execution_success": SUCCESS, "execution_error": ERROR, "execution_interrupted": INTERRUPTED}


@dataclass
class Fault:
    """Something done to the server. `end` is when it was over, None while it lasts; times in seconds since 1970.

    `ends_prompts`: the prompt that runs meanwhile may fail; `forgets`: rank 0's memory is lost.
    """

    kind: str
    start: float
    ends_prompts: bool
    forgets: bool = False
    rank: int | None = None
    end: float | None = None
    http_away: float | None = None  # s
    waiting: frozenset[str] = frozenset()  # ids of prompts that surely waited when it began
    right_picture: float | None = None  # s from its start to the end of the next prompt with the right picture

    def overlaps(self, start: float, end: float) -> bool:
        """Whether it happened within a span of time, with slack."""
        own_end = self.end if self.end is not None else time.time()
        return self.start - SLACK_S <= end and own_end + SLACK_S >= start


@dataclass
class Entry:
    """One prompt."""

    number: int
    made: Made
    client: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    posted: float = field(default_factory=time.time)
    accepted: float | None = None  # when POST was answered with 200
    unanswered: bool = False  # POST had no answer: it may have been accepted or not
    cancelled: float | None = None  # when a cancel was requested that may have been meant for it
    removed: float | None = None  # when it was (possibly) taken out of the queue
    surely_removed: bool = False  # it was seen waiting after that was answered
    outcome: str | None = None
    started: float | None = None
    ended: float | None = None
    messages: list[tuple[float, str]] = field(default_factory=list)  # ends that its page was told
    missing_since: float | None = None
    files: list[str] = field(default_factory=list)
    seen_running: float | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: list[Watcher] = field(default_factory=list)  # get its page's messages

    @property
    def prefix(self) -> str:
        return f"c{self.number:06d}x"

    def __str__(self) -> str:
        return f"prompt {self.number} ({self.made.kind}, {self.id[:8]})"


class Ledger:
    """All prompts of a run by id. `open` are those whose end is not known yet."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.open: dict[str, Entry] = {}
        self.faults: list[Fault] = []
        self._numbers = 0

    def new(self, made: Made, client: str) -> Entry:
        """A prompt about to be posted."""
        self._numbers += 1
        entry = Entry(self._numbers, made, client)
        self.entries[entry.id] = entry
        return entry

    def forget(self, entry: Entry) -> None:
        """It never reached the server."""
        self.entries.pop(entry.id)

    def settle(self, entry: Entry, outcome: str) -> None:
        """Its end is known."""
        entry.outcome = outcome
        self.open.pop(entry.id, None)
        entry.done.set()

    def fault(self, kind: str, **more: Any) -> Fault:
        """A fault that begins now."""
        fault = Fault(kind, time.time(), **more)
        self.faults.append(fault)
        return fault

    def excuse(self, start: float, end: float) -> Fault | None:
        """A fault because of which a prompt that ran from `start` to `end` may have failed."""
        return next((f for f in self.faults if f.ends_prompts and f.overlaps(start, end)), None)

    def forgotten(self, start: float, end: float) -> Fault | None:
        """A fault between two times because of which rank 0 lost its memory."""
        return next((f for f in self.faults if f.forgets and f.overlaps(start, end)), None)

    def may_be_removed(self, entries: Iterable[Entry]) -> None:
        """These are about to be taken out of the queue, or may be."""
        for entry in entries:
            entry.removed = entry.removed or time.time()


def judge(ledger: Ledger, entry: Entry, status: dict[str, Any]) -> tuple[str, str | None]:
    """Outcome of a prompt that the history has with this `status`, and what is wrong with it or None."""
    messages = dict(status.get("messages") or [])
    entry.started, entry.ended = span(entry, messages)
    outcome, text = SUCCESS if status["status_str"] == "success" else ERROR, ""
    if "execution_interrupted" in messages:
        outcome = INTERRUPTED
    elif outcome == ERROR:
        text = str(messages.get("execution_error", {}).get("exception_message", ""))
    fault = ledger.excuse(entry.started, entry.ended)
    if outcome in (ERROR, INTERRUPTED) and "execution_start" not in messages and entry.cancelled is None:
        waited = next((f for f in ledger.faults if entry.id in f.waiting), None)
        if waited is not None:
            return outcome, f"waited at the {waited.kind} and never ran: it ended with {outcome}: {text.strip()[:200]}"
    if entry.surely_removed and entry.removed and entry.started > entry.removed + SLACK_S:
        return outcome, "ran although it had been taken out of the queue"
    if outcome == INTERRUPTED:
        allowed = fault is not None or (entry.cancelled is not None and entry.cancelled <= entry.ended + SLACK_S)
        return outcome, None if allowed else "was interrupted, but nobody cancelled it"
    if outcome not in entry.made.ends and not (outcome == ERROR and fault is not None):
        why = f": {text.strip()[:300]}" if text else ""
        return outcome, f"ended with {outcome}{why}, without a fault while it ran"
    if outcome == ERROR and entry.made.text and entry.made.text not in text and fault is None:
        return outcome, f"its error is {text.strip()[:300]!r}, not {entry.made.text!r}"
    return outcome, None


def span(entry: Entry, messages: dict[str, Any]) -> tuple[float, float]:
    """When a prompt began and ended to run, from its messages' timestamps, or what was seen of it."""
    start = messages.get("execution_start", {}).get("timestamp")
    ends = [messages[kind].get("timestamp") for kind in TERMINALS if kind in messages]
    begun = start / 1000 if start else entry.posted
    if entry.seen_running is not None and entry.seen_running < begun:
        begun = entry.seen_running  # it ran before, in processes that have ended
    return begun, ends[0] / 1000 if ends and ends[0] else time.time()


def repeated(ledger: Ledger, entry: Entry) -> str | None:
    """What is wrong with the ends that a prompt's page was told: more than one, or another than the history's.

    A prompt whose end was told just before rank 0 ended may run again after that: its end was not stored yet.
    """
    kinds = [kind for _, kind in entry.messages]
    if len(kinds) > 1 and not ledger.forgotten(entry.messages[0][0], entry.messages[-1][0]):
        return f"ended {len(kinds)} times: {kinds}"
    known = entry.outcome in (SUCCESS, ERROR, INTERRUPTED)
    if known and kinds and kinds[-1] != entry.outcome and not ledger.forgotten(*[entry.messages[-1][0]] * 2):
        return f"its page was told {kinds[-1]}, the history says {entry.outcome}"
    if kinds and entry.outcome == REMOVED:
        return f"was taken out of the queue, but its page was told {kinds[-1]}"
    return None
