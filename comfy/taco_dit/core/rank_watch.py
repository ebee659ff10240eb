"""Rank 0's watch over a running prompt: cancels to which the main thread cannot react, and followers that hang.

The main thread may be inside a collective that a peer never entered. Followers give signs of life while a prompt runs,
from a thread of their own: a process that computes for an hour gives them, one that is stopped or blocked as a whole does
not.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from comfy_execution.lockstep import NO_ANSWER

from .control_channel import ConnectionLost

if TYPE_CHECKING:
    from .rank_group import RankGroup

LOOK_S = 1.0
GIVE_UP_S = 5.0  # how long rank 0 may stay inside a collective after a cancel before the collective is abandoned
WARN_S = 5.0  # without a sign of life for so long a follower is named
SILENT_S = 60.0  # without a sign of life for so long a follower is ended, by default
END_S = 10.0  # the same once the prompt has failed; also how long it may take to reach the end after rank 0 did
STUCK_S = 60.0  # how long a follower that gives signs of life may take, from the failure


def beat_key(rank: int) -> str:
    """Key of a follower's last sign of life."""
    return f"beat/{rank}"


class RankWatch:
    """A thread that looks after the ranks of `group` every LOOK_S while a prompt runs."""

    def __init__(self, group: RankGroup, silent_s: float) -> None:
        self._group = group
        self._silent_s = silent_s
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._troubled_at: float | None = None
        self._silent: set[int] = set()  # followers that were named because they gave no sign of life
        self._ending: set[int] = set()  # followers that rank 0 ended because this prompt failed
        self._epoch = 0

    def begin(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="taco-rank-watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            epoch = self._group.running_epoch()
            if epoch is None:
                continue
            if epoch != self._epoch:
                self._epoch = epoch
                self._beats.clear()
                self._ending.clear()
                self._silent.clear()
                self._troubled_at = None
            try:
                self._look(epoch)
            except ConnectionLost:  # the job is ending
                return

    def _look(self, epoch: int) -> None:
        group, now = self._group, time.monotonic()
        troubled = group.troubled()
        if not troubled and group.cancelled_for() > GIVE_UP_S:
            group.report(epoch, 0, "InterruptProcessingException", "cancelled")
        self._troubled_at = (self._troubled_at or now) if troubled else None
        for rank in group.members.followers():
            if group.members.lost(rank):  # replaced already, by a process that takes no part in this prompt
                continue
            beat = group.last_beat(rank)
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = (beat, now)
            self._warn(rank, now - self._beats[rank][1])
            self._judge(epoch, rank, now - self._beats[rank][1], now - (self._troubled_at or now))

    def _warn(self, rank: int, silent: float) -> None:
        """Name a follower that gives no sign of life, and say when it does again."""
        if silent > WARN_S and rank not in self._silent:
            self._silent.add(rank)
            logging.warning(
                "rank %d does not answer since %.0f s; it is ended and started again if it stays so for %.0f s",
                rank, silent, self._silent_s,
            )  # fmt: skip
        elif silent <= WARN_S and rank in self._silent:
            self._silent.remove(rank)
            logging.warning("rank %d answers again", rank)

    def _judge(self, epoch: int, rank: int, silent: float, troubled: float) -> None:
        """End a follower that hangs. `silent`: seconds since its last sign of life; `troubled`: since the failure."""
        group = self._group
        if silent > (END_S if troubled else self._silent_s):
            why = f"no sign of life for {silent:.0f} s"
        elif troubled > STUCK_S:
            why = f"still busy {troubled:.0f} s after the prompt failed"
        else:
            return
        if rank in self._ending or group.has_left(epoch, rank) or group.running_epoch() != epoch:
            return  # it is being ended, or has left the prompt and waits
        self._ending.add(rank)
        group.report(epoch, rank, NO_ANSWER, why)
        group.end_from_outside(rank, f"rank {rank}: {why}")
