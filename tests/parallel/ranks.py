"""Run a function on several ranks, each a process of its own, connected through gloo on this machine.

`run_ranks(3, function, *args)` calls `function(manager, *args)` on ranks 0, 1, 2 and returns their results in rank
order. An exception on a rank is raised here with that rank's traceback.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT = 120


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from comfy.cli_args import args as flags
    from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager

    flags.cpu = True
    try:
        manager = TACODiTDistributedManager(RankInfo(rank, world_size, rank, world_size), torch.device("cpu"))
        results.put((rank, True, function(manager, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    # Rank 0 hosts the store: it stays until all results are in.
    results.join() if hasattr(results, "join") else None


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Results of `function(manager, *args)` on every rank. Raises AssertionError when a rank fails or hangs."""
    context = mp.get_context("spawn")
    results = context.JoinableQueue()
    port = free_port()
    ranks = [
        context.Process(target=_enter, args=(rank, world_size, port, function, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        answers = [results.get(timeout=timeout) for _ in ranks]
    except Exception as error:
        raise AssertionError(f"no answer from some of {world_size} ranks within {timeout} s") from error
    finally:
        for _ in ranks:
            try:
                results.task_done()
            except ValueError:
                break
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, good, text in sorted(answers, key=lambda a: a[0]) if not good]
    assert not failed, "\n".join(failed)
    return [value for _, _, value in sorted(answers, key=lambda a: a[0])]
