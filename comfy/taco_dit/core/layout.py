"""Where the weights of a network live on a group of ranks: decided once, when the network is loaded.

A layout outlives many denoiser calls; the plan of a call (`plan.py`) is chosen within it. Ranks that hold parts of one
copy of a network (`ranks` of them) always work on the same rows and tokens; a plan distributes work over whole copies.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Placement(enum.Enum):
    """Where each rank keeps its part of the weights."""

    WHOLE = "whole"
    """On the device."""
    OFFLOADED = "offloaded"
    """In host memory, at least in part; brought over layer by layer."""
    SHARDED = "sharded"
    """Each rank keeps 1/N on its device and gathers a block's weights when it is its turn."""


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
        return self.tensor_degree * max(1, len(self.pipeline_stages))

    def copies(self, world_size: int) -> int:
        """Copies of the network on `world_size` ranks. Raises ValueError when ranks are left over."""
        if world_size % self.ranks:
            raise ValueError(
                f"a layout over {self.ranks} ranks does not fit {world_size} ranks; use degrees whose product divides "
                f"{world_size}"
            )
        return world_size // self.ranks

    def describe(self) -> str:
        """`whole`; `sharded x tensor 2 x pipeline 3`."""
        parts = [self.placement.value]
        if self.tensor_degree > 1:
            parts.append(f"tensor {self.tensor_degree}")
        if len(self.pipeline_stages) > 1:
            parts.append(f"pipeline {len(self.pipeline_stages)}")
        return " x ".join(parts)


def layout_of(model: Any) -> Layout:
    """The layout of a loaded model: whole, or offloaded where memory did not suffice."""
    return Layout(Placement.OFFLOADED if getattr(model, "model_lowvram", False) else Placement.WHOLE)
