"""Where the weights of a network live on a group of ranks: decided once, when the network is loaded.

A layout outlives many denoiser calls; the plan of a call (`plan.py`) is chosen within it. Ranks that hold parts of one
copy of a network (`ranks` of them) always work on the same rows and tokens; a plan distributes work over whole copies.

Rank = copy * ranks + stage * tensor_degree + tensor index: the ranks of a copy are neighbours, and of these the nearest
share linears, which communicates most. A group of copies, as plans name them, is for each rank the group of those ranks
that hold the same part of these copies as it does.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .config_manager import TacoConfig, pipeline_degree, tensor_degree


class Placement(enum.Enum):
    """Where each rank keeps its part of the weights."""

    WHOLE = "whole"
    """On the device."""
    OFFLOADED = "offloaded"
    """In host memory, at least in part; brought over layer by layer."""
    SHARDED = "sharded"
    """Each rank keeps 1/N on its device and gathers a block's weights when it is its turn."""


class Place(NamedTuple):
    """What a rank holds: a part of copy number `copy` of the network, in pipeline stage `stage`, slices `tensor`."""

    copy: int
    stage: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Placement, and how one copy of a network is cut over ranks.

    tensor_degree: ranks over which linears are split (the family's record declares how). pipeline_stages: for each
    stage the [start, stop) of its blocks in `network.block_list()`; empty means one stage with all blocks.
    """

    placement: Placement = Placement.WHOLE
    tensor_degree: int = 1
    pipeline_stages: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.tensor_degree < 1:
            raise ValueError(f"tensor_degree must be at least 1, got {self.tensor_degree}")
        stops = [0, *(stop for _, stop in self.pipeline_stages)]
        for stage, ((start, stop), before) in enumerate(zip(self.pipeline_stages, stops)):
            if start != before or stop <= start:
                raise ValueError(
                    f"pipeline stage {stage} has the blocks {start} to {stop}; stages must follow one another from "
                    "block 0 and have at least one block each"
                )

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the network."""
        return self.tensor_degree * self.stages

    def copies(self, world_size: int) -> int:
        """Copies of the network on `world_size` ranks. Raises ValueError when ranks are left over."""
        if world_size % self.ranks:
            raise ValueError(
                f"a layout over {self.ranks} ranks does not fit {world_size} ranks; use degrees whose product divides "
                f"{world_size}"
            )
        return world_size // self.ranks

    @property
    def stages(self) -> int:
        """Number of pipeline stages, at least 1."""
        return max(1, len(self.pipeline_stages))

    def place_of(self, rank: int) -> Place:
        """What a rank holds."""
        copy, inside = divmod(rank, self.ranks)
        return Place(copy, *divmod(inside, self.tensor_degree))

    def rank_of(self, copy: int, stage: int = 0, tensor: int = 0) -> int:
        """The rank that holds a part. Raises ValueError when the layout has no such part."""
        if not (0 <= stage < self.stages and 0 <= tensor < self.tensor_degree and copy >= 0):
            raise ValueError(f"{self.describe()} has no copy {copy}, stage {stage}, tensor index {tensor}")
        return copy * self.ranks + stage * self.tensor_degree + tensor

    def ranks_of(self, copies: Iterable[int], rank: int) -> tuple[int, ...]:
        """The ranks that hold of these copies what `rank` holds of its own, in the order of the copies."""
        _, stage, tensor = self.place_of(rank)
        return tuple(self.rank_of(copy, stage, tensor) for copy in copies)

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the other slices of this rank's blocks, by tensor index."""
        copy, stage, _ = self.place_of(rank)
        return tuple(self.rank_of(copy, stage, tensor) for tensor in range(self.tensor_degree))

    def stage_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same slices of this copy's other blocks, by stage."""
        copy, _, tensor = self.place_of(rank)
        return tuple(self.rank_of(copy, stage, tensor) for stage in range(self.stages))

    def describe(self) -> str:
        """`whole`; `tensor 2`; `sharded x tensor 2 x pipeline 3`."""
        parts = [self.placement.value] if self.placement is not Placement.WHOLE or self.ranks == 1 else []
        if self.tensor_degree > 1:
            parts.append(f"tensor {self.tensor_degree}")
        if len(self.pipeline_stages) > 1:
            parts.append(f"pipeline {len(self.pipeline_stages)}")
        return " x ".join(parts)


@dataclass(frozen=True)
class NetworkFacts:
    """What the choice of a layout depends on. Sizes in bytes of whole weights.

    block_bytes: of each block of a diffusion transformer, none for other networks. block_costs: their time relative to one
    another. cuttable: whether all linears of its
    blocks are declared, and blocks run with some of their heads. packed: the name of a tensor class that keeps weights in
    a format of its own, of which no parts can be held. saved_bytes: what weights take less while they are in eight bits,
    which they are not when they are sharded.
    """

    name: str
    total_bytes: int
    block_bytes: tuple[int, ...] = ()
    cuttable: bool = False
    packed: str | None = None
    block_costs: tuple[float, ...] = ()
    saved_bytes: int = 0


def stages_by_cost(costs: Sequence[float], count: int, sizes: Sequence[int] = ()) -> tuple[tuple[int, int], ...]:
    """[start, stop) of the blocks of each of `count` stages, such that the most expensive stage costs least.

    costs: of each block, in order. sizes: bytes of each block; no stage then gets more than 1/count of all and a tenth, if
    that is possible. Raises ValueError when there are more stages than blocks.
    """
    if not 1 <= count <= len(costs):
        raise ValueError(f"{len(costs)} blocks cannot be cut into {count} pipeline stages; use 1 to {len(costs)}")
    time, size = ([0.0, *itertools.accumulate(values)] for values in (costs, sizes or [0] * len(costs)))
    most = size[-1] * (1 / count + 0.1)

    def stage(start: int, stop: int) -> tuple[float, float]:
        """(bytes beyond what a stage should have, cost) of the blocks from `start` to `stop`."""
        return max(0.0, size[stop] - size[start] - most), time[stop] - time[start]

    @functools.cache
    def best(start: int, left: int) -> tuple[tuple[float, float], tuple[int, ...]]:
        """(the worst stage, where stages end) for the blocks from `start` on in `left` stages."""
        if left == 1:
            return stage(start, len(costs)), (len(costs),)
        found = []
        for stop in range(start + 1, len(costs) - left + 2):
            (over, cost), stops = best(stop, left - 1)
            mine = stage(start, stop)
            found.append(((max(mine[0], over), max(mine[1], cost)), (stop, *stops)))
        return min(found, key=lambda choice: choice[0])

    stops = best(0, count)[1]
    return tuple(zip((0, *stops[:-1]), stops))


def choose_layout(config: TacoConfig, network: NetworkFacts, memory: int | None, ranks: int) -> tuple[Layout, str]:
    """(layout, reason) of a network on `ranks` ranks; an empty reason where nothing was to be chosen.

    memory: bytes that the smallest device has for weights, None where they need no room. What is configured is chosen;
    else weights are sharded when they do not fit one device but, dealt over the ranks, all devices.
    """
    parallel, shard = config.parallel, config.memory.shard_weights
    degree, stages = tensor_degree(parallel, ranks), pipeline_degree(parallel, ranks)
    if network.packed is not None and (degree > 1 or stages > 1 or shard):
        return Layout(), f"its weights are stored as {network.packed}, of which no parts can be held, so it stays whole"
    if stages > 1 and network.block_costs:
        return _staged(network, stages, degree)
    if degree > 1:
        if network.cuttable:
            return Layout(tensor_degree=degree), "parallel.tensor_parallel is true"
        return Layout(), "its linears are not declared for tensor parallelism, so it stays whole on every rank"
    if shard is False or ranks == 1 or not network.block_bytes or network.packed is not None:
        return Layout(), ""
    if shard:
        return Layout(Placement.SHARDED), "memory.shard_weights is true"
    if memory is None or network.total_bytes - network.saved_bytes <= memory:
        return Layout(), ""
    blocks, buffers = sum(network.block_bytes), 2 * max(network.block_bytes)
    needed = network.total_bytes - blocks + -(-blocks // ranks) + buffers
    sizes = f"{network.total_bytes / 2**30:.1f} GiB of weights do not fit {memory / 2**30:.1f} GiB"
    if needed > memory:
        return (
            Layout(),
            f"{sizes}, and {needed / 2**30:.1f} GiB of each of {ranks} ranks do not either: they are streamed",
        )
    return Layout(Placement.SHARDED), f"{sizes}, {needed / 2**30:.1f} GiB of each of {ranks} ranks do"


def _staged(network: NetworkFacts, stages: int, degree: int) -> tuple[Layout, str]:
    """A layout in pipeline stages, whose linears are shared by `degree` ranks, and why."""
    if stages > len(network.block_costs):
        return (
            Layout(),
            f"its {len(network.block_costs)} blocks cannot be cut into {stages} pipeline stages, so it stays whole",
        )
    if degree > 1 and not network.cuttable:
        return Layout(), "its linears are not declared for tensor parallelism, so it stays whole on every rank"
    sizes = network.block_bytes if len(network.block_bytes) == len(network.block_costs) else ()
    reason = "parallel.pipeline_parallel is true" if degree == 1 else "pipeline_parallel and tensor_parallel are true"
    return Layout(tensor_degree=degree, pipeline_stages=stages_by_cost(network.block_costs, stages, sizes)), reason


def layout_of(model: Any) -> Layout:
    """The layout of a loaded model: whole, or offloaded where memory did not suffice."""
    return Layout(Placement.OFFLOADED if getattr(model, "model_lowvram", False) else Placement.WHOLE)
