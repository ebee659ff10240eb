"""The interface by which the executor and the server know about ranks.

Under several ranks every process runs the same prompt through the same executor. Wherever two ranks could decide
differently (what to run next, what is cached, what a clock or a random number says) the executor asks a `Lockstep`
object instead, and rank 0's answer holds for all. `Lockstep` itself is the case of one rank: every answer is the
caller's own and nothing is communicated. `comfy.taco_dit.core.lockstep.RankLockstep` is the case of several.

All ranks must call the same methods in the same order within a task: the executor with its synchronous nodes is one,
each call of an asynchronous node is one of its own (`task`), so such calls may interleave differently on each rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
MAIN_TASK = "main"
# causes of a RankError that is no fault of the prompt
PROCESS_ENDED, NO_ANSWER = "ProcessEnded", "NoAnswer"
_task: ContextVar[tuple[str, str]] = ContextVar("comfy_lockstep_task", default=("", MAIN_TASK))
_alone: ContextVar[bool] = ContextVar("comfy_lockstep_alone", default=False)


class RankError(RuntimeError):
    """Another rank failed; raised on every rank that did not fail itself.

    Attributes: `rank` (int), `device` (str), `cause` (exception class name), `detail` (its message),
    `node_id` (str or None), `traceback` (list of str) describe what happened on the failing rank.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        cause: str,
        detail: str,
        node_id: str | None = None,
        traceback: list[str] | None = None,
    ) -> None:
        super().__init__(f"rank {rank} ({device}) failed: {cause}: {detail}")
        self.rank = rank
        self.device = device
        self.cause = cause
        self.detail = detail
        self.node_id = node_id
        self.traceback = traceback or []


def current_task() -> tuple[str, str]:
    """(prompt id, name) of the task this code belongs to; the prompt id is empty in the executor's own."""
    return _task.get()


def is_alone() -> bool:
    """Whether this code runs without the other ranks, as nodes do that run on rank 0 only."""
    return _alone.get()


@contextmanager
def task(prompt_id: str, name: str) -> Iterator[None]:
    """Inside (and in asyncio tasks and threads that copy the context), turns are those of the task `name`."""
    token = _task.set((prompt_id, name))
    try:
        yield
    finally:
        _task.reset(token)


class ComputeLock:
    """Lets one thread at a time run node code, as an event loop does for its tasks; a thread that waits releases it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._holder = None
        self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Give way to other threads inside; nothing happens in a thread that does not hold the lock."""
        if self._holder != threading.get_ident():
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Lockstep:
    """Decisions of a prompt's execution, for a single rank."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that serves HTTP, decides, and has side effects."""
        return self.rank == 0

    @property
    def computing(self) -> ComputeLock:
        """Held while node code runs on a rank that follows (see `async_calls`); made on first use."""
        lock = self.__dict__.get("_computing")
        if lock is None:
            lock = self.__dict__.setdefault("_computing", ComputeLock())
        return lock

    def prepare(self) -> bool:
        """Before rank 0 announces a prompt: wait until every rank has a process.

        True when one was replaced since the last prompt, so that all ranks must forget what they keep. Raises RankError
        when a rank does not come back, InterruptProcessingException when the prompt was cancelled meanwhile.
        """
        return False

    @property
    def together(self) -> bool:
        """Whether several ranks are executing the same node now, so that work can be distributed over them."""
        return False

    def begin(self, prompt_id: str) -> None:
        """Open a prompt: from here to `end` the ranks run in lockstep."""

    def end(self) -> None:
        """Close a prompt; waits until every rank has closed it.

        Raises RankError when another rank failed and this one did not notice yet.
        """

    def refuse(self, prompt_id: str, error: BaseException) -> None:
        """An announced prompt failed on this rank before `begin`, or the executor failed: the others are notified."""

    def fail(self, error: BaseException, node_id: str | None = None) -> BaseException:
        """Tell the other ranks that this one leaves the prompt because of `error` (also an interrupt).

        Returns the exception to report: `error`, or a RankError when it only follows from another rank's failure.
        """
        return error

    def decide(self, topic: str, choose: Callable[[], T]) -> T:
        """Rank 0's `choose()` on every rank; the others do not call it. The value should be small.

        `topic` names the decision in error messages. An exception of `choose` is raised on rank 0 and reaches the
        others as RankError.
        """
        return choose()

    def gather(self, topic: str, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        return [value]

    def share(self, topic: str, produce: Callable[[], Any]) -> Any:
        """Like `decide` for large results: rank 0's `produce()`, tensors included, on every rank (on the CPU)."""
        return produce()

    def offer(self, topic: str, produce: Callable[[], Any]) -> tuple[bool, Any]:
        """Like `share`, where it may turn out that the value cannot be sent: `(sent, value)`, None where it is not there."""
        return True, produce()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this rank works on its own (a node that runs on rank 0 only): it may stop without asking the others."""
        token = _alone.set(True)
        try:
            yield
        finally:
            _alone.reset(token)

    def leave(self) -> None:
        """The current task is over: a rank that still waits for a turn of it gets an OutOfStepError."""

    def check(self) -> None:
        """Agreed check point: raises RankError if another rank failed. Cheap; call it once a node."""
