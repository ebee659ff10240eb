"""What a process holds of a weight when it does not hold all of it.

Who decides that says so by key (`WeightStore.hold`); the store copies and patches only what is held. Patches are
calculated on whole weights, of which the part is taken afterwards: adapters, scales and rounding are those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Held:
    """The entries [start, stop) of each of `slices` along `axis`, joined in that order; without slices nothing.

    axis: None for the flattened weight, whose part is then flat too.
    """

    slices: tuple[tuple[int, int], ...] = ()
    axis: int | None = 0

    @property
    def length(self) -> int:
        """Entries along the axis."""
        return sum(stop - start for start, stop in self.slices)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape. Raises ValueError when a slice is not within a weight of shape `whole`."""
        size = math.prod(whole) if self.axis is None else whole[self.axis] if self.axis < len(whole) else -1
        if any(not 0 <= start <= stop <= size for start, stop in self.slices):
            raise ValueError(f"slices {self.slices} along axis {self.axis} of a weight of shape {tuple(whole)}")
        if self.axis is None:
            return (self.length,)
        return (*whole[: self.axis], self.length, *whole[self.axis + 1 :])

    def bytes_of(self, whole: torch.Tensor) -> int:
        """Bytes of the part."""
        return math.prod(self.shape(whole.shape)) * whole.element_size() if self.slices else 0

    def views(self, whole: torch.Tensor, part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(view of the whole, view of the part) for each slice that is not empty."""
        axis = 0 if self.axis is None else self.axis
        source = whole.detach().reshape(-1) if self.axis is None else whole.detach()
        position = 0
        for start, stop in self.slices:
            if stop > start:
                yield source.narrow(axis, start, stop - start), part.narrow(axis, position, stop - start)
            position += stop - start

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole weight, in memory of its own."""
        part = torch.empty(self.shape(whole.shape), dtype=whole.dtype, device=whole.device)
        for source, target in self.views(whole, part):
            target.copy_(source)
        return part
