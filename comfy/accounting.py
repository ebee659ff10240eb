"""Where a prompt's time went, and what it moved: phases in seconds, events as counts.

Every part of the program reports here, and knows nothing of who reads it:

    with accounting.phase("load"):
        accounting.count("weight_bytes", tensor.nbytes)

Phases are exclusive: time inside a phase that is opened within another belongs to the inner one only, so that the phases
of one thread add up to at most the prompt's duration. Phases of other threads (pictures being encoded while sampling goes
on) run at the same time and are added to their own names. Names in use are in `PHASES` and `COUNTS`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PHASES = {
    "text": "encoding text",
    "load": "reading, patching and moving weights",
    "compile": "compiling kernels",
    "capture": "capturing CUDA graphs",
    "denoise": "denoiser calls and the sampler around them",
    "exchange": "waiting for and exchanging with other ranks, as far as it can be measured outside CUDA graphs",
    "vae": "encoding and decoding pictures",
    "save": "writing files",
}
COUNTS = {
    "weight_bytes": "bytes of weights copied to this rank's device",
    "weights_patched": "weights computed with patches (LoRA and its kin)",
    "calls_plain": "network calls launched kernel by kernel",
    "calls_captured": "network calls captured in a CUDA graph",
    "calls_replayed": "network calls replayed from a CUDA graph",
    "calls_compiled": "stages compiled by torch.compile",
}


@dataclass
class Record:
    """One prompt. `phases`: seconds by name. `counts`: numbers by name. `total`: seconds from begin to finish."""

    prompt_id: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    total: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_time(self, name: str, seconds: float) -> None:
        """Add to a phase; from any thread."""
        with self._lock:
            self.phases[name] = self.phases.get(name, 0.0) + seconds

    def add_count(self, name: str, number: int) -> None:
        """Add to a count; from any thread."""
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + number

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `prompt_id`, `total`, `phases`, `counts`, and `other`, seconds in no phase."""
        with self._lock:
            phases, counts = dict(self.phases), dict(self.counts)
        other = max(0.0, self.total - sum(phases.values()))
        return {"prompt_id": self.prompt_id, "total": self.total, "phases": phases, "counts": counts, "other": other}

    def text(self) -> str:
        """Phases of at least 10 ms and what was moved and captured, for one line of the console; may be empty."""
        said = self.as_dict()
        parts = [f"{name} {said['phases'][name]:.2f} s" for name in PHASES if said["phases"].get(name, 0) >= 0.01]
        if said["other"] >= 0.01 and parts:
            parts.append(f"other {said['other']:.2f} s")
        counts = said["counts"]
        if counts.get("weight_bytes"):
            parts.append(f"{counts['weight_bytes'] / 1e9:.2f} GB of weights moved")
        if counts.get("weights_patched"):
            parts.append(f"{counts['weights_patched']} weights patched")
        calls = [
            f"{counts[f'calls_{kind}']} {kind}"
            for kind in ("plain", "captured", "replayed")
            if counts.get(f"calls_{kind}")
        ]
        if calls:
            parts.append("calls: " + ", ".join(calls))
        return ", ".join(parts)


_current = Record()
_stack = threading.local()


def begin(prompt_id: str) -> Record:
    """Open the record of a prompt; what is reported from now on belongs to it."""
    global _current
    _current = Record(prompt_id)
    return _current


def current() -> Record:
    """The record of the prompt that runs, or ran last."""
    return _current


def finish() -> Record:
    """Close the current record: its total is the time since `begin`. It still takes what other threads add."""
    _current.total = time.perf_counter() - _current.started
    return _current


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Time inside belongs to phase `name` of the record that is open at its beginning."""
    record = _current
    outer: list[list[Any]] = _stack.__dict__.setdefault("open", [])
    now = time.perf_counter()
    if outer:
        record.add_time(outer[-1][0], now - outer[-1][1])
    outer.append([name, now])
    try:
        yield
    finally:
        now = time.perf_counter()
        closed, since = outer.pop()
        record.add_time(closed, now - since)
        if outer:
            outer[-1][1] = now


def count(name: str, number: int = 1) -> None:
    """Add `number` to a count of the current prompt."""
    _current.add_count(name, number)


def move(source: str, target: str, seconds: float) -> None:
    """Count seconds that were measured on the device under `target` instead of the phase `source` they fell in."""
    _current.add_time(source, -seconds)
    _current.add_time(target, seconds)
