"""Run a function on several ranks, each a process of its own, connected through sockets on this machine.

`run_ranks(3, function, *args)` calls `function(manager, *args)` on ranks 0, 1, 2 and returns their results in rank
order. An exception on a rank is raised here with that rank's traceback, the end of its process with its exit status.

Ranks are forked from one process for all tests, which has imported torch and our code (`preload`), so they start within
a tenth of a second. They have one hash seed in common; the servers of tests/e2e have one each.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import torch

from comfy.cli_args import args as flags
from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager
from comfy.taco_dit.core.launcher import die_with_parent

TIMEOUT = 120.0
AFTER_FAILURE = 5.0
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _forks() -> ForkServerContext:
    """The processes' context; starts the process that ranks are forked from, which ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preload"])
    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _enter(
    rank: int, world_size: int, environment: dict[str, str], function: Callable[..., Any], args: Any, parent: Any
) -> None:
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    flags.cpu = True
    try:
        manager = TACODiTDistributedManager(RankInfo(rank, world_size, rank, world_size), torch.device("cpu"))
        answer = pickle.dumps((True, function(manager, *args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    parent.send_bytes(answer)
    with contextlib.suppress(EOFError):
        parent.recv_bytes()  # rank 0 hosts the store: all stay until all have answered, when this is closed


def _collect(processes: list[Any], answers: list[Any], timeout: float) -> list[tuple[bool, Any]]:
    """What each rank answered, or (False, why it did not)."""
    found: dict[int, tuple[bool, Any]] = {}
    end = time.monotonic() + timeout
    while len(found) < len(answers):
        waiting = {answer: rank for rank, answer in enumerate(answers) if rank not in found}
        ready = connection.wait(waiting, max(0.0, end - time.monotonic()))
        for rank in [] if ready else waiting.values():
            processes[rank].kill()
            found[rank] = False, f"no answer within {timeout} s"
        for answer in ready:
            rank = waiting[answer]
            try:
                found[rank] = pickle.loads(answer.recv_bytes())
            except EOFError:
                processes[rank].join()
                found[rank] = False, f"its process ended with status {processes[rank].exitcode}"
            if not found[rank][0]:
                timeout = min(timeout, AFTER_FAILURE)  # the others may wait for this one
                end = min(end, time.monotonic() + timeout)
    return [found[rank] for rank in range(len(answers))]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Results of `function(manager, *args)` on every rank. Raises AssertionError when a rank fails, ends or hangs."""
    context = _forks()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes, answers = [], []
    try:
        for rank in range(world_size):
            mine, its = context.Pipe()
            answers.append(mine)
            process = context.Process(
                target=_enter, args=(rank, world_size, environment, function, args, its), daemon=True
            )
            process.start()
            its.close()
            processes.append(process)
        found = _collect(processes, answers, timeout)
    finally:
        for answer in answers:
            answer.close()
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    failed = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(found) if not good]
    assert not failed, "\n".join(failed)
    return [value for _, value in found]
