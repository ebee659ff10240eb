"""Which rows of a picture are on which rank, and exchanging them: what `RowsTensor` calls its plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

import comfy.model_management
from comfy.taco_dit.core.plan import share

from .rows_tensor import Layout, RowsTensor

Range = tuple[int, int]


class RowsPlan:
    """The rows of pictures on the ranks of a group, and what is exchanged.

    group: a `Group` of the data plane; all its ranks make the same calls in the same order. device: of the tensors.
    A rank that runs out of memory goes on in step without computing, so that no other waits for it; `gathered` then raises
    the out-of-memory error on all ranks.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.size, self.index = group.size, group.index
        self.device = torch.empty(0, device=device).device  # with its index
        self.out_of_memory = False
        self._places: dict[tuple[int, ...], torch.Tensor] = {}

    def on_device(self, places: tuple[int, ...]) -> torch.Tensor:
        """Numbers as a tensor on the device, kept: a copy from the host breaks the capture of a call in a CUDA graph."""
        if places not in self._places:
            self._places[places] = torch.tensor(places, dtype=torch.int64, device=self.device)
        return self._places[places]

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function` of local tensors; after this rank ran out of memory, a result of the right shape without values."""
        if not self.out_of_memory:
            try:
                return function(*args, **kwargs)
            except comfy.model_management.OOM_EXCEPTION:
                if captures(self.device):
                    raise
                self.out_of_memory = True
        shapes = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, (args, kwargs))
        return function(*shapes[0], **shapes[1])

    def sendable(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device) if tensor.is_meta else tensor

    # --- whole tensors and parts ---------------------------------------------------------------------------------------

    def deal(self, picture: torch.Tensor, axis: int = -2, unit: int = 1) -> RowsTensor:
        """This rank's rows of a whole tensor that every rank has, as even as possible in steps of `unit` rows."""
        axis %= picture.ndim
        height = picture.shape[axis]
        steps = -(-height // unit)
        ends = [min(share(steps, self.size, rank)[1] * unit, height) for rank in range(self.size)]
        rows = Layout(axis, tuple(end - start for start, end in zip([0, *ends], ends)))
        return RowsTensor(self.part(picture, rows).to(self.device), rows, self)

    def part(self, picture: torch.Tensor, rows: Layout) -> torch.Tensor:
        """This rank's rows of a whole tensor, as a view."""
        start, stop = rows.bounds(self.index)
        return picture.narrow(rows.axis, start * rows.unit, (stop - start) * rows.unit)

    def gathered(self, tensor: RowsTensor) -> torch.Tensor:
        """The whole tensor, on every rank. It has no meaning after `finish` would raise."""
        rows = tensor.rows
        local = self.sendable(tensor.local).movedim(rows.axis, 0).contiguous()
        joined = self.group.all_gather(local, [count * rows.unit for count in rows.counts])
        return joined.movedim(0, rows.axis)

    def finish(self) -> None:
        """At the end of a network's call: raises the out-of-memory error on all ranks when one of them had it."""
        mine = torch.full((1,), int(self.out_of_memory), dtype=torch.int32, device=self.device)
        if self.group.all_gather(mine, [1] * self.size).any():
            raise comfy.model_management.OOM_EXCEPTION(
                "a rank ran out of memory while rows of a picture were dealt over all"
            )

    # --- exchanges -----------------------------------------------------------------------------------------------------

    def redealt(self, tensor: RowsTensor, counts: tuple[int, ...]) -> torch.Tensor:
        """This rank's part when each rank holds `counts` rows."""
        target = Layout(tensor.rows.axis, counts, tensor.rows.unit)
        above, below = Exchange(self, tensor, [target.bounds(rank) for rank in range(self.size)]).result()
        return joined_rows(self, above, own_rows(tensor, target.bounds(self.index)), below, tensor.rows.axis)


def captures(device: torch.device) -> bool:
    """Whether what is launched on a device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Exchange:
    """Rows on their way: each rank r gets the rows `wanted[r]` (from one to before another) that it does not hold.

    Sending begins at once; on GPUs on a stream of its own, so that computing goes on meanwhile. There is one message for
    each pair of ranks, between neighbours where each holds as many rows as a halo has.
    """

    def __init__(self, plan: RowsPlan, tensor: RowsTensor, wanted: Sequence[Range]) -> None:
        self._plan, self._axis = plan, tensor.rows.axis
        rows, local, me = tensor.rows, tensor.local, plan.index
        owned = [rows.bounds(rank) for rank in range(plan.size)]
        start = owned[me][0]
        self._shape = [*local.shape]
        entries = math.prod(size for axis, size in enumerate(local.shape) if axis != rows.axis) * rows.unit
        needed = [[common(owned[source], wanted[target]) for target in range(plan.size)] for source in range(plan.size)]
        for rank in range(plan.size):
            needed[rank][rank] = (0, 0)
        sent = [(a - start, b - start) for a, b in needed[me]]
        self._received = [needed[source][me] for source in range(plan.size)]
        self._unit = rows.unit
        self._pending: Any = None
        if not any(b > a for pairs in needed for a, b in pairs):
            self._buffer = local.new_empty(0)
            return
        pieces = [local.narrow(rows.axis, a * rows.unit, (b - a) * rows.unit).reshape(-1) for a, b in sent if b > a]
        send = plan.sendable(torch.cat(pieces) if pieces else local.new_empty(0))
        counts = [[(b - a) * entries for a, b in ranges] for ranges in (self._received, sent)]
        self._buffer = send.new_empty(sum(counts[0]))
        self._pending = plan.group.start_all_to_all(self._buffer, send, *counts)

    def result(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The rows above this rank's own and those below, in order; pieces of one tensor each."""
        if self._pending is not None:
            self._pending.wait()
        above: list[torch.Tensor] = []
        below: list[torch.Tensor] = []
        position = 0
        for source, (a, b) in enumerate(self._received):
            if b == a:
                continue
            shape = [*self._shape]
            shape[self._axis] = (b - a) * self._unit
            piece = self._buffer[position : position + math.prod(shape)].view(shape)
            position += piece.numel()
            (above if source < self._plan.index else below).append(piece)
        return above, below


def common(a: Range, b: Range) -> Range:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if stop > start else (0, 0)


def own_rows(tensor: RowsTensor, wanted: Range) -> torch.Tensor:
    """Those of the rows wanted that are here."""
    mine = tensor.rows.bounds(tensor.plan.index)
    start, stop = common(mine, wanted)
    unit = tensor.rows.unit
    return tensor.local.narrow(tensor.rows.axis, max(0, start - mine[0]) * unit, (stop - start) * unit)


def joined_rows(
    plan: RowsPlan, above: list[torch.Tensor], own: torch.Tensor, below: list[torch.Tensor], axis: int
) -> torch.Tensor:
    if not above and not below:
        return own
    return plan.compute(torch.cat, [*above, own, *below], axis)
