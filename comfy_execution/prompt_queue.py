"""Prompts waiting, running and done, in memory and, with a `PromptStore`, on disk."""

from __future__ import annotations

import copy
import heapq
import itertools
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import comfy.model_management
from comfy_execution.history import Entry, History, Kept, Rows
from comfy_execution.jobs import Job
from comfy_execution.prompt_store import Found, PromptStore, pack

MAXIMUM_HISTORY_SIZE = 10000

# given to nodes as hidden inputs, never shown
SENSITIVE_EXTRA_DATA_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")

_LARGEST_NUMBER = 2**62  # SQLite's integers have 64 bits

# (number, prompt_id, prompt, extra_data, ids of the output nodes to run)
QueueItem = tuple[Any, ...]


class ExecutionStatus(NamedTuple):
    status_str: Literal["success", "error"]
    completed: bool
    messages: list[Any]


class DuplicatePromptError(ValueError):
    """A prompt of this id waits, runs or is in the history."""

    def __init__(self, prompt_id: str) -> None:
        super().__init__(f"prompt_id {prompt_id[:100]!r} is already used by another prompt")


class Restored(NamedTuple):
    """What is known of a prompt that was in the queue when the process before this one ended."""

    starts: int  # how often it was begun
    withheld: list[str]  # keys of extra_data it had, which are never written to disk


def without_secrets(item: QueueItem) -> QueueItem:
    """The item as it may be shown: extra_data without keys and tokens."""
    extra = item[3]
    if isinstance(extra, Mapping) and any(key in extra for key in SENSITIVE_EXTRA_DATA_KEYS):
        extra = {key: value for key, value in extra.items() if key not in SENSITIVE_EXTRA_DATA_KEYS}
    return (*item[:3], extra, *item[4:])


