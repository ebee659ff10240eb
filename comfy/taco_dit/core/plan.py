"""Which rank does what in one denoiser call, and how that is chosen: the smallest predicted time (`costs.py`).

A denoiser call evaluates K conditionings for B pictures with one network. The degrees of a plan (`degrees.py`) multiply to
the number of copies of the network. What the configuration says holds; the rest is chosen. Every rank chooses the same
plan: it depends on nothing but its arguments, which are the same on all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .config_manager import ConfigError, ParallelConfig, divisors, sequence_degree
from .costs import Estimate, estimate
from .degrees import ParallelDims, Workload, share
from .layout import Layout
from .machine_profile import MachineProfile, assumed
from .network_cost import NetworkCost, typical
from .reasons import Reason, reason

__all__ = ["Considered", "ParallelDims", "Plan", "Workload", "candidates", "choose_plan", "share"]

# What a second choice must gain to be taken: a part of the time, and milliseconds. A ring that is not configured is second to
# Ulysses, because attention functions of custom nodes cannot use it; rows of pictures are second to whole ones, because
# patches of custom nodes get these; repeating each other's work is second to sharing it.
_GAIN, _SECOND_MS, _REPEAT_MS = 1.03, 1.0, 5.0


@dataclass(frozen=True)
class Considered:
    """A plan that was weighed: its predicted time on the slowest rank in ms, or why it cannot be."""

    plan: str
    predicted_ms: float = 0.0
    relative_time: float = 0.0
    """Predicted time, one rank's being 1."""
    why_not: Reason | None = None

    @property
    def impossible(self) -> str:
        """Why it cannot be, empty where it can."""
        return "" if self.why_not is None else self.why_not.text

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `plan` with `predicted_ms` and `relative_time`, or with `impossible`, a text, and `why_not`, its code."""
        if self.why_not is not None:
            return {"plan": self.plan, "impossible": self.impossible, "why_not": self.why_not.as_dict()}
        return {"plan": self.plan, "predicted_ms": self.predicted_ms, "relative_time": self.relative_time}


@dataclass(frozen=True)
class Plan:
    """A choice of degrees and the reasons for it."""

    dims: ParallelDims
    reasons: tuple[Reason, ...] = ()
    work: Workload | None = None
    considered: tuple[Considered, ...] = ()
    """Every choice that was possible, the best first, and then what was not."""
    predicted: Estimate | None = None
    """What it is expected to take; None where the machine was not measured."""
    network: str = ""

    @property
    def reason(self) -> str:
        """The reasons as one text."""
        return "; ".join(reason.text for reason in self.reasons)

    @property
    def predicted_ms(self) -> float | None:
        """Milliseconds of a call."""
        return None if self.predicted is None else round(self.predicted.total, 3)

    def considered_as_dicts(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [choice.as_dict() for choice in self.considered]


def _token_splits(config: ParallelConfig, work: Workload, ranks: int) -> list[tuple[int, int]]:
    """(Ulysses degree, ring degree) of all ways in which some of `ranks` ranks may share tokens."""
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
            if outer == 1 or ulysses is not None or ring is not None or inner <= work.heads:
                found.append((inner, outer))
    if sequence is not None and ulysses is None and ring is None:
        # the degree is configured: heads first, and a ring only where they run out
        most = max((inner for inner, _ in found if inner <= work.heads), default=1)
        found = [(inner, outer) for inner, outer in found if outer == 1 or inner == most]
    return found


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
            for spatial in _row_splits(config, work, rest):
                found.append(ParallelDims(cfg, data, replicas=rest // spatial, spatial_degree=spatial))
    fixed = config.spatial_parallel_degree
    if fixed is not None and any(dims.spatial_degree == fixed for dims in found):
        found = [dims for dims in found if dims.spatial_degree == fixed]
    return found


def _row_splits(config: ParallelConfig, work: Workload, ranks: int) -> list[int]:
    """How many of `ranks` ranks may share the rows of a picture, above one."""
    if not config.spatial_parallel or (not config.auto_detect and config.spatial_parallel_degree is None):
        return []
    fixed = config.spatial_parallel_degree
    degrees = [degree for degree in divisors(ranks) if 1 < degree <= work.picture_rows]
    return [degree for degree in degrees if fixed in (None, degree)]


def _impossible(config: ParallelConfig, work: Workload, ranks: int, found: list[ParallelDims]) -> list[Considered]:
    """Why no plan puts all ranks on one axis, for each axis where none does."""
    together = None if work.rows_split else reason("rows_together")
    whole = None if work.tokens_split else reason("whole_tokens")
    tokens = whole or (None if config.sequence_parallel else reason("sequence_off"))
    cfg = None if config.cfg_parallel else reason("cfg_off")
    data = None if config.data_parallel else reason("data_off")
    if work.conds < ranks:
        few = reason("few_conditionings", conds=work.conds) if work.conds > 1 else reason("one_conditioning")
        cfg = cfg or few
    if work.pictures < ranks:
        few = reason("few_pictures", pictures=work.pictures) if work.pictures > 1 else reason("one_picture")
        data = data or few
    axes = [
        (ParallelDims(cfg_degree=ranks), together or cfg),
        (ParallelDims(data_degree=ranks), together or data),
        (ParallelDims(ulysses_degree=ranks), tokens),
        (ParallelDims(ring_degree=ranks), tokens),
    ]
    if work.picture_rows and ranks > 1:
        why = None if config.spatial_parallel else reason("spatial_off")
        axes.append((ParallelDims(spatial_degree=ranks), why))
    off = None if config.enabled else reason("off")
    return [
        Considered(dims.describe(), why_not=off or why or reason("degrees_fixed"))
        for dims, why in axes
        if dims not in found
    ]


def choose_plan(
    config: ParallelConfig,
    work: Workload,
    world_size: int,
    layout: Layout = Layout(),  # noqa: B008
    profile: MachineProfile | None = None,
    network: NetworkCost | None = None,
    streamed: float = 0.0,
) -> Plan:
    """The degrees with the smallest predicted time; ties go to fewer exchanges, conditionings first.

    Degrees distribute work over the copies of the network that `layout` leaves. profile: of the `world_size` ranks;
    without one the ratios of well-connected GPUs are assumed. network: what it costs; without it, a transformer of
    the workload's sizes. streamed: see `costs.estimate`. Raises ConfigError when fixed degrees leave no plan, and
    ValueError when the layout does not fit the ranks or the profile is of another number of ranks.
    """
    profile = profile or assumed(world_size)
    if len(profile.devices) != world_size:
        raise ValueError(f"the profile is of {len(profile.devices)} ranks, not {world_size}")
    return _choose(
        config, work, world_size, layout, profile, network or typical(work.hidden_size, work.heads), streamed
    )


@functools.lru_cache(maxsize=256)
def _choose(
    config: ParallelConfig, work: Workload, world_size: int, layout: Layout, profile: MachineProfile,
    network: NetworkCost, streamed: float,
) -> Plan:  # fmt: skip
    copies = layout.copies(world_size)
    found = candidates(config, work, copies)
    if not found:
        raise ConfigError(
            f"no plan for {copies} ranks with parallel.data_parallel_degree={config.data_parallel_degree}, "
            f"sequence degree={sequence_degree(config)} for {work.conds} conditionings of {work.pictures} pictures; "
            "set one of them to auto"
        )
    times = {dims: estimate(network, work, dims, profile, layout, streamed) for dims in found}
    alone = estimate(network, work, ParallelDims(), profile, layout, streamed).total
    chosen = _best(times, work, config)
    order = sorted(found, key=lambda dims: (dims != chosen, round(times[dims].total, 6)))
    considered = [
        Considered(dims.describe(), round(times[dims].total, 3), round(times[dims].total / alone, 4)) for dims in order
    ]
    considered += _impossible(config, work, copies, found)
    why = tuple(_reasons(chosen, work, config, times))
    return Plan(chosen, why, work, tuple(considered), times[chosen] if profile.measured else None, network.name)


def _best(times: dict[ParallelDims, Estimate], work: Workload, config: ParallelConfig) -> ParallelDims:
    def order(dims: ParallelDims) -> tuple[float, ...]:
        time = times[dims].total
        ring = dims.ring_degree > 1 and config.ring_degree is None and dims.sequence_degree <= work.heads
        if ring or (dims.spatial_degree > 1 and config.spatial_parallel_degree is None):
            time = max(time * _GAIN, time + _SECOND_MS)
        return round(time, 6), dims.ring_degree, dims.ulysses_degree, dims.data_degree

    # Rows of pictures are not shared for the sake of sharing: of a small UNet the exchanges take longer than the rest.
    plain = [dims for dims in times if dims.spatial_degree == 1] or list(times)
    least = min(dims.replicas for dims in plain)
    sharing = min((dims for dims in plain if dims.replicas == least), key=order)
    best = min(plain, key=order)
    needed = max(times[best].total * _GAIN, times[best].total + _REPEAT_MS)
    chosen = best if times[sharing].total > needed else sharing
    return min((chosen, *(dims for dims in times if dims.spatial_degree > 1)), key=order)


def _reasons(
    dims: ParallelDims, work: Workload, config: ParallelConfig, times: Collection[ParallelDims]
) -> list[Reason]:
    if not config.enabled:
        return [reason("off")]
    found = []
    if dims.cfg_degree > 1:
        found.append(reason("conditionings", conds=work.conds, groups=dims.cfg_degree))
    if dims.data_degree > 1:
        found.append(reason("pictures", pictures=work.pictures, groups=dims.data_degree))
    if dims.ring_degree > 1:
        sizes = {"tokens": work.tokens, "ranks": dims.sequence_degree}
        if dims.ulysses_degree > 1:
            found.append(reason("ring_and_heads", **sizes, heads=work.heads, inner=dims.ulysses_degree))
        else:
            found.append(reason("ring", **sizes))
        if config.ring_degree is None:
            few = dims.sequence_degree > work.heads
            found.append(reason("ring_few_heads" if few else "ring_uneven_heads", ring=dims.ring_degree))
    elif dims.ulysses_degree > 1:
        found.append(reason("tokens", tokens=work.tokens, heads=work.heads, ranks=dims.ulysses_degree))
    if dims.spatial_degree > 1:
        found.append(reason("rows", rows=work.picture_rows, ranks=dims.spatial_degree))
    if dims.replicas > 1:
        better = any(other.replicas < dims.replicas for other in times)
        found.append(reason("repeat_faster" if better else "repeat_rest", replicas=dims.replicas))
    if not work.rows_split:
        found.append(reason("all_together"))
    return found or [reason("one_rank")]
