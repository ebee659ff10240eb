"""Which rank does what in one denoiser call, and how that is chosen.

A denoiser call evaluates K conditionings for B pictures with one network. Three axes split it, from the outside in:
conditionings (`cfg`), pictures (`data`), tokens (`ring`, then `ulysses`). Their degrees multiply to the number of ranks.
Neighbouring ranks share tokens, because that axis communicates most, and of these the nearest exchange heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .config_manager import ConfigError, ParallelConfig, divisors, sequence_degree
from .layout import Layout


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of one plan. Rank = ((cfg * data_degree + data) * replicas + replica) * sequence_degree + token index.

    Token index = ring * ulysses_degree + ulysses.
    """

    cfg_degree: int = 1
    data_degree: int = 1
    ulysses_degree: int = 1
    replicas: int = 1
    """Ranks that repeat each other's work because nothing is left to split."""
    ring_degree: int = 1

    def __post_init__(self) -> None:
        for name in ("cfg_degree", "data_degree", "ulysses_degree", "replicas", "ring_degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cfg_degree * self.data_degree * self.sequence_degree * self.replicas

    @property
    def sequence_degree(self) -> int:
        """Number of ranks that share the tokens of a picture."""
        return self.ulysses_degree * self.ring_degree

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(cfg, data, token, replica) index of a rank."""
        rank, token = divmod(rank, self.sequence_degree)
        rank, replica = divmod(rank, self.replicas)
        cfg, data = divmod(rank, self.data_degree)
        return cfg, data, token, replica

    def token_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other tokens of this rank's pictures."""
        first = rank - rank % self.sequence_degree
        return tuple(range(first, first + self.sequence_degree))

    def ulysses_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the token group that exchange heads with this one: neighbours."""
        first = rank - rank % self.ulysses_degree
        return tuple(range(first, first + self.ulysses_degree))

    def ring_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of the token group among which this one's keys and values go round."""
        members = self.token_group(rank)
        return members[members.index(rank) % self.ulysses_degree :: self.ulysses_degree]

    def row_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other conditionings and pictures, one for each (cfg, data), in that order."""
        stride = self.sequence_degree * self.replicas
        return tuple(range(rank % stride, self.world_size, stride))

    def describe(self) -> str:
        """`cfg 2 x ulysses 2 x ring 2`; `one rank` when nothing is split."""
        parts = [
            f"{name} {degree}"
            for name, degree in (
                ("cfg", self.cfg_degree),
                ("data", self.data_degree),
                ("ulysses", self.ulysses_degree),
                ("ring", self.ring_degree),
                ("replicas", self.replicas),
            )
            if degree > 1
        ]
        return " x ".join(parts) or "one rank"


@dataclass(frozen=True)
class Workload:
    """What is known of a denoiser call when its plan is chosen."""

    conds: int
    pictures: int
    tokens: int
    heads: int
    hidden_size: int
    rows_split: bool = True
    """Whether conditionings and pictures may be evaluated on different ranks."""
    tokens_split: bool = True
    """Whether the network can run on a part of its tokens."""


@dataclass(frozen=True)
class Plan:
    """A choice of degrees and the reason for it."""

    dims: ParallelDims
    reason: str
    work: Workload | None = None
    considered: tuple[tuple[str, float], ...] = ()
    """Every choice that was possible and its estimated time, in units of one rank's; the best first."""

    def considered_as_dicts(self) -> list[dict[str, Any]]:
        """For JSON: `plan`, `relative_time`."""
        return [{"plan": name, "relative_time": cost} for name, cost in self.considered]


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index` when `total` items are distributed as evenly as possible; parts may be empty."""
    return total * index // parts, total * (index + 1) // parts


def _cost(dims: ParallelDims, work: Workload) -> float:
    """Estimated time of the slowest rank, in units of one row on one rank."""
    rows = math.ceil(work.conds / dims.cfg_degree) * math.ceil(work.pictures / dims.data_degree)
    degree, ring = dims.ulysses_degree, dims.ring_degree
    attention = work.tokens / (6 * work.hidden_size + work.tokens)
    tokens = math.ceil(work.tokens / dims.sequence_degree) / work.tokens
    heads = math.ceil(work.heads / degree) / work.heads / ring
    # An exchange moves 8 bytes per token and channel in bf16 against 24 C flops: about 1/15 of a GPU's time on NVLink.
    exchange = 0.07 * (degree - 1) / degree * rows
    # A ring brings the keys and values of all other parts to each rank: 4 bytes per token and channel.
    passes = 0.035 * (ring - 1) / ring * rows
    latency = 0.01 * (degree > 1) + 0.01 * (ring > 1)
    return rows * ((1 - attention) * tokens + attention * heads) + exchange + passes + latency


def _token_splits(config: ParallelConfig, work: Workload, ranks: int) -> list[tuple[int, int]]:
    """(Ulysses degree, ring degree) of all ways in which some of `ranks` ranks may share tokens.

    Ulysses sends less, so a ring that is not configured comes only where the ranks are more than the heads.
    """
    if not work.tokens_split or not config.sequence_parallel:
        return [(1, 1)]
    sequence, ulysses, ring = config.sequence_parallel_degree, config.ulysses_degree, config.ring_degree
    if sequence is None and not config.auto_detect:  # only what is configured
        sequence = (ulysses or 1) * (ring or 1)
    found = []
    for degree in divisors(ranks) if sequence is None else [d for d in divisors(ranks) if d == sequence]:
        for inner in divisors(degree):
            outer = degree // inner
            if ulysses not in (None, inner) or ring not in (None, outer):
                continue
            fixed = ring is not None or (sequence is not None and ulysses is not None)
            if outer == 1 or fixed or (ulysses is None and inner == _most_heads(degree, work.heads)):
                found.append((inner, outer))
    return found


def _most_heads(degree: int, heads: int) -> int:
    """The largest Ulysses degree within `degree` for which every rank has heads."""
    return max(d for d in divisors(degree) if d <= heads)


def candidates(config: ParallelConfig, work: Workload, world_size: int) -> list[ParallelDims]:
    """All degrees that the configuration and the workload allow."""
    if not config.enabled:
        return [ParallelDims(replicas=world_size)]
    pictures = config.data_parallel_degree
    if not config.auto_detect:  # only degrees that are configured; ranks that are left repeat work
        pictures = pictures or 1
    found = []
    for cfg in divisors(world_size):
        if cfg > 1 and (not config.cfg_parallel or not work.rows_split or cfg > work.conds):
            continue
        for data in divisors(world_size // cfg):
            if pictures is not None and work.rows_split:
                # a smaller batch than the degree was written for takes the next smaller degree that fits
                fitting = [d for d in divisors(world_size // cfg) if d <= min(pictures, work.pictures)]
                if data != fitting[-1]:
                    continue
            elif data > 1 and (not config.data_parallel or not work.rows_split or data > work.pictures):
                continue
            rest = world_size // (cfg * data)
            for ulysses, ring in _token_splits(config, work, rest):
                found.append(ParallelDims(cfg, data, ulysses, rest // (ulysses * ring), ring))
    return found


def choose_plan(config: ParallelConfig, work: Workload, world_size: int, layout: Layout = Layout()) -> Plan:  # noqa: B008
    """The degrees with the smallest estimated time; ties go to fewer exchanges, conditionings first.

    Degrees distribute work over the copies of the network that `layout` leaves. Raises ConfigError when fixed degrees
    leave no plan, and ValueError when the layout does not fit the ranks.
    """
    world_size = layout.copies(world_size)
    found = candidates(config, work, world_size)
    if not found:
        raise ConfigError(
            f"no plan for {world_size} ranks with parallel.data_parallel_degree={config.data_parallel_degree}, "
            f"sequence degree={sequence_degree(config)} for {work.conds} conditionings of {work.pictures} pictures; "
            "set one of them to auto"
        )
    found.sort(key=lambda d: (round(_cost(d, work), 6), d.replicas, d.ring_degree, d.ulysses_degree, d.data_degree))
    alone = _cost(ParallelDims(), work)
    considered = tuple((dims.describe(), round(_cost(dims, work) / alone, 4)) for dims in found)
    return Plan(found[0], _reason(found[0], work, config), work, considered)


def _reason(dims: ParallelDims, work: Workload, config: ParallelConfig) -> str:
    if not config.enabled:
        return "parallel.enabled is false"
    parts = []
    if dims.cfg_degree > 1:
        parts.append(f"{work.conds} conditionings on {dims.cfg_degree} groups")
    if dims.data_degree > 1:
        parts.append(f"{work.pictures} pictures on {dims.data_degree} groups")
    if dims.ring_degree > 1:
        heads = f", {work.heads} heads on {dims.ulysses_degree} of them" if dims.ulysses_degree > 1 else ""
        parts.append(f"{work.tokens} tokens on {dims.sequence_degree} ranks{heads}")
        if config.ring_degree is None and dims.sequence_degree > work.heads:
            parts.append(f"keys go round a ring of {dims.ring_degree}, as there are more ranks than heads")
    elif dims.ulysses_degree > 1:
        parts.append(f"{work.tokens} tokens and {work.heads} heads on {dims.ulysses_degree} ranks")
    if dims.replicas > 1:
        parts.append(f"{dims.replicas} ranks repeat the same work: nothing else can be split")
    if not work.rows_split:
        parts.append("a wrapper or patch needs all conditionings together")
    return "; ".join(parts) or "one rank"
