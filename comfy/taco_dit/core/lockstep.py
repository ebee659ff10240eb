"""Decisions of rank 0, agreed by all ranks, over the control store.

Every prompt is an epoch. Within it, rank r's part of the n-th turn of a task lives under the key epoch/task/n/r, so
rank 0 never waits for followers except where it gathers. Each value begins with what it is about, so that ranks that took
different ways find out at the first key they read of each other, instead of waiting for each other for ever.

Failures travel by the event log, which a thread on every rank reads: a rank that leaves a prompt appends a report, the
supervisor appends that a process ended. The thread then abandons the data plane, which frees a thread that is inside a
collective, and ends the waits of this rank. So a rank is waited for as long as its process lives and nobody failed; after
a failure every rank must come to `end` within END_S or is ended from outside.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import socket
import threading
import time
import traceback as traceback_module
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

import comfy.model_management
from comfy_execution.lockstep import MAIN_TASK, Lockstep, RankError, current_task, is_alone

from .control_store import (
    EVENT_COUNT,
    STOPPING,
    Connections,
    EventReader,
    Waits,
    append_event,
    end_request_key,
    event_key,
)
from .distributed_manager import TACODiTDistributedManager
from .members import Members

T = TypeVar("T")
_LARGE = 1 << 20  # bytes from which a shared value travels by the data plane
_PATIENCE_S = 2.0  # how long a cancelled prompt may take to reach a point where all ranks stop together
_GIVE_UP_S = 5.0  # how long rank 0 may stay inside a collective after a cancel before the collective is abandoned
BEAT_S = 2.0  # how often a follower gives a sign of life while a prompt runs
SILENT_S = 60.0  # without one for so long it is ended
END_S = 10.0  # how long a follower may take to leave a prompt that failed, once rank 0 has left it
STUCK_S = 60.0  # how long a follower that gives signs of life may take, from the failure
FIRST_END_S = 300.0  # the same for rank 0, which costs the queue when it is ended
ABORT_S = 5.0  # how long to wait for the abort of the process groups; it goes on in its thread
CAUSE_S = 2.0  # how long to wait for the cause of a broken connection
JOIN_S = 600.0  # how long a rank may take to start
_LOST_PEER = ("connection closed", "connection reset", "broken pipe", "connection refused", "gloo", "nccl", "socket")


class OutOfStepError(RuntimeError):
    """Ranks ask for different things at the same turn."""


class _Turns:
    """The turns of one task in one epoch: their number, and the keys this rank has written."""

    def __init__(self) -> None:
        self.count = 0
        self.keys: list[str] = []


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
        self.on_members: Callable[[list[dict[str, Any]]], None] = lambda infos: None
        self.epoch = 0
        self._prompt_id = ""
        self._open = False
        self._failed = False
        self._abort: dict[str, Any] | None = None
        self._coming: dict[int, dict[str, Any]] = {}  # reports of epochs this rank has not begun
        self._tasks: dict[str, _Turns] = {}
        self._old_keys: list[str] = []
        self._cancelled_at: float | None = None
        self._abandoning: threading.Thread | None = None
        self._envelope: dict[str, Any] = {}  # of the prompt that was announced last
        self._commands: dict[int, int] = {}
        self._renew = False
        self._beaten_at = 0.0
        self._ending: set[int] = set()  # followers that this prompt's failure made rank 0 end
        self._changed = threading.Condition(threading.RLock())
        self._connections = Connections(manager.another_store)
        self._waits = Waits(self._connections)
        self.members = Members(self.rank, self.world_size)
        self._seen = self._deleted = self._first_event()
        EventReader(manager.another_store(), self._seen, self._on_event).begin()
        if self.rank == 0:
            threading.Thread(target=self._look_after_ranks, name="taco-ranks", daemon=True).start()
        else:
            self._waits.on_tick = self._beat

    def _first_event(self) -> int:
        """Number of the last event that does not concern this process.

        A process that takes a rank's place begins with what happens from now on. So does a rank 0 that began anew in the
        same process (a pack called `execv`); it has the followers replaced, and numbers epochs above those used.
        """
        if self.rank == 0:
            starts = int(self._store.add("starts of rank 0", 1))
            if starts > 1:
                self.epoch = (starts - 1) * 1_000_000
                for rank in range(1, self.world_size):
                    self._store.set(end_request_key(rank), "rank 0 began anew")
                return int(self._store.add(EVENT_COUNT, 0))
            return 0
        return int(self._store.add(EVENT_COUNT, 0)) if self._manager.info.incarnation else 0

    # --- who is there ----------------------------------------------------------------------------------------------

    def join(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """This rank is ready; `info` describes it (plain data). On rank 0: wait for all, and all descriptions.

        Raises TimeoutError naming the ranks that did not start within JOIN_S.
        """
        event = {"kind": "joined", "rank": self.rank, "incarnation": self._manager.info.incarnation, "info": info}
        if self.rank:
            append_event(self._store, event)
            return [info]
        with self._changed:
            self.members.joined(event)
            if not self._changed.wait_for(lambda: not self.members.missing(), JOIN_S):
                raise TimeoutError(f"rank {_listed(self.members.missing())} did not start within {JOIN_S:.0f} s")
            self._renew = False
            return self._infos()

    def _infos(self) -> list[dict[str, Any]]:
        return [self.members.infos[rank] for rank in sorted(self.members.infos)]

    def prepare(self) -> bool:
        with self._changed:
            missing = self.members.missing() if self.members.infos else []
            if missing:
                logging.warning("waiting for rank %s, which is being started again", _listed(missing))
            end = time.monotonic() + JOIN_S
            while self.members.infos and self.members.missing():
                comfy.model_management.raise_if_interrupted()
                if time.monotonic() > end:
                    rank = self.members.missing()[0]
                    self._end_from_outside(rank, f"rank {rank} was not ready within {JOIN_S:.0f} s")
                    raise RankError(**self.members.report(rank))
                self._changed.wait(0.2)
            if missing:
                logging.warning("rank %s is back", _listed(missing))
            return self._renew

    def _end_from_outside(self, rank: int, why: str) -> None:
        """Ask the supervisor to end a rank; without one (torchrun) end it from here, and torchrun starts all again."""
        logging.error("%s; it is ended and started again", why)
        if self._manager.supervised:
            self._store.set(end_request_key(rank), why)
            return
        info = self.members.infos.get(rank, {})
        if info.get("host") == socket.gethostname() and info.get("pid") not in (None, os.getpid()):
            os.kill(int(info["pid"]), signal.SIGKILL)

    # --- commands: rank 0 tells followers what to run --------------------------------------------------------------

    def announce(self, command: dict[str, Any]) -> None:
        """Send a command to all followers; only rank 0. A follower deletes a command when it has read it."""
        kind = command.get("kind")
        envelope = {"command": pickle.dumps(command), "kind": kind, "epoch": self.epoch + 1}
        with self._changed:
            envelope |= {"seen": self._seen, "renew": self._renew}
            followers = [(rank, self.members.incarnations[rank]) for rank in self.members.followers()]
        payload = pickle.dumps(envelope)
        if kind == "stop":
            self._store.set(STOPPING, b"1")
        if kind == "prompt":
            self._envelope = envelope
        for rank, incarnation in followers:
            self._commands[rank] = self._commands.get(rank, 0) + 1
            self._store.set(f"command/{rank}.{incarnation}/{self._commands[rank]}", payload)

    def commands(self) -> Iterator[dict[str, Any]]:
        """Commands for a follower, as they come; waiting costs no CPU time."""
        number = 0
        while True:
            number += 1
            key = f"command/{self.rank}.{self._manager.info.incarnation}/{number}"
            envelope = pickle.loads(self._store.get(key))
            self._store.delete_key(key)
            if envelope["kind"] == "prompt":
                self._envelope = envelope
            try:
                command = pickle.loads(envelope["command"])
            except Exception as error:  # noqa: BLE001 - a value of a class that this rank does not have
                logging.exception("a command of rank 0 cannot be read on this rank")
                self.refuse("", error)
                continue
            if command.get("kind") == "stop":
                return
            yield command

    # --- prompts ---------------------------------------------------------------------------------------------------

    def begin(self, prompt_id: str) -> None:
        envelope, self._envelope = self._envelope, {}
        if self._abandoning is not None:
            self._abandoning.join(ABORT_S)
            self._abandoning = None
        with self._changed:
            self._changed.wait_for(lambda: self._seen >= envelope.get("seen", 0), CAUSE_S)
            self.epoch = envelope.get("epoch", self.epoch + 1)
            self._prompt_id = prompt_id
            self._abort = self._coming.get(self.epoch)
            self._coming = {epoch: report for epoch, report in self._coming.items() if epoch > self.epoch}
            if self._abort is None and self.members.dead:
                self._abort = self.members.report(min(self.members.dead))
            self._old_keys += [key for turns in self._tasks.values() for key in turns.keys]
            self._tasks = {}
            self._failed = False
            self._ending = set()
            self._cancelled_at = None
            self._renew = False
            if envelope.get("renew"):
                self._data.abort()
            if self._data.aborted:
                self._data.renew(self.epoch)
            self._open = self._waits.busy = True
        self._waits.poke()

    def end(self) -> None:
        if not self._open:
            return
        turns, turn = self._next(MAIN_TASK)
        self._put(turns, turn, "end", "of the prompt")  # for a rank that still waits for something of this one
        try:
            problem: BaseException | None = None
            if self.rank == 0:
                problem = self._end_first()
            else:
                self._end_follower()
        finally:
            with self._changed:
                self._open = self._waits.busy = False
        self._delete([key for turns in self._tasks.values() for key in turns.keys] + self._old_keys)
        self._tasks, self._old_keys = {}, []
        if problem is None and self._abort is None and not self._failed:
            return
        self._abandon(self.epoch)  # all ranks, so that all start a new generation
        if problem is not None:
            raise problem
        if not self._failed:  # also when the report came during the last node, where nothing asked any more
            raise self._rank_error()

    def _end_first(self) -> BaseException | None:
        """Rank 0 waits for all that live, then tells them how it ended; an exception when it ended only here."""
        problem: BaseException | None = None
        seen = [self._seen]
        failed = False
        deadline = self._Deadline(self, END_S)
        for rank in range(1, self.world_size):
            key = self._key(f"end/{rank}")
            while rank not in self.members.dead:
                value = self._waits.get(key, partial(self._stop_waiting_for, rank, deadline))
                if value is not None:
                    status = pickle.loads(value)
                    failed |= status["failed"]
                    seen.append(status["seen"])
                    break
                if rank in self.members.dead:
                    break
                if not self._troubled() and self._cancelled_too_long():
                    problem = self.fail(comfy.model_management.InterruptProcessingException())
                    comfy.model_management.interrupt_current_processing(False)
                elif self._troubled():
                    self._wait_for_death(rank)
            self._store.delete_key(key)
        with self._changed:
            if failed and self._abort is None and not self._failed:
                self._changed.wait_for(lambda: self._abort is not None, CAUSE_S)
            report = self._abort
            followers = self.members.followers()
            everybody = not self.members.dead
        verdict = pickle.dumps({"failed": failed or self._failed or report is not None, "report": report})
        for rank in followers:
            self._store.set(self._key(f"verdict/{rank}"), verdict)
        if everybody:
            for number in range(self._deleted + 1, min(seen) + 1):
                self._store.delete_key(event_key(number))
            self._deleted = max(self._deleted, min(seen))
        return problem

    def _stop_waiting_for(self, rank: int, deadline: RankLockstep._Deadline) -> bool:
        return rank in self.members.dead or deadline.over()

    def _wait_for_death(self, rank: int) -> None:
        """A follower did not leave a failed prompt in time: have it ended, and go on without it."""
        self._end_from_outside(rank, f"rank {rank} did not leave the prompt within {END_S:.0f} s of its failure")
        with self._changed:
            if not self._changed.wait_for(lambda: rank in self.members.dead, END_S):
                self.members.dead[rank] = "it did not answer"

    def _end_follower(self) -> None:
        status = {"failed": self._failed or self._abort is not None, "seen": self._seen}
        self._store.set(self._key(f"end/{self.rank}"), pickle.dumps(status))
        key = self._key(f"verdict/{self.rank}")
        deadline = self._Deadline(self, FIRST_END_S)
        value = self._waits.get(key, deadline.over)
        if value is None:
            self._end_from_outside(0, f"rank 0 did not leave the prompt within {FIRST_END_S:.0f} s of its failure")
            raise RuntimeError("rank 0 does not answer")
        self._store.delete_key(key)
        verdict = pickle.loads(value)
        with self._changed:
            if verdict["failed"] and self._abort is None:
                self._abort = verdict["report"] or _UNKNOWN

    class _Deadline:
        """Runs from when the prompt is known to have failed, or was cancelled; without either there is none."""

        def __init__(self, lockstep: RankLockstep, seconds: float) -> None:
            self._lockstep = lockstep
            self._seconds = seconds
            self._since: float | None = None

        def over(self) -> bool:
            """Whether whoever waits should look after it."""
            if not self._lockstep._troubled():
                return self._lockstep._cancelled_too_long()
            if self._since is None:
                self._since = time.monotonic()
            return time.monotonic() - self._since > self._seconds

    def refuse(self, prompt_id: str, error: BaseException) -> None:
        if not self._open:
            if not self._envelope:
                return
            self.begin(prompt_id)
        self.fail(error)
        try:
            self.end()
        except Exception as other:  # noqa: BLE001 - the prompt is refused already
            logging.debug("while a prompt was refused: %s", other)

    # --- failures --------------------------------------------------------------------------------------------------

    def _on_event(self, number: int, event: dict[str, Any]) -> None:
        kind = event["kind"]
        with self._changed:
            self._seen = number
            if kind == "failed":
                self._note_failure(event["epoch"], event["report"])
            elif kind == "died" and self.members.died(event):
                self._renew = True
                self._commands.pop(int(event["rank"]), None)
                if self._open:
                    self._note_failure(self.epoch, self.members.report(int(event["rank"])))
            elif kind == "joined":
                self.members.joined(event)
            self._changed.notify_all()
        if kind == "joined" and self.rank == 0:
            self.on_members(self._infos())
        self._waits.poke()

    def _note_failure(self, epoch: int, report: dict[str, Any]) -> None:
        if epoch > self.epoch:
            self._coming.setdefault(epoch, report)
        elif epoch == self.epoch and self._open and self._abort is None:
            self._abort = report
            self._abandon(epoch, wait=False)

    def _abandon(self, epoch: int, wait: bool = True) -> None:
        """Leave the collectives of an epoch, in a thread: the abort of a communicator may take its time."""
        with self._changed:
            if epoch != self.epoch:
                return
            if self._abandoning is None:
                self._abandoning = threading.Thread(target=self._data.abort, name="taco-abort", daemon=True)
                self._abandoning.start()
            thread = self._abandoning
        if wait:
            thread.join(ABORT_S)
            if thread.is_alive():
                logging.error("the process groups of the failed prompt could not be left within %.0f s", ABORT_S)

    def fail(self, error: BaseException, node_id: str | None = None) -> BaseException:
        if not self._open or getattr(error, "agreed", False) or isinstance(error, RankError):
            return error
        info = {
            "rank": self.rank,
            "device": str(self._manager.device),
            "cause": type(error).__name__,
            "detail": str(error),
            "node_id": node_id,
            "traceback": traceback_module.format_tb(error.__traceback__),
        }
        with self._changed:
            if _lost_peer(error):  # whoever left or died is reported by itself or by the supervisor
                self._changed.wait_for(lambda: self._abort is not None, CAUSE_S)
            self._failed = True
            known = self._abort is not None
        if not known:
            number = append_event(self._store, {"kind": "failed", "epoch": self.epoch, "report": info})
            with self._changed:
                self._changed.wait_for(lambda: self._seen >= number, CAUSE_S)
        self._abandon(self.epoch)
        report = self._abort or info
        mine = report["rank"] == self.rank and report["cause"] == info["cause"]
        same = all(report[key] == info[key] for key in ("cause", "detail", "node_id"))
        return error if mine or same else self._error_of(report)

    def check(self) -> None:
        if self._abort is not None and not self._failed:
            raise self._rank_error()

    def _troubled(self) -> bool:
        return self._failed or self._abort is not None

    def _rank_error(self) -> BaseException:
        return self._error_of(self._abort or _UNKNOWN)

    @staticmethod
    def _error_of(report: dict[str, Any]) -> BaseException:
        """What a rank raises because of another's report."""
        if report["cause"] == "InterruptProcessingException":
            error = comfy.model_management.InterruptProcessingException()
            error.agreed = True  # type: ignore[attr-defined]
            return error
        return RankError(**report)

    # --- decisions -------------------------------------------------------------------------------------------------

    def decide(self, topic: str, choose: Callable[[], T]) -> T:
        if is_alone():
            return choose()
        turns, turn = self._next()
        if self.rank:
            return pickle.loads(self._read(turn, 0, "decision", topic))
        self.check()
        try:
            value = choose()
        except BaseException as error:
            self.fail(error)
            raise
        self._put(turns, turn, "decision", topic, pickle.dumps(value))
        return value

    def gather(self, topic: str, value: T) -> list[T]:
        if is_alone():
            raise RuntimeError(f"a node that runs on rank 0 only asks all ranks for {topic!r}; use TACO_RANKS = 'all'")
        turns, turn = self._next()
        read, turns.keys = turns.keys, []
        self._put(turns, turn, "gathering", topic, pickle.dumps(value))
        values = [pickle.loads(self._read(turn, rank, "gathering", topic)) for rank in range(self.world_size)]
        self._delete(read)  # whoever answered this has read what came before it in this task
        return values

    def share(self, topic: str, produce: Callable[[], Any]) -> Any:
        if is_alone():
            return produce()
        turns, turn = self._next()
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
            self._put(turns, turn, "sharing", topic, pickle.dumps(len(payload)) if large else b"\x01" + payload)
            if large:
                self._everyone().broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
            return value
        head = self._read(turn, 0, "sharing", topic)
        if head[:1] == b"\x01":
            return _unpacked(head[1:])
        buffer = torch.empty(pickle.loads(head), dtype=torch.uint8)
        with self.computing.released():
            self._everyone().broadcast(buffer)
        return _unpacked(buffer.numpy().tobytes())

    def _everyone(self) -> Any:
        return self._data.group(range(self.world_size), "cpu")

    def leave(self) -> None:
        prompt_id, name = current_task()
        if self._open and prompt_id == self._prompt_id and not is_alone():
            turns, turn = self._next()
            self._put(turns, turn, "end", f"of {name}")

    # --- interrupts ------------------------------------------------------------------------------------------------

    def interrupt_check(self) -> None:
        """What `throw_exception_if_processing_interrupted` does.

        Ranks that move together stop at `gate` or before the next node. When neither comes within `_PATIENCE_S` (a long
        loop inside a node), rank 0 leaves by itself, as if it had failed, and the others follow at their next check.
        """
        if is_alone() or not self._open:
            comfy.model_management.raise_if_interrupted()
            return
        if self.rank:
            self.check()  # rank 0 does not: it is about to make the same mistake, and should tell it as its own
        elif self._cancelled_too_long():
            comfy.model_management.raise_if_interrupted()

    def _cancelled_for(self) -> float:
        """Seconds since rank 0 first saw that the prompt was cancelled; 0 when it was not."""
        if self.rank or not comfy.model_management.processing_interrupted():
            return 0.0
        now = time.monotonic()
        if self._cancelled_at is None:
            self._cancelled_at = now
        return now - self._cancelled_at

    def _cancelled_too_long(self) -> bool:
        return self._cancelled_for() > _PATIENCE_S

    def _beat(self) -> None:
        """On a follower: a sign of life, which a process that is stopped or blocked as a whole does not give."""
        now = time.monotonic()
        if now - self._beaten_at >= BEAT_S:
            self._beaten_at = now
            with self._connections.borrow() as store:
                store.set(f"beat/{self.rank}", str(now))

    def _look_after_ranks(self) -> None:
        """On rank 0, in a thread, while a prompt runs: obey a cancel and end ranks that hang.

        The main thread may be inside a collective that a peer never entered, and cannot look itself.
        """
        beats: dict[int, tuple[bytes, float]] = {}
        troubled_at: float | None = None
        while True:
            time.sleep(1.0)
            with self._changed:
                epoch, running = self.epoch, self._open
                troubled, cancelled = self._troubled(), self._cancelled_for()
            if not running:
                beats.clear()
                troubled_at = None
                continue
            if not troubled and cancelled > _GIVE_UP_S:
                self._report(epoch, 0, "InterruptProcessingException", "cancelled")
            now = time.monotonic()
            troubled_at = (troubled_at or now) if troubled else None
            for rank in self.members.followers():
                beat = self._last_beat(rank)
                if rank not in beats or beats[rank][0] != beat:
                    beats[rank] = (beat, now)
                self._judge(epoch, rank, now - beats[rank][1], now - (troubled_at or now))

    def _last_beat(self, rank: int) -> bytes:
        with self._connections.borrow() as store:
            key = f"beat/{rank}"
            return bytes(store.get(key)) if store.check([key]) else b""

    def _judge(self, epoch: int, rank: int, silent: float, troubled: float) -> None:
        """End a follower that hangs. `silent`: seconds since its last sign of life; `troubled`: since the failure."""
        with self._connections.borrow() as store:
            if silent > BEAT_S and store.check([f"epoch/{epoch}/end/{rank}"]):
                return  # it has left the prompt and waits
        if silent > (END_S if troubled else SILENT_S):
            why = f"no sign of life for {silent:.0f} s"
        elif troubled > STUCK_S:
            why = f"still busy {troubled:.0f} s after the prompt failed"
        else:
            return
        with self._changed:
            if epoch != self.epoch or not self._open or rank in self._ending:
                return
            self._ending.add(rank)
        self._report(epoch, rank, "NoAnswer", why)
        self._end_from_outside(rank, f"rank {rank}: {why}")

    def _report(self, epoch: int, rank: int, cause: str, detail: str) -> None:
        """Append a failure that did not come from code of this rank's prompt."""
        device = str(self.members.infos.get(rank, {}).get("device", "?"))
        report = _UNKNOWN | {"rank": rank, "device": device, "cause": cause, "detail": detail}
        with self._connections.borrow() as store:
            append_event(store, {"kind": "failed", "epoch": epoch, "report": report})

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

    def _next(self, name: str | None = None) -> tuple[_Turns, str]:
        """The next turn of the current task (or of `name`): its keys and its own key; rank r's part is below it at /r.

        Raises RuntimeError in a task of a prompt that is over.
        """
        prompt_id, task_name = current_task()
        if prompt_id and prompt_id != self._prompt_id:
            raise RuntimeError(f"prompt {prompt_id} is over; {task_name} has nothing to agree on any more")
        turns = self._tasks.setdefault(name or task_name, _Turns())
        turns.count += 1
        return turns, self._key(f"{name or task_name}/{turns.count}")

    def _put(self, turns: _Turns, turn: str, kind: str, topic: str, payload: bytes = b"") -> None:
        """Write this rank's part of a turn: what it is, a zero byte, the content."""
        key = f"{turn}/{self.rank}"
        turns.keys.append(key)
        with self._connections.borrow() as store:
            store.set(key, f"{kind} {topic}".encode() + b"\0" + payload)

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

    def _wait(self, key: str) -> bytes:
        self.check()
        with self.computing.released():
            value = self._waits.get(key, self._no_more_waiting)
        if value is None:
            self._old_keys.append(key)  # it holds the mark that ended the wait
            if not self._troubled():
                comfy.model_management.raise_if_interrupted()
        self.check()
        if value is None:
            raise self._rank_error()
        return value

    def _no_more_waiting(self) -> bool:
        return self._troubled() or self._cancelled_too_long()

    def _delete(self, keys: list[str]) -> None:
        for key in keys:
            self._store.delete_key(key)


_UNKNOWN = {
    "rank": -1, "device": "?", "cause": "unknown", "detail": "another rank failed", "node_id": None, "traceback": [],
}  # fmt: skip


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _lost_peer(error: BaseException) -> bool:
    """Whether an error may follow from another rank that left or died."""
    text = str(error).lower()
    return isinstance(error, ConnectionError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_PEER)
    )


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(payload: bytes) -> Any:
    # The sender is our own rank 0, with whatever classes its nodes return.
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=False)
