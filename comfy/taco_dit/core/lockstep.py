"""Decisions of rank 0, agreed by all ranks, over the control plane.

Every prompt is an epoch. Within it, rank r's part of the n-th turn of a task lives under the key epoch/task/n/r, so
rank 0 never waits for followers except where it gathers. Each value begins with its topic, so that ranks that diverged
notice at the first key they read of each other, instead of waiting for each other forever.

A rank is waited for as long as its process lives and nobody failed (`rank_group` says how that is known); after a failure
every rank must come to `end` within a time limit or is ended from outside.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

import comfy.model_management
from comfy_execution.lockstep import MAIN_TASK, current_task, is_alone

from .control_plane import HEALTHY
from .distributed_manager import TACODiTDistributedManager
from .rank_group import ABORT_S, CAUSE_S, UNKNOWN, RankGroup
from .rank_watch import END_S, SILENT_S
from .wire import UnsendableError, decode, encode

T = TypeVar("T")
_LARGE = 1 << 16  # bytes from which a value is sent over the data plane
# where a value of rank 0 follows, and how it is written; or that it cannot be sent
_HERE, _PLAIN, _OBJECT, _NOTHING = b"h", b"p", b"o", b"n"
FIRST_END_S = 300.0  # how long rank 0 may take to leave a prompt that failed; to end it costs the queue


class OutOfStepError(RuntimeError):
    """Ranks ask for different things at the same turn."""


class _NotSentError(TypeError):
    """Rank 0 has a value that cannot be sent."""


class RankLockstep(RankGroup):
    """`Lockstep` for several ranks."""

    def __init__(self, manager: TACODiTDistributedManager, answer_deadline_s: float = SILENT_S) -> None:
        self._turns: dict[str, int] = {}  # how many turns each task of the prompt has had
        super().__init__(manager, answer_deadline_s)

    @property
    def together(self) -> bool:
        return self._open and not is_alone()

    # --- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, prompt_id: str) -> None:
        envelope, self._envelope = self._envelope, {}
        if envelope.get("renew"):
            self._abandon(self.epoch)
        if self._abandoning is not None:
            self._abandoning.join(ABORT_S)
            self._abandoning = None
        with self._changed:
            self._changed.wait_for(lambda: self._seen >= envelope.get("seen", 0), CAUSE_S)
            self.epoch = envelope.get("epoch", self.epoch + 1)
            self._prompt_id = prompt_id
            self._abort = self._coming.get(self.epoch)
            self._coming = {epoch: report for epoch, report in self._coming.items() if epoch > self.epoch}
            self.members.begin(envelope.get("members"))
            lost = self.members.lost_ranks()
            if self._abort is None and lost:
                self._abort = self.members.report(lost[0])
            self._turns = {}
            self._failed = False
            self._cancelled_at = None
            self._renew = bool(lost)
            renewed = self._data.aborted
            if renewed:
                self._data.renew(self.epoch)
            self._open = True
        self._running.set()
        if self.rank == 0:  # every rank has left the prompt before the last one
            self._control.drop("epoch", self.epoch - 1)
            if renewed:
                self._control.drop("generation", self.epoch)
        self._control.poke()

    def end(self) -> None:
        if not self._open:
            return
        # for a rank that still waits for something of this one
        self._put(self._next(MAIN_TASK), "end", "of the prompt")
        try:
            problem: BaseException | None = None
            if self.rank == 0:
                problem = self._end_first()
            else:
                self._end_follower()
        finally:
            with self._changed:
                self._open = False
            self._running.clear()
        if problem is None and self._abort is None and not self._failed:
            if self.rank == 0:
                self._control.set(HEALTHY, str(self.epoch).encode())
            return
        self._abandon(self.epoch)  # all ranks, so that all start a new generation
        if problem is not None:
            raise problem
        if not self._failed:  # also when the report came during the last node, after the last check
            raise self._rank_error()

    def _end_first(self) -> BaseException | None:
        """Rank 0 waits for all live ranks, then sends them the outcome; an exception that only rank 0 raises."""
        problem: BaseException | None = None
        failed = False
        deadline = self._Deadline(self, END_S)
        for rank in range(1, self.world_size):
            key = self._key(f"end/{rank}")
            while not self.members.lost(rank):
                value = self._control.get(key, partial(self._stop_waiting_for, rank, deadline))
                if value is not None:
                    failed |= bool(decode(value))
                    break
                if self.members.lost(rank):
                    break
                if not self.troubled() and self.cancelled_too_long():
                    problem = self.fail(comfy.model_management.InterruptProcessingException())
                    comfy.model_management.interrupt_current_processing(False)
                elif self.troubled():
                    self._wait_for_death(rank)
        with self._changed:
            if failed and self._abort is None and not self._failed:
                self._changed.wait_for(lambda: self._abort is not None, CAUSE_S)
            report = self._abort
        verdict = encode({"failed": failed or self._failed or report is not None, "report": report})
        self._control.set(self._key("verdict"), verdict)
        return problem

    def _stop_waiting_for(self, rank: int, deadline: RankLockstep._Deadline) -> bool:
        return self.members.lost(rank) or deadline.over()

    def _wait_for_death(self, rank: int) -> None:
        """A follower did not leave a failed prompt in time: have it ended, and go on without it."""
        self.end_from_outside(rank, f"rank {rank} did not leave the prompt within {END_S:.0f} s of its failure")
        with self._changed:
            if not self._changed.wait_for(lambda: self.members.lost(rank), END_S):
                self.members.give_up(rank, "it did not answer")

    def _end_follower(self) -> None:
        self._control.set(self._key(f"end/{self.rank}"), encode(self._failed or self._abort is not None))
        deadline = self._Deadline(self, FIRST_END_S)
        value = self._control.get(self._key("verdict"), deadline.over)
        if value is None:
            self.end_from_outside(0, f"rank 0 did not leave the prompt within {FIRST_END_S:.0f} s of its failure")
            raise RuntimeError("rank 0 does not answer")
        verdict = decode(value)
        with self._changed:
            if verdict["failed"] and self._abort is None:
                self._abort = verdict["report"] or UNKNOWN

    class _Deadline:
        """Runs from when the prompt is known to have failed, or was cancelled; without either there is none."""

        def __init__(self, lockstep: RankLockstep, seconds: float) -> None:
            self._lockstep = lockstep
            self._seconds = seconds
            self._since: float | None = None

        def over(self) -> bool:
            """Whether the waiting rank should stop waiting and act."""
            if not self._lockstep.troubled():
                return self._lockstep.cancelled_too_long()
            if self._since is None:
                self._since = time.monotonic()
            return time.monotonic() - self._since > self._seconds

    # --- decisions -------------------------------------------------------------------------------------------------

    def decide(self, topic: str, choose: Callable[[], T]) -> T:
        return self._of_first("decision", topic, choose)

    def share(self, topic: str, produce: Callable[[], Any]) -> Any:
        return self._of_first("sharing", topic, partial(self._on_its_own, produce))

    def offer(self, topic: str, produce: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, self._of_first("offer", topic, partial(self._on_its_own, produce), demanded=False)
        except _NotSentError:
            return False, None if self.rank else produce()

    def _on_its_own(self, produce: Callable[[], Any]) -> Any:
        with self.alone():
            return produce()

    def gather(self, topic: str, value: T) -> list[T]:
        if is_alone():
            raise RuntimeError(f"a node that runs on rank 0 only asks all ranks for {topic!r}; use TACO_RANKS = 'all'")
        turn = self._next()
        self._put(turn, "gathering", topic, encode(value))
        return [decode(self._read(turn, rank, "gathering", topic)) for rank in range(self.world_size)]

    def _of_first(self, kind: str, topic: str, produce: Callable[[], Any], demanded: bool = True) -> Any:
        """Rank 0's `produce()` on every rank.

        Small plain data travels in the control plane. Anything else follows on the data plane, and what is not plain data
        is pickled: the receivers trust their own rank 0, whose nodes may return objects of any class. A value that cannot
        be sent is rank 0's failure, or, where none is `demanded`, a `_NotSentError` on every rank.
        """
        if is_alone():
            return produce()
        turn = self._next()
        if self.rank:
            return self._from_first(self._read(turn, 0, kind, topic))
        self.check()
        try:
            value = produce()
            form, payload = _written(topic, value)
        except _NotSentError as error:
            if demanded:
                self.fail(error)
            else:
                self._put(turn, kind, topic, _NOTHING)
            raise
        except BaseException as error:
            self.fail(error)
            raise
        if form == _PLAIN and len(payload) <= _LARGE:
            self._put(turn, kind, topic, _HERE + payload)
            return value
        self._put(turn, kind, topic, form + encode(len(payload)))
        self._everyone().broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        return value

    def _from_first(self, head: bytes) -> Any:
        form, rest = head[:1], head[1:]
        if form == _NOTHING:
            raise _NotSentError
        if form == _HERE:
            return decode(rest)
        buffer = torch.empty(decode(rest), dtype=torch.uint8)
        with self.computing.released():
            self._everyone().broadcast(buffer)
        payload = buffer.numpy().tobytes()
        return decode(payload) if form == _PLAIN else _unpickled(payload)

    def _everyone(self) -> Any:
        return self._data.group(range(self.world_size), "cpu")

    def leave(self) -> None:
        prompt_id, name = current_task()
        if self._open and prompt_id == self._prompt_id and not is_alone():
            self._put(self._next(), "end", f"of {name}")

    # --- interrupts ------------------------------------------------------------------------------------------------

    def interrupt_check(self) -> None:
        """What `throw_exception_if_processing_interrupted` does.

        Ranks in lockstep stop at `gate` or before the next node. When neither comes within `PATIENCE_S` (a long
        loop inside a node), rank 0 leaves by itself, as if it had failed, and the others follow at their next check.
        """
        if is_alone() or not self._open:
            comfy.model_management.raise_if_interrupted()
            return
        if self.rank:
            self.check()  # rank 0 does not: it is about to raise the same error, and should report it as its own
        elif self.cancelled_too_long():
            comfy.model_management.raise_if_interrupted()

    def gate(self) -> None:
        """Once per denoiser call: all ranks go on, or all raise InterruptProcessingException here."""
        if not self._open or is_alone():
            comfy.model_management.raise_if_interrupted()
            return
        self.check()
        if self.decide("step", comfy.model_management.processing_interrupted):
            comfy.model_management.interrupt_current_processing(False)
            error = comfy.model_management.InterruptProcessingException()
            error.agreed = True  # type: ignore[attr-defined]
            raise error

    # --- keys and waiting ------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"epoch/{self.epoch}/{name}"

    def _next(self, name: str | None = None) -> str:
        """The key of the next turn of the current task (or of `name`); rank r's part of the turn is below it at /r.

        Raises RuntimeError in a task of a prompt that is over.
        """
        prompt_id, task_name = current_task()
        if prompt_id and prompt_id != self._prompt_id:
            raise RuntimeError(f"prompt {prompt_id} is over; {task_name} has nothing to agree on any more")
        task = name or task_name
        self._turns[task] = self._turns.get(task, 0) + 1
        return self._key(f"{task}/{self._turns[task]}")

    def _put(self, turn: str, kind: str, topic: str, payload: bytes = b"") -> None:
        """Write this rank's part of a turn: what it is, a zero byte, the content."""
        self._control.set(f"{turn}/{self.rank}", f"{kind} {topic}".encode() + b"\0" + payload)

    def _read(self, turn: str, rank: int, kind: str, topic: str) -> bytes:
        """The content of a rank's part of a turn. Raises OutOfStepError when that rank wrote another kind or topic."""
        theirs, _, payload = self._wait(f"{turn}/{rank}").partition(b"\0")
        mine = f"{kind} {topic}"
        if theirs == mine.encode():
            return payload
        error = OutOfStepError(
            f"the ranks took different ways: rank {self.rank} is at {mine!r}, rank {rank} at {theirs.decode()!r}. A node "
            "depends on something that differs between ranks (a clock, a file, a random number); set TACO_RANKS = 'first' "
            "on its class"
        )
        self.fail(error)
        raise error

    def _wait(self, key: str) -> bytes:
        self.check()
        with self.computing.released():
            value = self._control.get(key, self._no_more_waiting)
        if value is None and not self.troubled():
            comfy.model_management.raise_if_interrupted()
        self.check()
        if value is None:
            raise self._rank_error()
        return value

    def _no_more_waiting(self) -> bool:
        return self.troubled() or self.cancelled_too_long()


def _written(topic: str, value: Any) -> tuple[bytes, bytes]:
    """(form, bytes) of a value. Raises _NotSentError."""
    try:
        return _PLAIN, encode(value)
    except UnsendableError:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
        except Exception as error:  # noqa: BLE001 - whatever objects of nodes raise when they are pickled
            raise _NotSentError(
                f"{topic}: these values cannot be sent to other ranks ({error}). The node that returns them has to run "
                "on every rank: TACO_RANKS = 'all'"
            ) from error
        return _OBJECT, buffer.getvalue()


def _unpickled(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)
