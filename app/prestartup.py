"""`prestartup_script.py` of node packs: run before the program sets itself up, so that packs can prepare for it.

Where ranks are forked from one process, that process runs the scripts, once for all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterator

import folder_paths
from app import manager

SCRIPT = "prestartup_script.py"


def scripts(args: argparse.Namespace, rank: int = 0) -> list[str]:
    """The scripts of all packs that this rank is to load, in the order in which they run."""
    found = []
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            script = os.path.join(folder, name, SCRIPT)
            unwanted = args.disable_all_custom_nodes and name not in args.whitelist_custom_nodes
            if unwanted or name.endswith(".disabled") or not os.path.isfile(script):
                continue
            if not manager.skips(args, os.path.join(folder, name), rank):
                found.append(script)
    return found


Times = list[tuple[float, str, bool]]  # seconds, folder of the pack, whether its script worked


def run_prestartup_scripts(args: argparse.Namespace, rank: int | None) -> Times:
    """Run the script of every pack that this rank is to load; one that fails is named and skipped.

    rank: None in the process that ranks are forked from, where the scripts run that are for all ranks.
    """
    if rank == 0:
        manager.prestartup(args)
    return _run_all(scripts(args, 1 if rank is None else rank))


def run_first_ranks_own(args: argparse.Namespace) -> Times:
    """On rank 0, forked from a process that ran what is for all ranks: what is for this rank alone."""
    manager.prestartup(args)
    common = scripts(args, 1)
    return _run_all([script for script in scripts(args, 0) if script not in common])


def _run_all(found: list[str]) -> Times:
    times: Times = []
    for script in found:
        before = time.perf_counter()
        with _one_at_a_time(script):
            good = _run(script)
        times.append((time.perf_counter() - before, os.path.dirname(script), good))
    return times


def report(times: Times) -> None:
    """Log how long the scripts took."""
    if times:
        logging.info("Prestartup times for custom nodes:")
        for seconds, path, good in sorted(times):
            logging.info("%6.1f seconds%s: %s", seconds, "" if good else " (PRESTARTUP FAILED)", path)


@contextlib.contextmanager
def _one_at_a_time(script: str) -> Iterator[None]:
    """No two ranks that were started as programs of their own run a script at once: scripts write files."""
    with open(script, "rb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # not on this system, or not on this file system
            pass
        yield


def _run(script: str) -> bool:
    try:
        spec = importlib.util.spec_from_file_location(
            os.path.dirname(script).replace(".", "_x_") + "_prestartup", script
        )
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # noqa: BLE001 - a broken pack must not stop the program
        logging.error("%s failed: %s: %s; the pack is loaded all the same", script, type(error).__name__, error)
        return False
    return True
