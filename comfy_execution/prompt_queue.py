"""Prompts waiting, running and done."""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import comfy.model_management

MAXIMUM_HISTORY_SIZE = 10000

# given to nodes as hidden inputs, never shown
SENSITIVE_EXTRA_DATA_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")

# (number, prompt_id, prompt, extra_data, ids of the output nodes to run)
QueueItem = tuple[Any, ...]


class ExecutionStatus(NamedTuple):
    status_str: Literal["success", "error"]
    completed: bool
    messages: list[Any]


def without_secrets(item: QueueItem) -> QueueItem:
    """The item as it may be shown: extra_data without keys and tokens."""
    extra = item[3]
    if isinstance(extra, Mapping) and any(key in extra for key in SENSITIVE_EXTRA_DATA_KEYS):
        extra = {key: value for key, value in extra.items() if key not in SENSITIVE_EXTRA_DATA_KEYS}
    return (*item[:3], extra, *item[4:])


class PromptQueue:
    """A queue ordered by number (lower first, equal ones in the order of arrival), with history. Thread-safe.

    `currently_running` maps a task id to the item being executed; `history` maps prompt ids to entries, oldest first.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.task_counter = 0
        self._heap: list[tuple[float, int, QueueItem]] = []
        self._arrivals = itertools.count()
        self.currently_running: dict[int, QueueItem] = {}
        self.history: dict[str, dict[str, Any]] = {}
        self.flags: dict[str, Any] = {}
        server.prompt_queue = self

    @property
    def queue(self) -> list[QueueItem]:
        """Items that wait, next first."""
        with self.mutex:
            return [entry[2] for entry in sorted(self._heap, key=lambda entry: entry[:2])]

    def _announce(self) -> None:
        self.server.queue_updated()

    def put(self, item: QueueItem) -> None:
        """Add `(number, prompt_id, prompt, extra_data, outputs)`."""
        with self.mutex:
            heapq.heappush(self._heap, (item[0], next(self._arrivals), item))
            self._announce()
            self.not_empty.notify()

    def get(self, timeout: float | None = None) -> tuple[QueueItem, int] | None:
        """The next item and its task id, waiting up to `timeout` seconds; None when there was none or a flag was set."""
        with self.not_empty:
            while not self._heap:
                self.not_empty.wait(timeout=timeout)
                if timeout is not None and not self._heap:
                    return None
            item = heapq.heappop(self._heap)[2]
            task_id = self.task_counter
            self.task_counter += 1
            self.currently_running[task_id] = copy.copy(item)
            comfy.model_management.interrupt_current_processing(False)  # a cancel of the prompt before
            self._announce()
            return item, task_id

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

    def task_done(
        self,
        item_id: int,
        history_result: Mapping[str, Any],
        status: ExecutionStatus | None,
        process_item: Callable[[QueueItem], QueueItem] | None = None,
    ) -> None:
        """Move a running item to the history, with its outputs and status."""
        with self.mutex:
            item = without_secrets(self.currently_running.pop(item_id))
            if process_item is not None:
                item = process_item(item)
            while len(self.history) >= MAXIMUM_HISTORY_SIZE:
                self.history.pop(next(iter(self.history)))
            self.history[item[1]] = {
                "prompt": item,
                "outputs": {},
                "status": None if status is None else copy.deepcopy(status._asdict()),
                **history_result,
            }
            self._announce()

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
            self._heap.clear()
            self._announce()

    def delete_queue_item(self, function: Callable[[QueueItem], bool]) -> bool:
        """Drop the first waiting item for which `function` is true; whether there was one."""
        with self.mutex:
            for entry in sorted(self._heap, key=lambda entry: entry[:2]):
                if function(entry[2]):
                    self._heap.remove(entry)
                    heapq.heapify(self._heap)
                    self._announce()
                    return True
            return False

    def get_history(
        self,
        prompt_id: str | None = None,
        max_items: int | None = None,
        offset: int = -1,
        map_function: Callable[[dict[str, Any]], Any] | None = None,
    ) -> dict[str, Any]:
        """Entries by prompt id, oldest first: all, one, or `max_items` from `offset` on (negative: the last ones)."""
        change = map_function or copy.deepcopy
        with self.mutex:
            if prompt_id is not None:
                return {prompt_id: change(self.history[prompt_id])} if prompt_id in self.history else {}
            if offset < 0:
                offset = max(len(self.history) - max_items, 0) if max_items is not None else 0
            end = None if max_items is None else offset + max_items
            return {key: change(self.history[key]) for key in itertools.islice(self.history, offset, end)}

    def wipe_history(self) -> None:
        with self.mutex:
            self.history = {}

    def delete_history_item(self, id_to_delete: str) -> None:
        with self.mutex:
            self.history.pop(id_to_delete, None)

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
