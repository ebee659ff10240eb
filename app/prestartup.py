"""`prestartup_script.py` of node packs: run before the program sets itself up, so that packs can prepare for it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import time

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


def run_prestartup_scripts(args: argparse.Namespace, rank: int = 0) -> None:
    """Run the script of every pack that this rank is to load; one that fails is named and skipped."""
    if rank == 0:
        manager.prestartup(args)
    times: list[tuple[float, str, bool]] = []
    for script in scripts(args, rank):
        before = time.perf_counter()
        good = _run(script)
        times.append((time.perf_counter() - before, os.path.dirname(script), good))
    if times:
        logging.info("Prestartup times for custom nodes:")
        for seconds, path, good in sorted(times):
            logging.info("%6.1f seconds%s: %s", seconds, "" if good else " (PRESTARTUP FAILED)", path)


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
