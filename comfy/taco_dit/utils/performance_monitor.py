"""Where the time of a run goes, on each rank: computing, exchanging (waiting for peers included), or neither."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Sums over denoiser calls, in ms."""

    calls: int = 0
    total: float = 0.0
    exchange: float = 0.0

    def plus(self, total: float, exchange: float) -> Times:
        """With one more call."""
        return Times(self.calls + 1, self.total + total, self.exchange + exchange)

    def as_dict(self) -> dict[str, float]:
        """`calls` (a count), `total`, `exchange`, `compute`."""
        return {**self._asdict(), "compute": max(0.0, self.total - self.exchange)}


class Clock:
    """Times denoiser calls and the exchanges inside them, without making the device wait.

    On CUDA, events are recorded and read at later calls, when the device has passed them; inside a CUDA graph nothing
    can be timed, so exchanges replayed by a graph count as computing. `run` (since `restart`) and `ever` are replaced,
    never changed, so that other threads may read them at any time. `observer` is called with each call's ms.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: collections.deque[tuple[Any, Any, list[Any]]] = collections.deque()
        self._exchanges: list[Any] = []
        self.run = Times()
        self.ever = Times()
        self.observer: Callable[[float], None] = lambda ms: None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One denoiser call."""
        self._fold()
        self._exchanges = []
        start = self._mark()
        yield
        self._calls.append((start, self._mark(), self._exchanges))
        if not self._cuda:
            self._fold()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """One exchange with other ranks."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        start = self._mark()
        yield
        self._exchanges.append((start, self._mark()))

    def _milliseconds(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) if self._cuda else (stop - start) * 1e3

    def _fold(self) -> None:
        """Add up the calls that the device is done with."""
        while self._calls and (not self._cuda or self._calls[0][1].query()):
            start, stop, exchanges = self._calls.popleft()
            total = self._milliseconds(start, stop)
            exchange = sum(self._milliseconds(*span) for span in exchanges)
            self.run, self.ever = self.run.plus(total, exchange), self.ever.plus(total, exchange)
            self.observer(total)

    def restart(self) -> None:
        """Begin a new run: `run` counts from here."""
        self.read()
        self.run = Times()

    def read(self) -> dict[str, float]:
        """Totals of the run, waiting for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        self._fold()
        return self.run.as_dict()


@dataclass
class RunStatistics:
    """One sampling run, as rank 0 saw it after asking all ranks."""

    plan: str = "one rank"
    layout: str = "whole"
    reason: str = ""
    reasons: list[dict[str, Any]] = field(default_factory=list)
    """The same, by code (`core.reasons`)."""
    working: int = 1
    """Ranks that computed something no other rank computed."""
    one_rank_ms: float | None = None
    """What one rank took for such a step, if it was measured."""
    predicted_ms: float | None = None
    world_size: int = 1
    calls: int = 0
    seconds: float = 0.0
    ranks: list[dict[str, float]] = field(default_factory=list)
    computed: int | None = None
    """How many calls were computed and not reused by the step cache; None without one."""
    lossy: list[str] = field(default_factory=list)
    """What makes the result another than the weights would give in the precision of their file."""

    @property
    def mean_call_ms(self) -> float:
        """Mean time of a denoiser call on the slowest rank."""
        return max((r["total"] / max(1, r["calls"]) for r in self.ranks), default=0.0)

    @property
    def speed_up(self) -> float | None:
        """Time of a step on one rank by that on all, both measured; None where one rank was not."""
        if self.one_rank_ms is None or not self.mean_call_ms or self.world_size == 1:
            return None
        return self.one_rank_ms / self.mean_call_ms

    def waste(self) -> str:
        """`2 ranks, 1 at work`, empty where all are."""
        return "" if self.working >= self.world_size else f"{self.world_size} ranks, {self.working} at work"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "mean_call_ms": self.mean_call_ms, "speed_up": self.speed_up}

    def text(self) -> str:
        """A few lines for people."""
        lines = [
            f"plan: {self.plan}" + (f" ({self.reason})" if self.reason else ""),
            f"weights: {self.layout}",
            f"parallel executions: {self.calls} in {self.seconds:.2f} s, mean {self.mean_call_ms:.1f} ms"
            + ("" if self.predicted_ms is None else f", predicted {self.predicted_ms:.1f} ms"),
        ]
        if self.waste():
            lines.append(self.waste())
        if self.speed_up is not None:
            lines.append(f"{self.speed_up:.2f} times as fast as one rank, measured: {self.one_rank_ms:.1f} ms")
        if self.lossy:
            lines.append(f"lossy: {', '.join(self.lossy)}")
        for rank, times in enumerate(self.ranks):
            per = max(1, times["calls"])
            lines.append(
                f"rank {rank}: compute {times['compute'] / per:.1f} ms, exchange {times['exchange'] / per:.1f} ms a call"
            )
        return "\n".join(lines)
