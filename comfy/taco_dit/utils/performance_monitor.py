"""Where the time of a run goes, on each rank: computing, exchanging (waiting for peers included), or neither."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


class Clock:
    """Times denoiser calls and the exchanges inside them, without making the device wait.

    On CUDA, events are recorded and read at the end of a run; inside a CUDA graph nothing can be timed, so exchanges
    replayed by a graph count as computing.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: list[Any] = []
        self._exchanges: list[Any] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One denoiser call."""
        start = self._mark()
        yield
        self._calls.append((start, self._mark()))

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """One exchange with other ranks."""
        if self._cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        start = self._mark()
        yield
        self._exchanges.append((start, self._mark()))

    def _milliseconds(self, spans: list[Any]) -> float:
        if self._cuda:
            return sum(start.elapsed_time(stop) for start, stop in spans)
        return sum(stop - start for start, stop in spans) * 1e3

    def read(self) -> dict[str, float]:
        """Totals in ms since the last reading: `calls` (a count), `total`, `exchange`, `compute`."""
        if self._cuda:
            torch.cuda.synchronize()
        total, exchange = self._milliseconds(self._calls), self._milliseconds(self._exchanges)
        out = {"calls": len(self._calls), "total": total, "exchange": exchange, "compute": max(0.0, total - exchange)}
        self._calls, self._exchanges = [], []
        return out


@dataclass
class RunStatistics:
    """One sampling run, as rank 0 saw it after asking all ranks."""

    plan: str = "one rank"
    reason: str = ""
    world_size: int = 1
    calls: int = 0
    seconds: float = 0.0
    ranks: list[dict[str, float]] = field(default_factory=list)

    @property
    def mean_call_ms(self) -> float:
        """Mean time of a denoiser call on the slowest rank."""
        return max((r["total"] / max(1, r["calls"]) for r in self.ranks), default=0.0)

    @property
    def speedup(self) -> float:
        """Estimated speed against one rank: the computing of all ranks over the time of the slowest."""
        slowest = max((r["total"] for r in self.ranks), default=0.0)
        return sum(r["compute"] for r in self.ranks) / slowest if slowest else 1.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "mean_call_ms": self.mean_call_ms, "speedup_estimate": self.speedup}

    def text(self) -> str:
        """A few lines for people."""
        lines = [
            f"plan: {self.plan}" + (f" ({self.reason})" if self.reason else ""),
            f"parallel executions: {self.calls} in {self.seconds:.2f} s, mean {self.mean_call_ms:.1f} ms",
            f"estimated speed against one rank: {self.speedup:.2f} times",
        ]
        for rank, times in enumerate(self.ranks):
            per = max(1, times["calls"])
            lines.append(
                f"rank {rank}: compute {times['compute'] / per:.1f} ms, exchange {times['exchange'] / per:.1f} ms a call"
            )
        return "\n".join(lines)