class PromptQueue:
    """A queue ordered by number (lower first, equal ones in the order of arrival), with history. Thread-safe.

    `currently_running` maps a task id to the item being executed; `history` maps prompt ids to entries, oldest first.
    With a `store` it begins with what the store has: what waited, in its order, behind what was running. Changes are
    written before they show. The disk is never touched under `mutex`, so that readers do not wait for it.
    """

    def __init__(self, server: Any, store: PromptStore | None = None) -> None:
        self.server = server
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.task_counter = 0
        self._heap: list[tuple[float, int, QueueItem]] = []
        self._arrivals = itertools.count()
        self._arrival_of: dict[int, int] = {}  # by task id
        self._ids: Counter[str] = Counter()  # of prompts that wait, run or are being written
        self._restored: dict[int, Restored] = {}  # by arrival
        self.currently_running: dict[int, QueueItem] = {}
        self._store = store
        self._history = History(store, self.mutex)
        self.flags: dict[str, Any] = {}
        server.prompt_queue = self
        if store is not None:
            self._restore(store)

    def _restore(self, store: PromptStore) -> None:
        found = store.found
        for prompt in found.prompts:
            item = tuple(prompt.item)
            # what was running goes on first, whatever its number
            entry = (-math.inf if prompt.starts else item[0], prompt.arrival, item)
            heapq.heappush(self._heap, entry)
            self._ids[item[1]] += 1
            self._restored[prompt.arrival] = Restored(prompt.starts, prompt.withheld)
        self._arrivals = itertools.count(max((prompt.arrival for prompt in found.prompts), default=0) + 1)
        self.server.number = max(getattr(self.server, "number", 0), found.counters.get("number", 0))
        store.found = Found()
        if found.prompts:
            logging.info("%d prompts that had not ended when the server did are queued again", len(found.prompts))

    @property
    def history(self) -> History:
        """Entries by prompt id, oldest first; assigning a dict replaces them."""
        return self._history

    @history.setter
    def history(self, entries: Mapping[str, Entry]) -> None:
        entries = dict(entries)
        self._history.clear()
        self._history.update(entries)

    @property
    def queue(self) -> list[QueueItem]:
        """Items that wait, next first."""
        with self.mutex:
            return [entry[2] for entry in sorted(self._heap, key=lambda entry: entry[:2])]

    def _announce(self) -> None:
        try:
            self.server.queue_updated()
        except Exception:  # noqa: BLE001 - packs replace what sends messages; no prompt may be lost by that
            logging.exception("the pages could not be told of the queue")

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def knows(self, prompt_id: str) -> bool:
        """Whether a prompt of this id waits, runs or is in the history."""
        with self.mutex:
            return self._ids[prompt_id] > 0 or prompt_id in self._history

    def accept(self, item: QueueItem) -> None:
        """Like `put`, once the prompt is on disk for good. Raises DuplicatePromptError for an id that is known."""
        self._put(item, once=True)

    def put(self, item: QueueItem) -> None:
        """Add `(number, prompt_id, prompt, extra_data, outputs)`."""
        self._put(item, once=False)

    def _put(self, item: QueueItem, once: bool) -> None:
        if len(item) < 5:
            raise ValueError("a queue item is (number, prompt_id, prompt, extra_data, outputs)")
        with self.mutex:
            if once and self.knows(item[1]):
                raise DuplicatePromptError(item[1])
            self._ids[item[1]] += 1
            arrival = next(self._arrivals)
        self._write(self._rows_of(arrival, item), durable=True)
        with self.mutex:
            heapq.heappush(self._heap, (item[0], arrival, item))
            self._announce()
            self.not_empty.notify()

    def _rows_of(self, arrival: int, item: QueueItem) -> Rows:
        """A waiting prompt as it is written: without secrets."""
        if self._store is None:
            return {}
        shown = without_secrets(item)
        withheld = [key for key in SENSITIVE_EXTRA_DATA_KEYS if isinstance(item[3], Mapping) and item[3].get(key)]
        try:
            row = (json.dumps(item[1]), json.dumps(withheld), pack(shown))
        except (TypeError, ValueError, RecursionError) as error:
            logging.warning("prompt %s would be lost by a restart, for it cannot be written: %s", item[1], error)
            return {}
        number = min(int(getattr(self.server, "number", 0)), _LARGEST_NUMBER)
        return {("prompts", arrival): row, ("counters", "number"): (number,)}

    def get(self, timeout: float | None = None) -> tuple[QueueItem, int] | None:
        """The next item and its task id, waiting up to `timeout` seconds; None when there was none or a flag was set."""
        with self.not_empty:
            while not self._heap:
                self.not_empty.wait(timeout=timeout)
                if timeout is not None and not self._heap:
                    return None
            _, arrival, item = heapq.heappop(self._heap)
            task_id = self.task_counter
            self.task_counter += 1
            self.currently_running[task_id] = copy.copy(item)
            self._arrival_of[task_id] = arrival
            starts = self._restored[arrival].starts if arrival in self._restored else 0
            comfy.model_management.interrupt_current_processing(False)  # a cancel of the prompt before
            self._announce()
        self._write({("starts", arrival): (starts + 1,)})
        return item, task_id

    def restored(self, task_id: int) -> Restored | None:
        """Of a running prompt that was in the queue when the process before this one ended: how far it had come."""
        with self.mutex:
            return self._restored.get(self._arrival_of.get(task_id, -1))

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Cancel the running prompt, if it is `prompt_id` (None: whichever runs); whether one was cancelled.

        A prompt runs from the moment it is given out, so a cancel is neither lost before its execution begins nor kept
        for the next prompt.
        """
        with self.mutex:
            if prompt_id is not None and all(item[1] != prompt_id for item in self.currently_running.values()):
                return False
            comfy.model_management.interrupt_current_processing()
            return True

    # ---- done ------------------------------------------------------------------------------------------------------

    def task_done(
        self,
        item_id: int,
        history_result: Mapping[str, Any],
        status: ExecutionStatus | None,
        process_item: Callable[[QueueItem], QueueItem] | None = None,
    ) -> None:
        """Move a running item to the history, with its outputs and status."""
        item = without_secrets(self.currently_running[item_id])
        if process_item is not None:
            item = process_item(item)
        entry = {
            "prompt": item,
            "outputs": {},
            "status": None if status is None else copy.deepcopy(status._asdict()),
            **history_result,
        }
        kept, rows = self._history.prepare(item[1], entry)
        old, old_rows = self._history.oldest(len(self._history) + 1 - MAXIMUM_HISTORY_SIZE)
        self._write({**old_rows, **rows, **_forgotten([self._arrival_of.get(item_id, -1)])})
        with self.mutex:
            self._history.drop(old)
            self._history.insert(item[1], kept)
            self._leave(item_id)

    def give_up(self, item_id: int, error: BaseException) -> None:
        """End a running item whose outputs or status cannot be kept: the history says so instead."""
        item = self.currently_running.get(item_id)
        if item is None:
            return
        message = {
            "prompt_id": item[1],
            "node_id": None,
            "exception_type": type(error).__name__,
            "exception_message": f"the prompt ended, but what it returned cannot be kept in the history: {error}\n",
            "traceback": [],
        }
        status = ExecutionStatus("error", False, [("execution_error", message)])
        try:
            PromptQueue.task_done(self, item_id, {"outputs": {}, "meta": {}}, status)
        except Exception:  # noqa: BLE001 - a prompt that stays among the running ones never ends
            logging.exception("prompt %s has no place in the history", item[1])
            self._write(_forgotten([self._arrival_of.get(item_id, -1)]))
            with self.mutex:
                self._leave(item_id)

    def _leave(self, item_id: int) -> None:
        """An item is no longer running."""
        item = self.currently_running.pop(item_id)
        self._restored.pop(self._arrival_of.pop(item_id, -1), None)
        self._release(item[1])
        self._announce()

    def _release(self, prompt_id: str) -> None:
        self._ids[prompt_id] -= 1
        if self._ids[prompt_id] <= 0:
            del self._ids[prompt_id]

    # ---- what there is ---------------------------------------------------------------------------------------------

    def get_current_queue(self) -> tuple[list[QueueItem], list[QueueItem]]:
        """Running and waiting items, without secrets; deep copies."""
        running, waiting = self.get_current_queue_volatile()
        return copy.deepcopy(running), copy.deepcopy(waiting)

    def get_current_queue_volatile(self) -> tuple[list[QueueItem], list[QueueItem]]:
        """Like `get_current_queue`, sharing the prompts: do not change them."""
        with self.mutex:
            return [without_secrets(item) for item in self.currently_running.values()], [
                without_secrets(item) for item in self.queue
            ]

    def get_tasks_remaining(self) -> int:
        with self.mutex:
            return len(self._heap) + len(self.currently_running)

    def wipe_queue(self) -> None:
        """Drop what waits."""
        with self.mutex:
            dropped, self._heap = self._heap, []
            for _, arrival, item in dropped:
                self._forget_waiting(arrival, item)
            self._announce()
        self._write(_forgotten(arrival for _, arrival, _ in dropped))

    def _forget_waiting(self, arrival: int, item: QueueItem) -> None:
        self._restored.pop(arrival, None)
        self._release(item[1])

    def delete_queue_item(self, function: Callable[[QueueItem], bool]) -> bool:
        """Drop the first waiting item for which `function` is true; whether there was one."""
        with self.mutex:
            chosen = next((e for e in sorted(self._heap, key=lambda entry: entry[:2]) if function(e[2])), None)
            if chosen is None:
                return False
            self._heap.remove(chosen)
            heapq.heapify(self._heap)
            self._forget_waiting(chosen[1], chosen[2])
            self._announce()
        self._write(_forgotten([chosen[1]]))
        return True

    # ---- history ---------------------------------------------------------------------------------------------------

    def _chosen(self, prompt_id: str | None, max_items: int | None, offset: int) -> list[tuple[str, Kept]]:
        if prompt_id is not None:
            kept = self._history.find(prompt_id)
            return [] if kept is None else [(prompt_id, kept)]
        known = self._history.kept()
        if offset < 0:
            offset = max(len(known) - max_items, 0) if max_items is not None else 0
        return known[offset : None if max_items is None else offset + max_items]

    def get_history(
        self,
        prompt_id: str | None = None,
        max_items: int | None = None,
        offset: int = -1,
        map_function: Callable[[dict[str, Any]], Any] | None = None,
    ) -> dict[str, Any]:
        """Entries by prompt id, oldest first: all, one, or `max_items` from `offset` on (negative: the last ones)."""
        change = map_function or copy.deepcopy
        found = {}
        for key, _ in self._chosen(prompt_id, max_items, offset):
            with suppress(KeyError):  # it was deleted meanwhile
                found[key] = change(self._history[key])
        return found

    def history_json(self, prompt_id: str | None = None, max_items: int | None = None, offset: int = -1) -> str:
        """`get_history` as JSON. What is on disk only is passed on as it is written there."""
        parts = []
        for key, kept in self._chosen(prompt_id, max_items, offset):
            text = self._history.text(kept)
            if text is None and key in self._history:
                text = json.dumps(self._history[key], default=str)
            if text is not None:
                parts.append(f"{json.dumps(key)}: {text}")
        return "{" + ", ".join(parts) + "}"

    def history_jobs(self) -> list[Job]:
        """What is in the history as jobs, oldest first."""
        return [kept.job for _, kept in self._history.kept()]

    def wipe_history(self) -> None:
        self._history.clear()

    def delete_history_item(self, id_to_delete: str) -> None:
        with suppress(KeyError):
            del self._history[id_to_delete]

    def set_flag(self, name: str, data: Any) -> None:
        """Ask the worker for something (`unload_models`, `free_memory`); wakes it."""
        with self.mutex:
            self.flags[name] = data
            self.not_empty.notify()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        with self.mutex:
            flags = self.flags.copy()
            if reset:
                self.flags = {}
            return flags

    # ---- disk ------------------------------------------------------------------------------------------------------

    def _write(self, rows: Rows, durable: bool = False) -> None:
        if self._store is None or not rows:
            return
        try:
            self._store.write(rows, durable)
        except Exception:  # noqa: BLE001 - a prompt taken from the queue must run even if that cannot be written
            logging.exception("part of the queue was not written; a restart would lose it")

    def close(self) -> None:
        """The process ends: what is on disk stays as it is now, so the running prompt will run again."""
        if self._store is not None:
            self._store.close()


def _forgotten(arrivals: Iterable[int]) -> Rows:
    """Rows of prompts that neither wait nor run any more."""
    return {(table, arrival): None for arrival in arrivals for table in ("prompts", "starts")}
