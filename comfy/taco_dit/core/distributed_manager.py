"""Who this process is among the ranks, and the channels between them.

The control plane (`control_hub`, hosted by the supervisor, else by rank 0) carries decisions and costs nothing while idle.
The data plane carries tensors (`data_plane`). Neither reads global state
afterwards: `TACODiTDistributedManager` is made once, in main.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .control_client import ControlClient
from .control_hub import Hub
from .control_plane import DOOR, INCARNATION, connect
from .data_plane import DataPlane
from .processes import shares_gpus


@dataclass(frozen=True)
class RankInfo:
    """Place of a process in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restart: int = 0
    incarnation: int = 0  # how often this rank alone was replaced, by the supervisor

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> RankInfo:
        """From torchrun's variables; a single rank without them. Raises ValueError for a contradictory environment."""
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return cls()
        info = cls(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
            restart=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            incarnation=int(environ.get(INCARNATION, "0")),
        )
        if not 0 <= info.rank < info.world_size:
            raise ValueError(f"RANK={info.rank} is not below WORLD_SIZE={info.world_size}; start with torchrun")
        return info


def rank_device(info: RankInfo, cpu: bool, environ: Mapping[str, str] | None = None) -> torch.device:
    """The device of a rank: its local rank's GPU, or the CPU.

    Raises ValueError when there are fewer GPUs than ranks on this host and they may not share (`shares_gpus`).
    """
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if info.local_world_size > count and shares_gpus(os.environ if environ is None else environ):
        # NCCL refuses two ranks on one GPU of one host: for it each rank is a host of its own, reached by sockets.
        os.environ["NCCL_HOSTID"] = f"taco-rank-{info.rank}"
        return torch.device("cuda", info.local_rank % count)
    if info.local_rank >= count:
        raise ValueError(
            f"rank {info.rank} needs GPU number {info.local_rank} but only {count} are visible; start at most {count} "
            "ranks per host (--taco-ranks), or add --cpu"
        )
    return torch.device("cuda", info.local_rank)


class TACODiTDistributedManager:
    """This rank's identity, device, control plane and data plane. One process alone needs none of the channels."""

    def __init__(self, info: RankInfo, device: torch.device, environ: Mapping[str, str] | None = None) -> None:
        self.info = info
        self.device = device
        self._environ = dict(os.environ if environ is None else environ)
        self.control: ControlClient | None = None
        self.hub: Hub | None = None  # where this process hosts it
        self.data: DataPlane | None = None
        if info.world_size > 1:
            self.control, self.hub = connect(info.rank, info.world_size, self._environ)
            self.data = DataPlane(self.control, info.rank, info.world_size, device)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.info.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.info.world_size

    @property
    def supervised(self) -> bool:
        """Whether our supervisor started this process, rather than torchrun."""
        return DOOR in self._environ

    def describe(self) -> dict[str, Any]:
        """Rank, device, host and memory, for status reports."""
        import socket

        import comfy.model_management as management

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "rank": self.rank,
            "device": str(self.device),
            "name": name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "memory_total": int(management.get_total_memory(self.device)),
            "memory_free": int(management.get_free_memory(self.device)),
        }
