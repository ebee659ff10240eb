"""Who this process is among the ranks, and the channels between them.

The control plane is a TCP key-value store (torch's TCPStore: the supervisor's or torchrun's own, else rank 0's). It carries
decisions and costs nothing while idle. The data plane carries tensors (`data_plane`). Neither reads global state
afterwards: `TACODiTDistributedManager` is made once, in main.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .control_store import INCARNATION, NEVER, SUPERVISED
from .data_plane import DataPlane


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


def rank_device(info: RankInfo, cpu: bool) -> torch.device:
    """The device of a rank: its local rank's GPU, or the CPU.

    Raises ValueError when there are fewer GPUs than ranks on this host.
    """
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if info.local_rank >= count:
        raise ValueError(
            f"rank {info.rank} needs GPU number {info.local_rank} but only {count} are visible; start at most {count} "
            "ranks per host (--taco-ranks), or add --cpu"
        )
    return torch.device("cuda", info.local_rank)


def connect_store(info: RankInfo, environ: Mapping[str, str]) -> Any:
    """A connection to the job's key-value store; rank 0 hosts it unless the supervisor or torchrun does."""
    agent_hosts = environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    store = dist.TCPStore(
        environ.get("MASTER_ADDR", "127.0.0.1"),
        int(environ.get("MASTER_PORT", "29500")),
        info.world_size,
        is_master=info.rank == 0 and not agent_hosts,
        timeout=datetime.timedelta(minutes=10),
        wait_for_workers=False,
    )
    store.set_timeout(NEVER)
    return dist.PrefixStore(f"taco/{info.restart}/", store)


class TACODiTDistributedManager:
    """This rank's identity, device, control store and data plane. One process alone needs none of the channels."""

    def __init__(self, info: RankInfo, device: torch.device, environ: Mapping[str, str] | None = None) -> None:
        self.info = info
        self.device = device
        self._environ = dict(os.environ if environ is None else environ)
        self.store: Any = None
        self.data: DataPlane | None = None
        if info.world_size > 1:
            self.store = connect_store(info, self._environ)
            self.data = DataPlane(dist.PrefixStore("groups/", self.store), info.rank, info.world_size, device)

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
        return bool(self._environ.get(SUPERVISED))

    def another_store(self) -> Any:
        """A further connection, for a thread of its own: a connection serves one blocking call at a time."""
        return connect_store_client(self.info, self._environ)

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


def connect_store_client(info: RankInfo, environ: Mapping[str, str]) -> Any:
    """A connection that never hosts."""
    return connect_store(info, {**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"})
