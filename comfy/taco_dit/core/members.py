"""Which process is each rank's current one, according to the event log."""

from __future__ import annotations

from typing import Any

from comfy_execution.lockstep import PROCESS_ENDED


class Members:
    """Per rank: what it is (`describe`), how often it was replaced, and how it ended, until it is replaced."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.infos: dict[int, dict[str, Any]] = {}
        self.incarnations: dict[int, int] = dict.fromkeys(range(world_size), 0)
        self.dead: dict[int, str] = {}

    def joined(self, event: dict[str, Any]) -> None:
        """A process took a rank's place and is ready. Events of an older process than the known one are ignored."""
        rank, incarnation = int(event["rank"]), int(event["incarnation"])
        if incarnation >= self.incarnations[rank]:
            self.incarnations[rank] = incarnation
            self.infos[rank] = event["info"]
            self.dead.pop(rank, None)

    def died(self, event: dict[str, Any]) -> bool:
        """A rank's process ended; whether that was the current one."""
        rank, incarnation = int(event["rank"]), int(event["incarnation"])
        if rank == self.rank or incarnation < self.incarnations[rank]:
            return False
        self.incarnations[rank] = incarnation
        self.dead[rank] = str(event["how"])
        return True

    def missing(self) -> list[int]:
        """Ranks without a process: not started yet, or ended and not replaced yet."""
        return [rank for rank in range(self.world_size) if rank not in self.infos or rank in self.dead]

    def followers(self) -> list[int]:
        """Ranks above 0 that have not ended."""
        return [rank for rank in range(1, self.world_size) if rank not in self.dead]

    def report(self, rank: int) -> dict[str, Any]:
        """What `RankError` says of a rank whose process ended."""
        device = str(self.infos.get(rank, {}).get("device", "?"))
        return {
            "rank": rank,
            "device": device,
            "cause": PROCESS_ENDED,
            "detail": self.dead.get(rank, "it ended"),
            "node_id": None,
            "traceback": [],
        }
