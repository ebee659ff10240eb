"""The loop that takes prompts from the queue (rank 0), and the one that executes rank 0's commands (the others)."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
from comfy import host_memory
from comfy_execution import restart
from comfy_execution.caching import CacheType
from comfy_execution.executor import PromptExecutor
from comfy_execution.lockstep import Lockstep
from comfy_execution.node_call import failure
from comfy_execution.node_execution import ends_program
from comfy_execution.progress import install_progress_hook
from comfy_execution.prompt_queue import ExecutionStatus, PromptQueue, QueueItem
from latent_preview import previews_of

GC_INTERVAL_S = 10.0
IDLE_WAIT_S = 1000.0
PAUSE_S = 0.2  # after a failure between prompts, so that one that repeats does not fill the log
_ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


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
    `{"kind": "free", "unload_models": bool, "free_memory": bool}` or `{"kind": "stop"}`. Commands are plain data and
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
        rerun: bool = False,
    ) -> None:
        self.rerun = rerun  # whether a prompt during which another rank's process ended runs again, once
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
            try:
                self._turn(self.queue)
            except BaseException as error:  # noqa: BLE001 - the queue must go on whatever happened
                if ends_program(error):
                    raise
                logging.exception("the prompt worker failed between two prompts; it goes on with the next one")
                self._stop.wait(PAUSE_S)
        self.announce({"kind": "stop"})

    def _turn(self, queue: PromptQueue) -> None:
        """Wait for a prompt or a flag, and see to it."""
        taken = queue.get(timeout=self._wait())
        if self._stop.is_set():
            return
        if taken is not None:
            self._work(queue, *taken)
        self._obey_flags(queue)
        self._collect_garbage()

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

    def _work(self, queue: PromptQueue, item: QueueItem, task_id: int) -> None:
        """Run a prompt and record how it ended, whatever happens: exactly once, and in its own name."""
        prompt_id, executor = item[1], self.executor
        before = time.perf_counter()
        executor.open(prompt_id, item[3])
        try:
            restored = queue.restored(task_id)
            if restored is not None:
                item = asyncio.run(restart.check(item, restored))
            executor.may_run_again = self.rerun
            with previews_of(item[3]):
                self._run(item)
                if executor.lost_rank is not None:
                    logging.warning("%s; prompt %s runs again", executor.lost_rank, prompt_id)
                    executor.may_run_again = False
                    self._run(item)
        except BaseException as error:  # noqa: BLE001 - the queue must go on whatever happened to one prompt
            if ends_program(error):
                raise
            self._refuse(prompt_id, error)
        self._gc_due = True
        with _contained(f"what is called after prompt {prompt_id}"):
            self.on_done(executor)
        self._record(queue, task_id, prompt_id)
        with _contained(f"the last message of prompt {prompt_id}"):
            if self.server.client_id is not None:
                self.server.send_sync("executing", {"node": None, "prompt_id": prompt_id}, self.server.client_id)
        with _contained("the summary of a prompt"):
            logging.info("Prompt executed in %.2f seconds%s", time.perf_counter() - before, self.summary())

    def _run(self, item: QueueItem) -> None:
        """Run a prompt on all ranks, as soon as all are there."""
        command: dict[str, Any] = {"kind": "prompt", "item": item}
        if self.lockstep.prepare():
            command["reset"] = True
            self._free(True, True)
        self.announce(command)
        self._execute(item)

    def _refuse(self, prompt_id: str, error: BaseException) -> None:
        """End a prompt that failed outside of its nodes in an error, on all ranks; one that has ended stays as it is."""
        if self._has_ended():
            logging.error("prompt %s had ended when something failed", prompt_id, exc_info=error)
            return
        with _contained(f"telling the other ranks of prompt {prompt_id}'s failure"):
            self.lockstep.refuse(prompt_id, error)
        executor = self.executor
        with _contained(f"reporting prompt {prompt_id}'s failure"):
            executor.refuse(prompt_id, error)
        if not self._has_ended():
            executor.success = False
            message: dict[str, Any] = {"prompt_id": prompt_id, "node_type": None, "executed": [], "current_outputs": []}
            executor.add_message("execution_error", message | failure("", error, None) | {"node_id": None}, False)

    def _has_ended(self) -> bool:
        return any(event in _ENDINGS for event, _ in self.executor.status_messages)

    def _record(self, queue: PromptQueue, task_id: int, prompt_id: str) -> None:
        """Move a prompt to the history; one that cannot be kept there as it is, without its outputs."""
        executor = self.executor
        messages = list(executor.status_messages)
        status = ExecutionStatus("success" if executor.success else "error", executor.success, messages)
        try:
            queue.task_done(task_id, executor.history_result, status)
        except BaseException as error:  # noqa: BLE001 - a prompt that stays among the running ones never ends
            if ends_program(error):
                raise
            logging.exception("what prompt %s returned cannot be kept in the history", prompt_id)
            queue.give_up(task_id, error)

    def _obey_flags(self, queue: PromptQueue) -> None:
        flags = queue.get_flags()
        free_memory = bool(flags.get("free_memory", False))
        unload_models = bool(flags.get("unload_models", free_memory))
        if unload_models or free_memory:
            with _contained("telling the other ranks to free memory"):
                self.announce({"kind": "free", "unload_models": unload_models, "free_memory": free_memory})
            self._free(unload_models, free_memory)

    def _free(self, unload_models: bool, free_memory: bool) -> None:
        """Unload models and forget results; what fails is logged, and the rest is done all the same."""
        self._gc_due = True
        self._last_gc = 0.0
        if unload_models:
            with _contained("unloading the models"):
                comfy.model_management.unload_all_models()
        if free_memory:
            with _contained("forgetting results"):
                self.executor.reset()

    def _collect_garbage(self) -> None:
        if self._gc_due and time.monotonic() - self._last_gc > GC_INTERVAL_S:
            self._last_gc = time.monotonic()
            self._gc_due = False
            with _contained("freeing memory"):
                gc.collect()
                comfy.model_management.soft_empty_cache()
                host_memory.trim()


@contextmanager
def _contained(what: str) -> Iterator[None]:
    """What fails inside is logged as `what` and goes no further, except the end of the program."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - packs and the driver raise anything
        if ends_program(error):
            raise
        logging.exception("%s failed; the server goes on", what)


def _leave_with_the_others(*progress: Any, **where: Any) -> None:
    """A follower's progress is not shown, but a prompt that was cancelled ends here, too."""
    comfy.model_management.throw_exception_if_processing_interrupted()
