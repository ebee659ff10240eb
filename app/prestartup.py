"""`prestartup_script.py` of node packs: run before the program sets itself up, so that packs can prepare for it."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import time

import folder_paths

SCRIPT = "prestartup_script.py"


def scripts(args: argparse.Namespace) -> list[str]:
    """The scripts of all packs that the flags let in, in the order in which they run."""
    found = []
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            script = os.path.join(folder, name, SCRIPT)
            unwanted = args.disable_all_custom_nodes and name not in args.whitelist_custom_nodes
            if not unwanted and not name.endswith(".disabled") and os.path.isfile(script):
                found.append(script)
    return found


def run_prestartup_scripts(args: argparse.Namespace) -> None:
    """Run the script of every pack that the flags let in; one that fails is named and skipped."""
    times: list[tuple[float, str, bool]] = []
    for script in scripts(args):
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
