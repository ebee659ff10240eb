"""From one command to N ranks: which GPUs, how many ranks, and starting them under our supervisor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config_manager import DEFAULT_FILE, ConfigError, TacoConfig, load_config, validate_for
from .gpus import Choice, Gpu, choose_gpus, concerns, describe_used, list_gpus
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
    used: str = ""  # the GPUs, for the console; empty on the CPU


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether the supervisor or torchrun started this process as one of its ranks."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def plan_launch(args: argparse.Namespace, environ: Mapping[str, str], present: Sequence[Gpu]) -> LaunchPlan:
    """Decide ranks and devices from flags, environment and the GPUs present (`gpus.choose_gpus`).

    GPUs that do not exist are left out and named; without any the CPU computes. Raises LaunchError.
    """
    choice = choose_gpus(args, environ, present)
    usable = list(choice.devices)
    if args.cuda_device is not None and usable:
        if args.cuda_device >= len(present):
            raise LaunchError(f"--cuda-device {args.cuda_device}: this machine has GPUs 0 to {len(present) - 1}")
        usable = [str(args.cuda_device)]
        choice = Choice()  # what would be said of others
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
    used = usable[:ranks]
    gpus = tuple(int(g) for g in used if g.isdigit())
    said = "" if cpu else describe_used(used, choice.why, present, ranks)
    return LaunchPlan(ranks, cpu, gpus, (*choice.messages, *concerns(used, present)), said)


def settings_file(args: argparse.Namespace, root: str, name: str) -> str:
    """Where a person's settings are read from: in --base-directory when the file is there, else beside main.py (`root`)."""
    own = os.path.join(args.base_directory or root, name)
    return own if os.path.isfile(own) else os.path.join(root, name)


def read_config(args: argparse.Namespace, root: str, ranks: int) -> TacoConfig:
    """The configuration file named by --taco-config, else `taco_dit_config.yaml` (`settings_file`), else defaults.

    Raises ConfigError.
    """
    path = args.taco_config or settings_file(args, root, DEFAULT_FILE)
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
    "ConfigError", "LaunchError", "LaunchPlan", "die_with_parent", "is_worker", "launch", "list_gpus", "name_rank",
    "plan_launch", "read_config", "settings_file", "worker_environment",
]  # fmt: skip
