"""What this process is to the operating system."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Mapping

SHARE_GPU = "TACO_SHARE_GPU"
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def name_process(name: str) -> None:
    """What `ps` and `top` show of this process: up to 15 characters."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def shares_gpus(environ: Mapping[str, str]) -> bool:
    """Whether several ranks may use one GPU (`TACO_SHARE_GPU=1`).

    It lets somebody with fewer GPUs than ranks try what several ranks do under CUDA and NCCL. They take turns on the
    GPU, so it is slower than one rank.
    """
    return environ.get(SHARE_GPU, "") not in ("", "0")
