"""Decisions of rank 0, agreed by all ranks, over the control store.

Every prompt is an epoch. Within it, rank r's part of the n-th decision lives under the key n/r, so rank 0 never waits for
followers except where it gathers. Each value begins with what it is about, so that ranks that took different ways find
out at the first key they read of each other, instead of waiting for each other for ever. A rank that fails writes the
epoch's abort key. On every rank a watcher thread sleeps on that key: when it appears, the watcher abandons the data plane
(which frees a thread that is inside a collective) and answers the key that the main thread is waiting for, if any.
Nothing polls.
"""

from __future__ import annotations

import io
import logging
import pickle
import threading
import time
import traceback as traceback_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

import comfy.model_management
from comfy_execution.lockstep import Lockstep, RankError

from .distributed_manager import TACODiTDistributedManager

T = TypeVar("T")
_POISON = b"\x00abandoned"
_DONE = b"\x00done"
_LARGE = 1 << 20  # bytes from which a shared value travels by the data plane
_PATIENCE_S = 2.0  # how long a cancelled prompt may take to reach a point where all ranks stop together


class OutOfStepError(RuntimeError):
    """Ranks ask for different things at the same turn."""


class RankLockstep(Lockstep):
    """`Lockstep` for several ranks."""

    def __init__(self, manager: TACODiTDistributedManager) -> None:
        if manager.store is None or manager.data is None:
            raise ValueError("RankLockstep needs several ranks; use Lockstep for one")
        self._manager = manager
        self._store = manager.store
        self._data = manager.data
        self.rank = manager.rank
        self.world_size = manager.world_size
        self.epoch = 0
        self._counter = 0
        self._open = False
        self._alone = 0
        self._cancelled_at: float | None = None
        self._failed = False
        self._abort: dict[str, Any] | None = None
        self._awaiting: str | None = None
        self._stale: list[str] = []
        self._commands = 0
        self._abort_seen = threading.Condition()
        watcher = threading.Thread(target=self._watch, name="taco-abort-watcher", daemon=True)
        self._watch_store = manager.another_store()
        watcher.start()

    # --- commands: rank 0 tells followers what to run --------------------------------------------------------------

    def announce(self, command: dict[str, Any]) -> None:
        """Send a command to all followers; only rank 0."""
        self._commands += 1
        self._store.set(f"command/{self._commands}", pickle.dumps(command))
        if self._commands > 2:  # every follower has taken a command before the last prompt could end
            self._store.delete_key(f"command/{self._commands - 2}")

    def commands(self) -> Iterator[dict[str, Any]]:
        """Commands for a follower, as they come; waiting costs no CPU time."""
        while True:
            self._commands += 1
            command = pickle.loads(self._store.get(f"command/{self._commands}"))
            if command.get("kind") == "stop":
                return
            yield command

    # --- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, prompt_id: str) -> None:
        with self._abort_seen:  # the watcher is done with the epoch before, or leaves it alone from here
            self.epoch += 1
            self._abort = None
        self._counter = 0
        self._failed = False
        self._cancelled_at = None
        if self._data.aborted:
            self._data.renew(self.epoch)
        self._open = True

    def end(self) -> None:
        if not self._open:
            return
        self._open = False
        mine = self._failed or self._abort is not None
        turn = self._next()
        self._put(turn, "end", "of the prompt")  # for a rank that still waits for something of this one
        self._store.set(self._key(f"end/{self.rank}"), b"1" if mine else b"0")
        failed = [self._store.get(self._key(f"end/{rank}")) == b"1" for rank in range(self.world_size)]
        if self.rank == 0:
            self._stale += [f"{turn}/{rank}" for rank in range(self.world_size)]
            self._delete_stale()
        if any(failed):
            self._read_abort()
            self._data.abort()  # all ranks, so that all start a new generation
            if not self._failed:  # also when the watcher saw it during the last node, where nothing asked any more
                raise self._rank_error()
        elif self.rank == 0:
            self._store.set(self._key("abort"), _DONE)

    def fail(self, error: BaseException, node_id: str | None = None) -> BaseException:
        if not self._open or getattr(error, "agreed", False) or isinstance(error, RankError):
            return error
        self._failed = True
        info = {
            "rank": self.rank,
            "device": str(self._manager.device),
            "cause": type(error).__name__,
            "detail": str(error),
            "node_id": node_id,
            "traceback": traceback_module.format_tb(error.__traceback__),
        }
        first = self._store.compare_set(self._key("abort"), "", pickle.dumps(info).hex())
        self._data.abort()
        # Whoever failed first has said so before its connections closed, so a collective that broke here because of
        # that finds the report, even where the watcher has not seen it yet.
        report = pickle.loads(bytes.fromhex(first.decode()))
        same = all(report[key] == info[key] for key in ("cause", "detail", "node_id"))
        return error if report["rank"] == self.rank or same else self._error_of(report)

    def check(self) -> None:
        if self._abort is not None and not self._failed:
            raise self._rank_error()

    # --- decisions -------------------------------------------------------------------------------------------------

    def decide(self, topic: str, choose: Callable[[], T]) -> T:
        turn = self._next()
        if self.rank:
            return pickle.loads(self._read(turn, 0, "decision", topic))
        self.check()
        try:
            value = choose()
        except BaseException as error:
            self.fail(error)
            raise
        self._put(turn, "decision", topic, pickle.dumps(value))
        self._stale.append(f"{turn}/0")
        return value

    def gather(self, topic: str, value: T) -> list[T]:
        turn = self._next()
        self._put(turn, "gathering", topic, pickle.dumps(value))
        values = [pickle.loads(self._read(turn, rank, "gathering", topic)) for rank in range(self.world_size)]
        if self.rank == 0:
            # Whoever answered this has read every earlier decision; the answers themselves are still being read.
            self._delete_stale()
            self._stale += [f"{turn}/{rank}" for rank in range(self.world_size)]
        return values

    def share(self, topic: str, produce: Callable[[], Any]) -> Any:
        turn = self._next()
        if self.rank == 0:
            self.check()
            try:
                with self.alone():
                    value = produce()
                payload = _packed(value)
            except BaseException as error:
                self.fail(error)
                raise
            large = len(payload) > _LARGE
            self._put(turn, "sharing", topic, pickle.dumps(len(payload)) if large else b"\x01" + payload)
            self._stale.append(f"{turn}/0")
            if large:
                self._everyone().broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            return value
        head = self._read(turn, 0, "sharing", topic)
        if head[:1] == b"\x01":
            return _unpacked(head[1:])
        buffer = torch.empty(pickle.loads(head), dtype=torch.uint8)
        self._everyone().broadcast(buffer)
        return _unpacked(buffer.numpy().tobytes())

    def _everyone(self) -> Any:
        return self._data.group(range(self.world_size), "cpu")

    # --- interrupts ------------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this rank works on its own, so that it may stop without asking the others."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def interrupt_check(self) -> None:
        """What `throw_exception_if_processing_interrupted` does.

        Ranks that move together stop at `gate` or before the next node. When neither comes within `_PATIENCE_S` (a long
        loop inside a node), rank 0 leaves by itself, as if it had failed, and the others follow at their next check.
        """
        if self._alone or not self._open:
            comfy.model_management.raise_if_interrupted()
            return
        if self.rank:
            self.check()  # rank 0 does not: it is about to make the same mistake, and should tell it as its own
            return
        if not comfy.model_management.processing_interrupted():
            return
        now = time.monotonic()
        if self._cancelled_at is None:
            self._cancelled_at = now
        elif now - self._cancelled_at > _PATIENCE_S:
            comfy.model_management.raise_if_interrupted()

    def gate(self) -> None:
        """Once per denoiser call: all ranks go on, or all raise InterruptProcessingException here."""
        if not self._open:
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

    def _next(self) -> str:
        """The key of the next turn; rank r's part is below it at /r."""
        self._counter += 1
        return self._key(str(self._counter))

    def _put(self, turn: str, kind: str, topic: str, payload: bytes = b"") -> None:
        """Write this rank's part of a turn: what it is, a zero byte, the content."""
        self._store.set(f"{turn}/{self.rank}", f"{kind} {topic}".encode() + b"\0" + payload)

    def _read(self, turn: str, rank: int, kind: str, topic: str) -> bytes:
        """The content of a rank's part of a turn. Raises OutOfStepError when that rank is at something else."""
        theirs, _, payload = self._wait(f"{turn}/{rank}").partition(b"\0")
        mine = f"{kind} {topic}"
        if theirs == mine.encode():
            return payload
        error = OutOfStepError(
            f"the ranks took different ways: rank {self.rank} is at {mine!r}, rank {rank} at {theirs.decode()!r}. A node "
            "goes by something that differs between ranks (a clock, a file, a random number); set TACO_RANKS = 'first' "
            "on its class"
        )
        self.fail(error)
        raise error

    def _delete_stale(self) -> None:
        for key in self._stale:
            self._store.delete_key(key)
        self._stale.clear()

    def _wait(self, key: str) -> bytes:
        self._awaiting = key
        try:
            self.check()
            value = self._store.get(key)
        finally:
            self._awaiting = None
        if value == _POISON:
            raise self._rank_error()
        return value

    def _rank_error(self) -> BaseException:
        unknown = {"rank": -1, "device": "?", "cause": "unknown", "detail": "another rank failed"}
        return self._error_of(self._abort or unknown)

    @staticmethod
    def _error_of(report: dict[str, Any]) -> BaseException:
        """What a rank raises because of another's report."""
        if report["cause"] == "InterruptProcessingException":
            error = comfy.model_management.InterruptProcessingException()
            error.agreed = True  # type: ignore[attr-defined]
            return error
        return RankError(**report)

    def _read_abort(self) -> None:
        """Wait for the watcher to have the failed rank's report: every failed epoch has one."""
        with self._abort_seen:
            self._abort_seen.wait_for(lambda: self._abort is not None, timeout=10)

    def _watch(self) -> None:
        epoch = 1
        while True:
            try:
                value = self._watch_store.get(f"epoch/{epoch}/abort")
            except (RuntimeError, ValueError) as error:  # the store is gone: the job is ending
                logging.debug("abort watcher ends: %s", error)
                return
            if value != _DONE:
                info = pickle.loads(bytes.fromhex(value.decode()))
                with self._abort_seen:  # as one: nothing of it may reach into the next epoch
                    if epoch == self.epoch:
                        self._abort = info
                        self._data.abort()
                        awaited = self._awaiting
                        if awaited is not None:
                            self._watch_store.set(awaited, _POISON)
                    self._abort_seen.notify_all()
            epoch += 1


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(payload: bytes) -> Any:
    # The sender is our own rank 0, with whatever classes its nodes return.
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)
