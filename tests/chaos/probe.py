"""Whether HTTP answers: a thread that asks for /prompt all the time, and one that notices when the machine stalls."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass

TIMEOUT_S = 10.0
TICK_S = 0.1


@dataclass
class Absence:
    """From the first question without an answer in time to the first good answer, in seconds since 1970."""

    start: float
    end: float
    stalled: float  # longest stall of this very process in that time, s: the machine was busy, not the server

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Probe:
    """Asks every `interval` seconds; an answer later than `limit` seconds counts as none.

    `absences`: those that ended. `longest`: the slowest good answer in s.
    """

    def __init__(self, port: int, interval: float = 0.5, limit: float = 1.0) -> None:
        self.port, self.interval, self.limit = port, interval, limit
        self.absences: list[Absence] = []
        self.longest = 0.0
        self.answers = 0
        self._away_since: float | None = None
        self._stalls: list[tuple[float, float]] = []
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

    def away_since(self) -> float | None:
        """Start of the absence that is on."""
        return self._away_since

    def absence_after(self, moment: float) -> float:
        """Longest time in s without HTTP that ended after `moment`, but for stalls of the whole machine."""
        spans = [a.seconds for a in self.absences if a.end > moment and a.stalled <= a.seconds / 2]
        if self._away_since is not None:
            spans.append(time.time() - self._away_since)
        return max(spans, default=0.0)

    def stalled(self, start: float, end: float) -> float:
        """Longest stall of this process between two times, s."""
        return max((late for at, late in self._stalls if start - 1 <= at <= end + 1), default=0.0)

    def _ask(self) -> None:
        while not self._stop.wait(self.interval):
            begun = time.time()
            good = self._once()
            now = time.time()
            if good and now - begun <= self.limit:
                self.answers += 1
                self.longest = max(self.longest, now - begun)
                if self._away_since is not None:
                    self.absences.append(Absence(self._away_since, now, self.stalled(self._away_since, now)))
                    self._away_since = None
            elif good:  # late: the absence lasted as long as the answer took
                since = begun if self._away_since is None else self._away_since
                self.absences.append(Absence(since, now, self.stalled(since, now)))
                self._away_since = None
            elif self._away_since is None:
                self._away_since = begun

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
