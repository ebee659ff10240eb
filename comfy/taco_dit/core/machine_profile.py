"""How fast a machine computes and communicates: the numbers that plans are estimated with (`costs.py`).

A profile is measured at the first start (`measuring.py`), made from data sheets (`hardware.py`), or assumed: the ratios of
a well-connected machine, for machines that are not measured. It is plain data and the same on every rank, so that all
ranks choose the same plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Points = tuple[tuple[int, float], ...]
"""(size, rate), ascending by size: matrix rows or attention rows against TFLOP/s."""


@dataclass(frozen=True)
class DeviceRates:
    """One device.

    matrix: bf16 matrix products by their number of rows (tokens), TFLOP/s. attention: by heads times queries, TFLOP/s.
    memory_gbs: reading and writing device memory, GB/s. memory_bytes: its size, 0 where it is unknown.
    """

    name: str
    matrix: Points
    attention: Points
    memory_gbs: float
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("matrix", "attention"):
            points = getattr(self, name)
            if not points or any(size < 1 or rate <= 0 for size, rate in points) or list(points) != sorted(points):
                raise ValueError(f"{self.name}: {name} needs ascending sizes with positive rates, got {points}")


@dataclass(frozen=True)
class Link:
    """From one rank to another, each way while all ranks send. `latency_us`: of a collective among few ranks."""

    gbs: float
    latency_us: float


@dataclass(frozen=True)
class MachineProfile:
    """All ranks of a job.

    links: `links[a][b]` from rank a to rank b. host_gbs: from host memory to each device, GB/s. launch_us: between the
    starts of two small kernels. overlap: the share of computing time during which transfers proceed for free: 0 for
    collectives that need multiprocessors, 1 for copy engines. source: `measured`, `assumed`, or the names of presets.
    """

    devices: tuple[DeviceRates, ...]
    links: tuple[tuple[Link, ...], ...]
    host_gbs: float
    launch_us: float
    overlap: float = 0.0
    source: str = "assumed"

    def __post_init__(self) -> None:
        if len(self.links) != len(self.devices) or any(len(row) != len(self.devices) for row in self.links):
            raise ValueError(f"{len(self.devices)} devices need a square table of links, one row for each device")

    @property
    def measured(self) -> bool:
        """Whether times predicted with it can be compared with a clock."""
        return self.source != "assumed"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and for other ranks."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> MachineProfile:
        """The reverse of `as_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        devices = tuple(
            DeviceRates(**{**device, "matrix": _points(device["matrix"]), "attention": _points(device["attention"])})
            for device in content["devices"]
        )
        links = tuple(tuple(Link(**link) for link in row) for row in content["links"])
        return cls(**{**content, "devices": devices, "links": links})

    # --- communication, in ms ----------------------------------------------------------------------------------------

    def _latency(self, ranks: Sequence[int]) -> float:
        worst = max(self.links[a][b].latency_us for a, b in itertools.permutations(ranks, 2))
        return worst * (1 + 0.1 * (len(ranks) - 2)) / 1e3

    def all_to_all_ms(self, ranks: Sequence[int], sent: float) -> float:
        """Every rank sends `sent` bytes in equal parts to the others, one link after another."""
        if len(ranks) < 2:
            return 0.0
        part = sent / (len(ranks) - 1) / 1e6
        slowest = max(sum(part / self.links[a][b].gbs for b in ranks if b != a) for a in ranks)
        return self._latency(ranks) + slowest

    def shift_ms(self, ranks: Sequence[int], sent: float) -> float:
        """Every rank sends `sent` bytes to the next."""
        if len(ranks) < 2:
            return 0.0
        hops = [(a, ranks[(i + 1) % len(ranks)]) for i, a in enumerate(ranks)]
        slowest = min(self.links[a][b].gbs for a, b in hops)
        return max(self.links[a][b].latency_us for a, b in hops) / 1e3 + sent / 1e6 / slowest

    def all_gather_ms(self, ranks: Sequence[int], whole: float) -> float:
        """`whole` bytes are on every rank afterwards, an equal part of which each had; a ring of neighbours."""
        if len(ranks) < 2:
            return 0.0
        slowest = min(self.links[a][ranks[(i + 1) % len(ranks)]].gbs for i, a in enumerate(ranks))
        return self._latency(ranks) + whole * (len(ranks) - 1) / len(ranks) / 1e6 / slowest

    def describe(self) -> str:
        """One line: devices, slowest and fastest link, host link."""
        names: dict[str, int] = {}
        for device in self.devices:
            names[device.name] = names.get(device.name, 0) + 1
        if not self.measured:
            return f"{len(self.devices)} ranks, not measured: the ratios of GPUs joined by NVLink are assumed"
        parts = [
            " + ".join(f"{count} x {name}" for name, count in names.items()),
            f"{min(device.matrix[-1][1] for device in self.devices):.4g} TFLOP/s",
        ]
        rates = [self.links[a][b].gbs for a, b in itertools.permutations(range(len(self.devices)), 2)]
        if rates:
            low, high = min(rates), max(rates)
            span = f"{low:.3g}" if high < 1.25 * low else f"{low:.3g} to {high:.3g}"
            parts.append(f"links {span} GB/s each way")
        return ", ".join([*parts, f"host link {self.host_gbs:.3g} GB/s", self.source])


def _points(rows: Any) -> Points:
    return tuple((int(size), float(rate)) for size, rate in rows)


def rate_at(points: Points, size: float) -> float:
    """TFLOP/s at a size: linear in its logarithm between points, constant above them; below the smallest one it falls
    with the root of the size, as fewer multiprocessors have work."""
    first, rate = points[0]
    if size <= first:
        return rate * math.sqrt(max(1.0, size) / first)
    for (low, slow), (high, fast) in itertools.pairwise(points):
        if size <= high:
            return slow + (fast - slow) * math.log(size / low) / math.log(high / low)
    return points[-1][1]


def assumed(ranks: int) -> MachineProfile:
    """The ratios of GPUs joined by NVLink, at a hundredth of their rates: it orders plans, its times mean nothing."""
    device = DeviceRates("unknown", ((1, 7.0),), ((1, 5.5),), 25.0)
    link = Link(2.7, 4.0)
    return MachineProfile((device,) * ranks, ((link,) * ranks,) * ranks, 0.5, 0.0)
