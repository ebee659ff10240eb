"""A process that has run the packs' own preparations and imported everything a rank needs, and forks the ranks.

Importing torch and our code takes most of a rank's start: with the template it is done once, and a rank that ended is
back within moments. Ranks share the memory of what was imported. The template never touches a GPU, since CUDA cannot be
used in a fork of a process that did, and runs no thread. The supervisor starts it, sends requests over a packet socket
(`TACO_TEMPLATE_FD`) and is told of the ends of ranks; see `RankTemplate` for its side, `serve` for the template's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .processes import die_with_parent, name_process

T = TypeVar("T")
TEMPLATE = "TACO_TEMPLATE_FD"
_PACKET = 1 << 18  # bytes: a request carries a rank's whole environment
_MODULES = (
    "app.panel", "app.run", "comfy.sd", "comfy.samplers", "comfy.taco_dit.core.execution_engine",
    "comfy.taco_dit.core.lockstep", "comfy.taco_dit.utils.monitor", "comfy_execution.worker", "execution", "nodes", "server",
)  # fmt: skip


class ForkedProcess:
    """A rank that the template forked; the part of `subprocess.Popen` that the supervisor uses."""

    def __init__(self, template: RankTemplate, pid: int) -> None:
        self._template = template
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        self._template.collect()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        self._template.wait_for(self, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self.returncode


class RankTemplate:
    """The supervisor's side. `fileno` can be read when a rank ended or the template did."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = {**environment, TEMPLATE: str(theirs.fileno())}
        self._process = subprocess.Popen(command, env=own, start_new_session=True, pass_fds=[theirs.fileno()])
        theirs.close()
        self._ranks: dict[int, ForkedProcess] = {}
        self._answers: list[dict[str, Any]] = []
        self.alive = True

    def fileno(self) -> int:
        """Descriptor for `select`; only while `alive`."""
        return self._socket.fileno()

    def start(self, environment: Mapping[str, str], door: int) -> ForkedProcess:
        """Fork a rank with this environment and the door with this descriptor. Raises RuntimeError when it cannot."""
        request = json.dumps(dict(environment)).encode()
        try:
            socket.send_fds(self._socket, [request], [door])
        except OSError as error:
            self._lost()
            raise RuntimeError(f"the process that ranks are forked from is gone: {error}") from None
        while self.alive and not self._answers:
            self._read(blocking=True)
        if not self._answers:
            raise RuntimeError("the process that ranks are forked from ended")
        answer = self._answers.pop()
        if "refused" in answer:
            raise RuntimeError(str(answer["refused"]))
        rank = self._ranks[answer["pid"]] = ForkedProcess(self, answer["pid"])
        return rank

    def collect(self) -> None:
        """Take note of ranks that ended."""
        while self.alive and select.select([self._socket], [], [], 0)[0]:
            self._read(blocking=False)

    def wait_for(self, rank: ForkedProcess, timeout: float | None) -> None:
        """Until a rank ended, at most `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while rank.returncode is None and self.alive:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return
            self._read(blocking=False)

    def _read(self, blocking: bool) -> None:
        try:
            packet = self._socket.recv(_PACKET, 0 if blocking else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._lost()
            return
        message = json.loads(packet)
        if "ended" in message:
            rank = self._ranks.pop(message["ended"], None)
            if rank is not None:
                rank.returncode = message["status"]
        else:
            self._answers.append(message)

    def _lost(self) -> None:
        """The template ended, and its ranks end with it (`die_with_parent`)."""
        self.alive = False
        for rank in self._ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            rank.returncode = -signal.SIGKILL
        self._ranks.clear()
        self._socket.close()

    def abandon(self) -> None:
        """End the template, so that a `start` that waits for it raises RuntimeError; from a signal handler."""
        self._process.kill()

    def close(self) -> None:
        """End the template; ranks must have ended."""
        if self.alive:
            self._lost()
        self._process.kill()
        self._process.wait()


# --- the template's side --------------------------------------------------------------------------------------------------


def serve(prepare: Callable[[], T]) -> T:
    """In the template: `prepare`, import everything, then fork ranks.

    Returns what `prepare` did in each rank, with its environment in place: what `prepare` changed in the environment is
    changed there too. The template itself leaves by SystemExit, when the supervisor closes the socket.
    """
    die_with_parent()
    name_process("taco-template")
    with _without_cuda():
        before = dict(os.environ)
        prepared = prepare()
        # not earlier: a pack that starts the program anew, to use what it has installed, starts the template anew
        requests = socket.socket(fileno=int(os.environ.pop(TEMPLATE)))
        changes = _changes(before, os.environ)
        for module in _MODULES:
            importlib.import_module(module)
    reason = _unfit()
    gc.collect()
    gc.freeze()  # so that collections in the ranks do not copy what they share
    while True:
        wanted, doors = _next_request(requests)
        if reason:
            requests.send(json.dumps({"refused": reason}).encode())
            os.close(doors[0])
            continue
        pid = os.fork()
        if pid == 0:
            requests.close()
            _become_rank(wanted, changes, doors[0])
            return prepared
        os.close(doors[0])
        requests.send(json.dumps({"pid": pid}).encode())


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """Variables that were set, and as None those that were removed, except for the template's own."""
    names = {*before, *after} - {TEMPLATE}
    return {name: after.get(name) for name in names if before.get(name) != after.get(name)}


@contextlib.contextmanager
def _without_cuda() -> Any:
    """Inside, torch answers whether there are GPUs through NVML, which does not initialise CUDA."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _unfit() -> str:
    """Why ranks cannot be forked from this process; empty when they can."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        return f"a module started the thread {threads[0]} when it was imported"
    with open("/proc/self/maps", encoding="utf-8") as file:
        loaded = "libcuda.so" in file.read()
    # Any function of the driver fails before its initialisation.
    if loaded and ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0:
        return "a module used CUDA when it was imported"
    return ""


def _next_request(requests: socket.socket) -> tuple[dict[str, str], list[int]]:
    """The next rank's environment and door; reports the ends of ranks meanwhile. Raises SystemExit at the end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        while True:
            _report_ends(requests)
            sources: list[Any] = [requests, reading]
            ready = select.select(sources, [], [])[0]
            if reading in ready:
                os.read(reading, 4096)
            if requests in ready:
                packet, doors, _, _ = socket.recv_fds(requests, _PACKET, 1)
                if not packet:
                    raise SystemExit(0)
                return json.loads(packet), doors
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def _report_ends(requests: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        message = {"ended": pid, "status": os.waitstatus_to_exitcode(status)}
        try:
            requests.send(json.dumps(message).encode())
        except OSError:
            raise SystemExit(0) from None


def _become_rank(environment: dict[str, str], changes: Mapping[str, str | None], door: int) -> None:
    """In the fork: what a process started with this environment would be."""
    import numpy
    import torch

    from .control_plane import DOOR

    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.set_inheritable(door, True)  # for `execv`
    os.environ.clear()
    os.environ.update(environment)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.environ[DOOR] = str(door)
    numpy.random.seed()
    torch.seed()
