"""The parent of all ranks on this machine: starts them, ends them, and replaces one that ended unexpectedly.

It hosts the control hub, to which each rank gets a door of its own by inheritance. When a follower ends, that is written
into the hub's event log at once (every rank reads it and leaves the running prompt), and a new process takes its place; it
joins before the next prompt. When rank 0 ends, all ranks are started again. Ranks that end repeatedly, without a prompt
that succeeds in between or a quiet time, end the job. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .control_hub import Hub
from .control_plane import DOOR, HEALTHY, INCARNATION, RANK_0_RESTARTED, STOPPING
from .template import ForkedProcess, RankTemplate

MAX_REPLACEMENTS = 3  # in a series; one more ends the job
QUIET_S = 120.0  # a time without an end after which a new series begins
LOOK_S = 1.0  # the end of a process and requests of ranks are noticed at once; this is for signals that got lost
END_S = 5.0  # how long a rank may take to end after a signal
COMMAND_LINE = 2  # exit status of a start that cannot succeed and is not retried


def how_it_ended(status: int) -> str:
    """A process's exit status in words."""
    return f"process ended by signal {-status}" if status < 0 else f"process ended with status {status}"


class GivingUp(Exception):
    """The job cannot go on. `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """A signal asked for the end while ranks were being started."""


class Supervisor:
    """Runs `command` on `ranks` processes with `environment`; `run` returns the job's exit status."""

    def __init__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str], fork: bool = False) -> None:
        self._fork = fork
        self._template: RankTemplate | None = None
        self._command = list(command)
        self._ranks = ranks
        self._environment = dict(environment)
        self._processes: dict[int, subprocess.Popen[bytes] | ForkedProcess] = {}
        self._incarnations: dict[int, int] = {}
        self._series = 0  # ends of ranks since a prompt succeeded or a quiet time
        self._last_end = 0.0
        self._healthy = b""
        self._renewed: set[int] = set()  # ranks whose replacement rank 0 requested: not a fault, so not counted
        self._restart = -1
        self._signal: int | None = None
        self._requests: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()  # ranks to end, and why
        self._wake: socket.socket | None = None
        self._hub = Hub(self._request_end)

    # --- life ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the job ends by itself, by a signal, or because ranks end repeatedly."""
        with self._woken_by_signals() as woken:
            try:
                self._start_all()
                while True:
                    sources: list[Any] = [woken]
                    if self._template is not None and self._template.alive:
                        sources.append(self._template)
                    select.select(sources, [], [], LOOK_S)
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    if self._signal is not None:
                        return 128 + self._signal
                    self._obey_requests()
                    status = self._look_at_processes()
                    if status is not None:
                        return status
            except Stopped:
                return 128 + (self._signal or 0)
            except GivingUp as end:
                _say(str(end))
                return end.status
            finally:
                self._end_all(signal.SIGTERM)
                self._close_template()
                self._hub.close()

    @contextlib.contextmanager
    def _woken_by_signals(self) -> Iterator[socket.socket]:
        """A socket that can be read when a child ended, a signal came or a rank asked for something."""
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        before = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, self._take_signal)
        signal.signal(signal.SIGTERM, self._take_signal)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        self._wake = writing
        try:
            yield reading
        finally:
            self._wake = None
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            reading.close()
            writing.close()

    def _take_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        if self._template is not None and not self._processes:
            self._template.abandon()  # it may be importing for some seconds yet

    # --- processes -------------------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        self._restart += 1
        self._incarnations = dict.fromkeys(range(self._ranks), 0)
        for rank in range(self._ranks):
            self._start(rank)
            if self._signal is not None:
                raise Stopped

    def _start(self, rank: int) -> None:
        """Start a rank; from the main thread only: Linux ends a child with the thread that started it (`die_with_parent`)."""
        own = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks,
            "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": self._ranks,
            "TORCHELASTIC_RESTART_COUNT": self._restart, "TORCHELASTIC_MAX_RESTARTS": MAX_REPLACEMENTS,
            "TORCHELASTIC_RUN_ID": f"taco-{os.getpid()}", INCARNATION: self._incarnations[rank],
        }  # fmt: skip
        door = self._hub.make_door()
        own[DOOR] = door.fileno()
        environment = self._environment | {name: str(value) for name, value in own.items()}
        # A session of its own: Ctrl-C in a terminal goes to the supervisor alone, which then ends the ranks in order.
        with door:
            self._processes[rank] = self._make(environment, door.fileno())

    def _make(self, environment: dict[str, str], door: int) -> subprocess.Popen[bytes] | ForkedProcess:
        """A rank's process: forked from the template where that is possible, else a program of its own."""
        if self._fork:
            if self._template is None or not self._template.alive:
                self._close_template()
                self._template = RankTemplate(self._command, self._environment)
            try:
                return self._template.start(environment, door)
            except RuntimeError as error:
                if self._signal is not None:
                    raise Stopped from None
                _say(f"ranks are started one by one: {error}")
                self._fork = False
        return subprocess.Popen(self._command, env=environment, start_new_session=True, pass_fds=[door])

    def _close_template(self) -> None:
        if self._template is not None:
            self._template.close()

    def _look_at_processes(self) -> int | None:
        """React to processes that ended; the job's exit status when it is over."""
        states = {rank: process.poll() for rank, process in self._processes.items()}
        ended = {rank: status for rank, status in states.items() if status is not None}
        if 0 in ended:
            return self._first_ended(ended[0])
        for rank, status in ended.items():
            self._follower_ended(rank, status)
        return None

    def _first_ended(self, status: int) -> int | None:
        if status in (0, COMMAND_LINE):
            return status
        self._count_end(0, status)
        _say(f"rank 0: {how_it_ended(status)}; all ranks are started again")
        self._end_all(signal.SIGKILL)
        self._hub.clear()
        self._start_all()
        return None

    def _follower_ended(self, rank: int, status: int) -> None:
        del self._processes[rank]
        if self._hub.peek(STOPPING):
            return
        event = {"kind": "died", "rank": rank, "incarnation": self._incarnations[rank], "how": how_it_ended(status)}
        self._hub.append_event(event)
        if rank in self._renewed:
            self._renewed.remove(rank)
        else:
            self._count_end(rank, status)
        _say(f"rank {rank}: {how_it_ended(status)}; it is started again")
        self._incarnations[rank] += 1
        self._start(rank)

    def _count_end(self, rank: int, status: int) -> None:
        """Raises GivingUp when ranks end again and again and no prompt succeeds."""
        now, healthy = time.monotonic(), self._hub.peek(HEALTHY)
        succeeded = bool(healthy) and healthy != self._healthy  # empty: all ranks were started again since
        if now - self._last_end > QUIET_S or succeeded:
            self._series = 0
        self._last_end, self._healthy = now, healthy
        self._series += 1
        if self._series > MAX_REPLACEMENTS:
            raise GivingUp(
                f"rank {rank}: {how_it_ended(status)}. That is the {self._series}th end of a rank in a row without a "
                "prompt that succeeded, so the program ends; the lines above say why",
                status if status > 0 else 1,
            )

    def _request_end(self, rank: int, why: str) -> None:
        """Called by a thread of the hub."""
        self._requests.put((rank, why))
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(OSError):
                wake.send(b"\0")

    def _obey_requests(self) -> None:
        """End the ranks whose end was requested; this is then handled like any other end."""
        while not self._requests.empty():
            rank, why = self._requests.get()
            process = self._processes.get(rank)
            if process is None:
                continue
            _say(f"rank {rank} is ended: {why}")
            if why == RANK_0_RESTARTED:
                self._renewed.add(rank)
            process.kill()

    def _end_all(self, number: int) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)
        deadline = time.monotonic() + END_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _say(text: str) -> None:
    print(f"TACO-DiT: {text}", file=sys.stderr, flush=True)
