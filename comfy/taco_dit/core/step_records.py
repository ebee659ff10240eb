"""What steps took, beside what was predicted: one line for each network, size and plan, kept for the doctor."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from utils import atomic_files

FILE = os.path.join("taco_dit", "steps.json")  # in the user folder
_KEPT = 40


@dataclass(frozen=True)
class StepRecord:
    """Runs of one kind. measured_ms: the least mean of a run, as the first one captures and warms up. device: its name."""

    network: str
    conds: int
    pictures: int
    tokens: int
    ranks: int
    plan: str
    predicted_ms: float
    measured_ms: float
    runs: int = 1
    device: str = ""

    @property
    def work(self) -> tuple[str, int, int, int, str]:
        """What a step computes, and where."""
        return self.network, self.conds, self.pictures, self.tokens, self.device

    @property
    def kind(self) -> tuple[Any, ...]:
        """What makes runs comparable."""
        return *self.work, self.ranks, self.plan

    def text(self) -> str:
        """`ulysses 2, predicted 79.1 ms, measured 80.0 ms`."""
        return f"{self.plan}, predicted {self.predicted_ms:.1f} ms, measured {self.measured_ms:.1f} ms"


def read(path: str) -> list[StepRecord]:
    """The records in a file, the latest first; none when there is no file or it is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            return [StepRecord(**entry) for entry in json.load(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        logging.debug("%s cannot be read: %s", path, error)
        return []


def one_rank_ms(path: str, record: StepRecord) -> float | None:
    """What one rank took for a step of the same work on the same device; None when it was never measured."""
    return next((known.measured_ms for known in read(path) if known.ranks == 1 and known.work == record.work), None)


def add(path: str, record: StepRecord) -> None:
    """Add a run: the prediction is the latest, the time the least of its kind."""
    kept = read(path)
    before = next((known for known in kept if known.kind == record.kind), None)
    if before is not None:
        record = dataclasses.replace(
            record, measured_ms=min(record.measured_ms, before.measured_ms), runs=before.runs + record.runs
        )
    entries = [record, *(known for known in kept if known.kind != record.kind)][:_KEPT]
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        atomic_files.write(path, json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
    except OSError as error:
        logging.debug("%s cannot be written: %s", path, error)
