"""Which process is each rank's current one, according to the event log."""

from __future__ import annotations

from typing import Any

from comfy_execution.lockstep import PROCESS_ENDED


class Members:
    """Per rank: what it is (`describe`), how often it was replaced, and how it ended, until it is replaced.

    A process that joins while a prompt runs takes no part in that prompt: for it the rank stays lost.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.infos: dict[int, dict[str, Any]] = {}
        self.incarnations: dict[int, int] = dict.fromkeys(range(world_size), 0)
        self.dead: dict[int, str] = {}
        self._ended: dict[int, str] = {}  # how a rank ended last
        self._taking_part: dict[int, int] = dict(self.incarnations)

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
        self.dead[rank] = self._ended[rank] = str(event["how"])
        return True

    def give_up(self, rank: int, why: str) -> None:
        """Count a rank as ended, though nobody saw its end."""
        self.dead[rank] = self._ended[rank] = why

    def begin(self, incarnations: dict[int, int] | None) -> None:
        """A prompt begins, in which these processes take part: those to which it was announced, or the current ones."""
        if incarnations is not None:  # this process may not have heard of replacements before its own start
            self.incarnations = {rank: max(known, incarnations[rank]) for rank, known in self.incarnations.items()}
        self._taking_part = dict(self.incarnations if incarnations is None else incarnations)

    def lost(self, rank: int) -> bool:
        """Whether the process of a rank that takes part in the prompt has ended."""
        return rank in self.dead or self.incarnations[rank] > self._taking_part[rank]

    def lost_ranks(self) -> list[int]:
        """All such ranks."""
        return [rank for rank in range(self.world_size) if self.lost(rank)]

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
            "detail": self._ended.get(rank, "it ended"),
            "node_id": None,
            "traceback": [],
        }
