"""The processes of a job and their messages to each other: members, commands, failures.

Failures are announced in the event log, which a thread on every rank reads: a rank that leaves a prompt appends a
report, the supervisor appends that a process ended. The thread then abandons the data plane, which frees a thread that
is inside a collective, and ends the waits of this rank.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import traceback as traceback_module
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
from comfy_execution.lockstep import Lockstep, RankError

from . import pack_turns
from .control_channel import ConnectionLost
from .control_plane import RANK_0_RESTARTED, STOPPING
from .distributed_manager import TACODiTDistributedManager
from .members import Members
from .rank_watch import RankWatch, beat_key
from .wire import MalformedError, decode, encode

PATIENCE_S = 2.0  # how long a cancelled prompt may take to reach a point where all ranks stop together
BEAT_S = 2.0  # how often a follower gives a sign of life while a prompt runs
ABORT_S = 5.0  # how long to wait for the abort of the process groups; it goes on in its thread
CAUSE_S = 2.0  # how long to wait for the cause of a broken connection
JOIN_S = 600.0  # how long a rank may take to start
LONGEST_TEXT = 10_000  # characters of an error's message that other ranks get
MOST_FRAMES = 50  # of a traceback, the innermost ones
_LOST_PEER = ("connection closed", "connection reset", "broken pipe", "connection refused", "gloo", "nccl", "socket")
UNKNOWN = {
    "rank": -1, "device": "?", "cause": "unknown", "detail": "another rank failed", "node_id": None, "traceback": [],
}  # fmt: skip


class RankGroup(Lockstep):
    """The part of `Lockstep` that is about processes rather than decisions."""

    def __init__(self, manager: TACODiTDistributedManager, answer_deadline_s: float) -> None:
        if manager.control is None or manager.data is None:
            raise ValueError("RankLockstep needs several ranks; use Lockstep for one")
        self._manager = manager
        self._control = manager.control
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
        self._cancelled_at: float | None = None
        self._abandoning: threading.Thread | None = None
        self._envelope: dict[str, Any] = {}  # of the prompt that was announced last
        self._commands: dict[int, int] = {}
        self._renew = False
        self._running = threading.Event()  # set while a prompt runs
        self._changed = threading.Condition(threading.RLock())
        self.members = Members(self.rank, self.world_size)
        self._seen = self._first_event()
        self._control.listen(self._seen, self._on_event)
        if self.rank == 0:
            RankWatch(self, answer_deadline_s).begin()
        else:
            threading.Thread(target=self._beat, name="taco-beat", daemon=True).start()

    def _first_event(self) -> int:
        """Number of the last event that does not concern this process.

        A replacement process begins with the events from now on. So does a rank 0 that restarted in the same process (a
        pack called `execv`); it has the followers replaced and uses higher epoch numbers than before.
        """
        if self.rank == 0:
            starts = self._control.add("starts of rank 0", 1)
            if starts > 1:
                self.epoch = (starts - 1) * 1_000_000
                pack_turns.forget(self._control)
                for rank in range(1, self.world_size):
                    self._control.end_rank(rank, RANK_0_RESTARTED)
                return self._control.last_event()
            return 0
        return self._control.last_event() if self._manager.info.incarnation else 0

    # --- who is there ----------------------------------------------------------------------------------------------

    def join(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """This rank is ready; `info` describes it (plain data). On rank 0: wait for all, and all descriptions.

        Raises TimeoutError naming the ranks that did not start within JOIN_S.
        """
        event = {"kind": "joined", "rank": self.rank, "incarnation": self._manager.info.incarnation, "info": info}
        if self.rank:
            self._control.append_event(event)
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
                    self.end_from_outside(rank, f"rank {rank} was not ready within {JOIN_S:.0f} s")
                    raise RankError(**self.members.report(rank))
                self._changed.wait(0.2)
            if missing:
                logging.warning("rank %s is back", _listed(missing))
            return self._renew

    def end_from_outside(self, rank: int, why: str) -> None:
        """Ask the supervisor to end a rank; without one (torchrun) end it from here, and torchrun starts all again."""
        logging.error("%s; it is ended and started again", why)
        if self._manager.supervised:
            self._control.end_rank(rank, why)
            return
        info = self.members.infos.get(rank, {})
        if info.get("host") == socket.gethostname() and info.get("pid") not in (None, os.getpid()):
            os.kill(int(info["pid"]), signal.SIGKILL)

    # --- commands: rank 0 tells followers what to run --------------------------------------------------------------

    def announce(self, command: dict[str, Any]) -> None:
        """Send a command, plain data, to all followers; only rank 0. A follower deletes a command when it has read it.

        Raises UnsendableError, and then no rank has heard of the command.
        """
        kind = command.get("kind")
        content = encode(command)
        envelope = {"kind": kind, "epoch": self.epoch + 1}
        with self._changed:
            envelope |= {"seen": self._seen, "renew": self._renew, "members": dict(self.members.incarnations)}
            followers = [(rank, self.members.incarnations[rank]) for rank in self.members.followers()]
        payload = encode({**envelope, "command": content})
        if kind == "stop":
            self._control.set(STOPPING, b"1")
        if kind == "prompt":
            self._envelope = envelope
        for rank, incarnation in followers:
            self._commands[rank] = self._commands.get(rank, 0) + 1
            self._control.set(f"command/{rank}.{incarnation}/{self._commands[rank]}", payload)

    def commands(self) -> Iterator[dict[str, Any]]:
        """Commands for a follower, as they come; waiting costs no CPU time."""
        number = 0
        while True:
            number += 1
            key = f"command/{self.rank}.{self._manager.info.incarnation}/{number}"
            content = self._control.get(key)
            assert content is not None, "a wait without a condition ends with a value"
            self._control.delete(key)
            envelope = decode(content)
            if envelope["kind"] == "prompt":
                self._envelope = envelope
            try:
                command = decode(envelope.pop("command"))
            except MalformedError as error:
                logging.exception("a command of rank 0 cannot be read on this rank")
                self.refuse("", error)
                continue
            if command.get("kind") == "stop":
                return
            yield command

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
        self._control.poke()

    def _note_failure(self, epoch: int, report: dict[str, Any]) -> None:
        if epoch > self.epoch:
            self._coming.setdefault(epoch, report)
        elif epoch == self.epoch and self._open and self._abort is None:
            self._abort = report
            self._abandon(epoch, wait=False)

    def _abandon(self, epoch: int, wait: bool = True) -> None:
        """Leave the collectives of an epoch, in a thread: the abort of a communicator may take long."""
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
            "detail": shortened(str(error)),
            "node_id": node_id,
            "traceback": [shortened(line) for line in traceback_module.format_tb(error.__traceback__)[-MOST_FRAMES:]],
        }
        with self._changed:
            if _lost_peer(error):  # a rank that left or ended is reported by itself or by the supervisor
                self._changed.wait_for(lambda: self._abort is not None, CAUSE_S)
            self._failed = True
            known = self._abort is not None
        if not known:
            number = self._control.append_event({"kind": "failed", "epoch": self.epoch, "report": info})
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

    def troubled(self) -> bool:
        return self._failed or self._abort is not None

    def _rank_error(self) -> BaseException:
        return self._error_of(self._abort or UNKNOWN)

    @staticmethod
    def _error_of(report: dict[str, Any]) -> BaseException:
        """What a rank raises because of another's report."""
        if report["cause"] == "InterruptProcessingException":
            error = comfy.model_management.InterruptProcessingException()
            error.agreed = True  # type: ignore[attr-defined]
            return error
        return RankError(**report)

    def cancelled_for(self) -> float:
        """Seconds since rank 0 first saw that the prompt was cancelled; 0 when it was not."""
        if self.rank or not comfy.model_management.processing_interrupted():
            return 0.0
        now = time.monotonic()
        if self._cancelled_at is None:
            self._cancelled_at = now
        return now - self._cancelled_at

    def cancelled_too_long(self) -> bool:
        return self.cancelled_for() > PATIENCE_S

    def running_epoch(self) -> int | None:
        """Number of the prompt that runs, None between prompts."""
        with self._changed:
            return self.epoch if self._open else None

    def last_beat(self, rank: int) -> bytes:
        """A follower's last sign of life; empty before the first."""
        return self._control.peek(beat_key(rank))

    def has_left(self, epoch: int, rank: int) -> bool:
        """Whether a follower has come to the end of a prompt."""
        return bool(self._control.peek(f"epoch/{epoch}/end/{rank}"))

    def report(self, epoch: int, rank: int, cause: str, detail: str) -> None:
        """Append a failure that was not raised by this rank's own prompt."""
        device = str(self.members.infos.get(rank, {}).get("device", "?"))
        report = UNKNOWN | {"rank": rank, "device": device, "cause": cause, "detail": detail}
        self._control.append_event({"kind": "failed", "epoch": epoch, "report": report})

    def _beat(self) -> None:
        """On a follower: signs of life, which a process that is stopped or blocked as a whole does not give."""
        while True:
            self._running.wait()
            try:
                self._control.set(beat_key(self.rank), str(time.monotonic()).encode())
            except ConnectionLost:
                return
            time.sleep(BEAT_S)


def shortened(text: str) -> str:
    """A text that other ranks may get: its beginning and end if it is long."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _lost_peer(error: BaseException) -> bool:
    """Whether an error may follow from another rank that left or died."""
    text = str(error).lower()
    return isinstance(error, ConnectionError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _LOST_PEER)
    )
