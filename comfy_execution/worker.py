"""The loop that takes prompts from the queue (rank 0), and the one that executes rank 0's commands (the others)."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.caching import CacheType
from comfy_execution.executor import PromptExecutor
from comfy_execution.lockstep import Lockstep
from comfy_execution.node_execution import ends_program
from comfy_execution.progress import install_progress_hook
from comfy_execution.prompt_queue import ExecutionStatus, PromptQueue, QueueItem

GC_INTERVAL_S = 10.0
IDLE_WAIT_S = 1000.0


def cache_choice(args: Any) -> tuple[CacheType, dict[str, Any]]:
    """Cache type and arguments from the flags --cache-classic, --cache-lru N, --cache-ram GIB, --cache-none."""
    if args.cache_lru > 0:
        return CacheType.LRU, {"lru": args.cache_lru}
    if args.cache_ram > 0:
        return CacheType.RAM_PRESSURE, {"ram": args.cache_ram}
    return (CacheType.NONE if args.cache_none else CacheType.CLASSIC), {}


class PromptWorker:
    """Executes prompts: `run` on rank 0 in a thread of its own, `follow` on the other ranks.

    `announce(command)` sends the other ranks what rank 0 is about to do: `{"kind": "prompt", "item": queue item}` (with
    `"reset": True` when a rank was replaced, so that all forget what they keep),
    `{"kind": "free", "unload_models": bool, "free_memory": bool}` or `{"kind": "stop"}`. Commands are picklable and
    must reach every follower's `follow` in order.
    """

    def __init__(
        self,
        queue: PromptQueue | None,
        server: Any,
        lockstep: Lockstep | None = None,
        announce: Callable[[dict[str, Any]], None] | None = None,
        cache_type: CacheType | None = None,
        cache_args: Mapping[str, Any] | None = None,
        summary: Callable[[], str] = str,
        on_done: Callable[[PromptExecutor], None] = lambda executor: None,
    ) -> None:
        self.on_done = on_done  # called with each prompt of the queue when it is over
        self.summary = summary  # what to add to a finished prompt's line on the console
        self.queue = queue
        self.server = server
        self.lockstep = lockstep or Lockstep()
        self.announce = announce or (lambda command: None)
        self.executor = PromptExecutor(server, cache_type=cache_type, cache_args=cache_args, lockstep=self.lockstep)
        self._stop = threading.Event()
        self._last_gc = 0.0
        self._gc_due = False

    def run(self) -> None:
        """Work until `stop`. Needs the queue."""
        assert self.queue is not None, "rank 0's worker needs the queue"
        self.executor.cancels_kept = True  # the queue forgets them when it gives a prompt out
        install_progress_hook(self.server)
        while not self._stop.is_set():
            taken = self.queue.get(timeout=self._wait())
            if self._stop.is_set():
                break
            if taken is not None:
                self._work(*taken)
            self._obey_flags()
            self._collect_garbage()
        self.announce({"kind": "stop"})

    def stop(self) -> None:
        """End `run` after the prompt that is running; from any thread."""
        self._stop.set()
        if self.queue is not None:
            self.queue.set_flag("stop", True)

    def follow(self, commands: Iterable[Mapping[str, Any]]) -> None:
        """Execute rank 0's commands until it sends stop or there are no more."""
        comfy.utils.set_progress_bar_global_hook(_leave_with_the_others)
        for command in commands:
            kind = command["kind"]
            if kind == "stop":
                return
            if kind == "prompt":
                self._follow_prompt(command)
            elif kind == "free":
                self._free(command["unload_models"], command["free_memory"])
            else:
                raise ValueError(f"rank 0 sent the unknown command {kind!r}; all ranks must run the same version")
            self._collect_garbage()

    def _follow_prompt(self, command: Mapping[str, Any]) -> None:
        try:
            if command.get("reset"):
                self._free(True, True)
            self._execute(command["item"])
        except BaseException as error:  # noqa: BLE001 - a follower that leaves would stop the whole group
            if ends_program(error):
                raise
            logging.exception("prompt %s could not be executed on this rank", command["item"][1])
            self.lockstep.refuse(command["item"][1], error)
        self._gc_due = True

    def _wait(self) -> float:
        if not self._gc_due:
            return IDLE_WAIT_S
        return max(GC_INTERVAL_S - (time.monotonic() - self._last_gc), 0.0)

    def _execute(self, item: QueueItem) -> None:
        _, prompt_id, prompt, extra_data, outputs = item[:5]
        self.executor.execute(prompt, prompt_id, extra_data, outputs)

    def _work(self, item: QueueItem, task_id: int) -> None:
        assert self.queue is not None
        prompt_id = item[1]
        before = time.perf_counter()
        self.executor.status_messages = []
        self.server.last_prompt_id = prompt_id
        try:
            command: dict[str, Any] = {"kind": "prompt", "item": item}
            if self.lockstep.prepare():
                command["reset"] = True
                self._free(True, True)
            self.announce(command)
            self._execute(item)
        except BaseException as error:  # noqa: BLE001 - the queue must go on whatever happened to one prompt
            if ends_program(error):
                raise
            self.lockstep.refuse(prompt_id, error)
            self.executor.refuse(prompt_id, item[3], error)
        self._gc_due = True
        executor = self.executor
        status = ExecutionStatus(
            status_str="success" if executor.success else "error",
            completed=executor.success,
            messages=list(executor.status_messages),
        )
        self.on_done(executor)
        self.queue.task_done(task_id, executor.history_result, status)
        if self.server.client_id is not None:
            self.server.send_sync("executing", {"node": None, "prompt_id": prompt_id}, self.server.client_id)
        logging.info("Prompt executed in %.2f seconds%s", time.perf_counter() - before, self.summary())

    def _obey_flags(self) -> None:
        assert self.queue is not None
        flags = self.queue.get_flags()
        free_memory = bool(flags.get("free_memory", False))
        unload_models = bool(flags.get("unload_models", free_memory))
        if unload_models or free_memory:
            self.announce({"kind": "free", "unload_models": unload_models, "free_memory": free_memory})
            self._free(unload_models, free_memory)

    def _free(self, unload_models: bool, free_memory: bool) -> None:
        if unload_models:
            comfy.model_management.unload_all_models()
        if free_memory:
            self.executor.reset()
        self._gc_due = True
        self._last_gc = 0.0

    def _collect_garbage(self) -> None:
        if self._gc_due and time.monotonic() - self._last_gc > GC_INTERVAL_S:
            gc.collect()
            comfy.model_management.soft_empty_cache()
            self._last_gc = time.monotonic()
            self._gc_due = False


def _leave_with_the_others(*progress: Any, **where: Any) -> None:
    """A follower's progress is not shown, but a prompt that was cancelled ends here, too."""
    comfy.model_management.throw_exception_if_processing_interrupted()
