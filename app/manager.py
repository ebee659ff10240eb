"""ComfyUI-Manager: the pip package behind `--enable-manager`, and older releases of it as a pack in custom_nodes.

It has routes and pages and no nodes, so it runs on rank 0 only. What it put off until the next start (installing what a
pack requires, restoring a snapshot) is done by a process of its own before there are ranks, because each rank imports
the packs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import folder_paths

PACKAGE = "comfyui_manager"
PREPARING = "TACO_PREPARING"  # set in the process that does what was put off
_PENDING = ("install-scripts.txt", "restore-snapshot.json")


class ManagerMissing(ValueError):
    """`--enable-manager` without the package; the message says how to install it."""


def check(args: argparse.Namespace) -> None:
    """Raises ManagerMissing when the package is asked for and is not installed."""
    if args.enable_manager and importlib.util.find_spec(PACKAGE) is None:
        raise ManagerMissing(
            f"--enable-manager: the package comfyui-manager is not installed; {sys.executable} -m pip install comfyui-manager"
        )


def package(args: argparse.Namespace) -> Any:
    """The package's module when it is asked for, else None."""
    return importlib.import_module(PACKAGE) if args.enable_manager else None


def is_manager(path: str) -> bool:
    """Whether a pack is a release of ComfyUI-Manager for custom_nodes."""
    return "comfyui-manager" in os.path.basename(path).lower()


def skips(args: argparse.Namespace, path: str, rank: int) -> bool:
    """Whether a pack in custom_nodes is not to be loaded: another Manager beside the package, any Manager on followers.

    The package may refuse other packs too.
    """
    if rank and is_manager(path):
        return True
    manager = package(args) if rank == 0 else None
    return manager is not None and bool(manager.should_be_disabled(path))


def prestartup(args: argparse.Namespace) -> None:
    """The package's preparations, on rank 0, before packs prepare. It takes stdout and stderr over for its log file."""
    manager = package(args)
    if manager is not None:
        manager.prestartup()


def start(args: argparse.Namespace) -> None:
    """Let the package add its routes to `PromptServer.instance` and announce them to pages."""
    manager = package(args)
    if manager is None or args.disable_manager_ui:
        return
    from comfy_api import feature_flags

    feature_flags.SERVER_FEATURE_FLAGS.setdefault("extension", {}).setdefault("manager", {})["supports_v4"] = True
    manager.start()


def middleware(args: argparse.Namespace) -> list[Any]:
    """The package's own check of requests, as a list of none or one."""
    manager = package(args)
    return [] if manager is None else [manager.create_middleware()]


def _put_off() -> bool:
    folder = os.path.join(folder_paths.get_system_user_directory("manager"), "startup-scripts")
    return any(os.path.isfile(os.path.join(folder, name)) for name in _PENDING)


def do_what_was_put_off(script: str, argv: list[str], environ: Mapping[str, str]) -> None:
    """Run `script` (main.py) as a process that prepares and ends, if the Manager put something off; before ranks start."""
    if _put_off():
        subprocess.run([sys.executable, script, *argv], env={**environ, PREPARING: "1"}, check=False)
