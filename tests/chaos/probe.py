"""Whether HTTP answers: a thread that asks for /prompt all the time, and notices when processors were too busy for it."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

TIMEOUT_S = 10.0
TICK_S = 0.1


@dataclass
class Absence:
    """From the first question without an answer in time to the first good answer, in seconds since 1970."""

    start: float
    end: float
    stalled: float  # s in that time for which this process or a thread of rank 0 was ready, but had no processor

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def busy(self) -> bool:
        """Whether other processes on the machine explain it."""
        return self.stalled > self.seconds / 2


def waits_for_processor(pid: int) -> dict[int, float]:
    """Thread id -> seconds for which it was ready to run without a processor, since its start; Linux only."""
    waits = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/schedstat", encoding="utf-8") as file:
                waits[int(thread)] = int(file.read().split()[1]) / 1e9
    return waits


class Probe:
    """Asks every `interval` seconds; an answer later than `limit` seconds counts as none. `pid()`: rank 0's process.

    `absences`: those that ended. `longest`: the slowest good answer in s.
    """

    def __init__(self, port: int, pid: Callable[[], int | None], interval: float = 0.5, limit: float = 1.0) -> None:
        self.port, self.pid, self.interval, self.limit = port, pid, interval, limit
        self.absences: list[Absence] = []
        self.longest = 0.0
        self.answers = 0
        self._away_since: float | None = None
        self._stalls: list[tuple[float, float]] = []
        self._before: tuple[int, dict[int, float]] | None = None  # rank 0's process and waits before the last question
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._tick)]

    def start(self) -> None:
        """Begin; call it when the server answers."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 1)

    def absence_after(self, moment: float) -> float:
        """Longest time in s without HTTP that ended after `moment`, but for stalls of the whole machine."""
        spans = [a.seconds for a in self.absences if a.end > moment and not a.busy]
        if self._away_since is not None:
            spans.append(time.time() - self._away_since)
        return max(spans, default=0.0)

    def _stalled(self, start: float, end: float) -> float:
        """Longest time in s for which this process or a thread of rank 0 had no processor between two times."""
        own = max((late for at, late in self._stalls if start - 1 <= at <= end + 1), default=0.0)
        if self._before is None or self._before[0] != self.pid():
            return own
        before = self._before[1]
        waits = waits_for_processor(self._before[0])
        return max([own, *(wait - before.get(thread, 0.0) for thread, wait in waits.items())])

    def _ask(self) -> None:
        while not self._stop.wait(self.interval):
            begun = time.time()
            if self._away_since is None:
                pid = self.pid()
                self._before = None if pid is None else (pid, waits_for_processor(pid))
            good = self._once()
            now = time.time()
            if good:
                self.answers += 1
            since = begun if self._away_since is None else self._away_since
            if good and (self._away_since is not None or now - begun > self.limit):
                self.absences.append(Absence(since, now, self._stalled(since, now)))
                self._away_since = None
            elif good:
                self.longest = max(self.longest, now - begun)
            else:
                self._away_since = since

    def _once(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/prompt")
            answer = connection.getresponse()
            answer.read()
            return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _tick(self) -> None:
        while not self._stop.is_set():
            before = time.monotonic()
            time.sleep(TICK_S)
            late = time.monotonic() - before - TICK_S
            if late > 0.2:
                self._stalls.append((time.time(), late))
