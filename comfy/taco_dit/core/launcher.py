"""From one command to N ranks: which GPUs, how many ranks, and starting them under our supervisor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config_manager import DEFAULT_FILE, ConfigError, TacoConfig, load_config, validate_for
from .processes import die_with_parent, name_process, shares_gpus

START_MESSAGES = "TACO_START_MESSAGES"  # messages of the start, one per line, for rank 0 to show in the page


class LaunchError(ValueError):
    """A start that cannot work; the message says why and what to do."""


@dataclass(frozen=True)
class LaunchPlan:
    """What to start."""

    ranks: int
    cpu: bool
    gpus: tuple[int, ...] = ()
    messages: tuple[str, ...] = ()


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether the supervisor or torchrun started this process as one of its ranks."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, without touching them; 0 without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()


def _visible(environ: Mapping[str, str], present: int) -> tuple[list[str], list[str]]:
    """(usable, missing) entries of CUDA_VISIBLE_DEVICES, or all GPUs without it."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(i) for i in range(present)], []
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    known = [e for e in entries if not e.lstrip("-").isdigit() or 0 <= int(e) < present]
    return known if present else [], [e for e in entries if e not in known or not present]


def plan_launch(args: argparse.Namespace, environ: Mapping[str, str], present: int) -> LaunchPlan:
    """Decide ranks and devices from flags, environment and the number of GPUs present.

    GPUs that do not exist are left out and named; without any the CPU computes. Raises LaunchError.
    """
    messages = []
    if args.cpu:
        usable: list[str] = []
    elif args.gpus is not None:
        usable = [str(gpu) for gpu in args.gpus if gpu < present]
        missing = [str(gpu) for gpu in args.gpus if gpu >= present]
        if missing and usable:
            messages.append(f"GPU {', '.join(missing)} not found ({present} present): left out")
        if not usable:
            wanted = ", ".join(str(gpu) for gpu in args.gpus)
            messages.append(f"GPU {wanted} not found ({present} present): computing on the CPU, which is slow")
    else:
        usable, missing = _visible(environ, present)
        if missing:
            messages.append(f"CUDA_VISIBLE_DEVICES names GPU {', '.join(missing)}, not found: left out")
        if not usable:
            messages.append("no NVIDIA GPU found: computing on the CPU, which is slow")
    if args.cuda_device is not None and usable:
        if args.cuda_device >= present:
            raise LaunchError(f"--cuda-device {args.cuda_device}: this machine has GPUs 0 to {present - 1}")
        usable = [str(args.cuda_device)]
    if args.default_device is not None and str(args.default_device) in usable:
        usable = [str(args.default_device), *(g for g in usable if g != str(args.default_device))]
    cpu = not usable
    ranks = args.taco_ranks or max(1, len(usable))
    if args.disable_taco_dit:
        ranks = 1
    if not cpu and ranks > len(usable) and not shares_gpus(environ):
        raise LaunchError(
            f"--taco-ranks {ranks} needs {ranks} GPUs but {len(usable)} can be used ({', '.join(usable)}); "
            f"give at most {len(usable)}, or add --cpu"
        )
    gpus = tuple(int(g) for g in usable[:ranks] if g.isdigit())
    return LaunchPlan(ranks, cpu, gpus, tuple(messages))


def read_config(args: argparse.Namespace, root: str, ranks: int) -> TacoConfig:
    """The configuration file named by --taco-config, else `taco_dit_config.yaml` in `root`, else defaults.

    Raises ConfigError.
    """
    path = args.taco_config or os.path.join(root, DEFAULT_FILE)
    if args.taco_config is None and not os.path.isfile(path):
        return TacoConfig()
    return validate_for(load_config(path), ranks)


# All ranks are on this host: NCCL's ranks find each other on the loopback interface, and its status port, which answers
# anybody on this host, stays closed. Ranks that hang are found and ended by us, not by torch's monitor.
_NCCL = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_RAS_ENABLE": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def worker_environment(plan: LaunchPlan, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the ranks."""
    out = {START_MESSAGES: "\n".join(plan.messages)}
    if plan.gpus:
        out["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in plan.gpus)
        out["CUDA_DEVICE_ORDER"] = environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        out |= {name: value for name, value in _NCCL.items() if name not in environ}
    if "OMP_NUM_THREADS" not in environ:
        out["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // plan.ranks))
    return out


def launch(plan: LaunchPlan, script: str, argv: Sequence[str], fork: bool) -> int:
    """Run `script` on every rank until it ends; returns the exit status. `fork`: from one process (`template`).

    Ctrl-C and SIGTERM end all ranks. A rank that dies is replaced; see `supervisor`.
    """
    from .supervisor import Supervisor

    environment = {**os.environ, **worker_environment(plan, os.environ)}
    return Supervisor([sys.executable, "-u", script, *argv], plan.ranks, environment, fork).run()


def name_rank(environ: Mapping[str, str]) -> None:
    """Name this process after its rank, for `ps` and our own tools."""
    name_process(f"taco-rank-{environ['RANK']}")


__all__ = [
    "ConfigError", "LaunchError", "LaunchPlan", "count_gpus", "die_with_parent", "is_worker", "launch", "name_rank",
    "plan_launch", "read_config", "worker_environment",
]  # fmt: skip
