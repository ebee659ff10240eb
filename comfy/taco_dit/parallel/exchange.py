"""All-to-all of attention heads: tokens of all heads on one side, all tokens of some heads on the other.

All buffers that are sent are token-major, [tokens, B, parts, heads, D]: what is received from the ranks in order is
then the whole sequence, contiguous, and attention kernels take it as a strided view without another copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from comfy.ldm import dit
from comfy.ldm.modules.copy_runs import copy_runs
from comfy.taco_dit.core.plan import share

Range = tuple[int, int]


class Arriving(Protocol):
    """Something on its way."""

    def result(self) -> Any:
        """It, when it can be used: on a GPU at once, where the current stream waits instead."""


class Here:
    """An `Arriving` that has arrived."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class Exchange(Protocol):
    """A transport of heads and tokens within one token group."""

    size: int
    index: int

    def during_blocks(self) -> contextlib.AbstractContextManager[None]:
        """See `comfy.ldm.dit_state.TokenPlan.during_blocks`."""

    def start_heads(self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        """Begin `to_heads`. The result must have been read when the fourth transfer after it is begun."""

    def start_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        """Begin `to_tokens`; the same rule holds."""

    def to_heads(
        self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]
    ) -> list[torch.Tensor]:
        """Each part [B, H, L_local, D] -> [B, h, L, D] of this rank's heads, all tokens in rank order.

        heads: the range of heads that each rank gets; ranges may overlap. tokens: what each rank holds.
        """

    def to_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> torch.Tensor:
        """[B, h, L, D] -> [B, H, L_local, D]; `heads` partition H."""

    def gather(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """Shards along `dim`, concatenated in rank order."""

    def sum_parts(self, parts: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """This rank's part along `dim` of the sum of all ranks' tensors; rank i gets `counts[i]` entries, in order."""


class Ring(Protocol):
    """A transport from each rank of a ring to the next."""

    size: int
    index: int

    def pass_on(self, tensor: torch.Tensor, shape: Sequence[int]) -> Passing:
        """Begin to send `tensor` to the next rank and to receive one of `shape` from the previous rank."""

    def deal(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """`sent[i]` rows of the first axis to rank i, in order -> `received[i]` rows from rank i, in order."""


class Passing(Protocol):
    """A tensor on its way."""

    def result(self) -> torch.Tensor:
        """What came from the previous rank."""


def head_ranges(heads: int, shared: int, size: int) -> tuple[list[Range], list[Range]]:
    """For each rank its query heads, and the key heads (of `shared`) that these need.

    Heads are distributed as evenly as possible, in whole groups that share a key head while there are groups for all
    ranks; with more ranks than groups some key heads go to several ranks.
    """
    group = heads // shared
    if shared >= size:
        keys = [share(shared, size, rank) for rank in range(size)]
        return [(a * group, b * group) for a, b in keys], keys
    queries = [share(heads, size, rank) for rank in range(size)]
    return queries, [(a // group, -(-b // group)) if b > a else (0, 0) for a, b in queries]


@dit.stage
def pack_heads(parts: Sequence[torch.Tensor], heads: Sequence[Range]) -> torch.Tensor:
    """Parts [B, H, L, D] -> flat send buffer: for each rank its heads, token-major [L, B, parts, heads, D]."""
    batch, _, local, size = parts[0].shape
    width, ranks = heads[0][1], len(heads)
    if all(bounds == (width * rank, width * (rank + 1)) for rank, bounds in enumerate(heads)):
        send = parts[0].new_empty((ranks, local, batch, len(parts), width, size))
        for i, part in enumerate(parts):  # each part is read once and written once, to its final place
            copy_runs(part.permute(2, 0, 1, 3).unflatten(2, (ranks, width)).movedim(2, 0), send[:, :, :, i])
        return send.view(-1)
    stacked = torch.stack([p.permute(2, 0, 1, 3) for p in parts], dim=2)
    return torch.cat([stacked[:, :, :, a:b].reshape(-1) for a, b in heads])


@dit.stage
def unpack_heads(received: torch.Tensor, counts: list[int], local: int, batch: int, size: int) -> torch.Tensor:
    """Flat buffer of [L, B, heads, D] from each rank -> [B, H, L, D] (a view of token-major memory)."""
    if len(set(counts)) == 1:
        ranks, width = len(counts), counts[0]
        out = received.new_empty((local, batch, ranks, width, size))
        copy_runs(received.view(ranks, local, batch, width, size).permute(1, 2, 0, 3, 4), out)
        return out.view(local, batch, ranks * width, size).permute(1, 2, 0, 3)
    unit = local * batch * size
    blocks = received.split([unit * count for count in counts])
    joined = torch.cat([block.view(local, batch, n, size) for block, n in zip(blocks, counts)], dim=2)
    return joined.permute(1, 2, 0, 3)


class SingleExchange:
    """The exchange of a rank with itself: all heads and all tokens are here."""

    size, index = 1, 0

    def during_blocks(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def start_heads(self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        return Here(list(parts))

    def start_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        return Here(out)

    def to_heads(
        self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]
    ) -> list[torch.Tensor]:
        return list(parts)

    def to_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> torch.Tensor:
        return out

    def gather(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        return local

    def sum_parts(self, parts: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        return parts


class CollectiveRing:
    """A ring over the ranks of a process group. What is waited for counts as exchange, not what overlaps."""

    def __init__(self, group: Any, clock: Any = None) -> None:
        self._group = group
        self.size = group.size
        self.index = group.index
        self._exchange = contextlib.nullcontext if clock is None else clock.exchange

    def pass_on(self, tensor: torch.Tensor, shape: Sequence[int]) -> Passing:
        out = tensor.new_empty(tuple(shape))
        pending = self._group.shift(out.view(-1), tensor.contiguous().view(-1))
        return _Received(out, pending, self._exchange)

    def deal(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        width = math.prod(rows.shape[1:])
        with self._exchange():
            self._group.all_to_all(
                out.view(-1), rows.contiguous().view(-1), [n * width for n in received], [n * width for n in sent]
            )
        return out


class _Received:
    """A tensor that `pending` fills."""

    def __init__(self, out: torch.Tensor, pending: Any, exchange: Any) -> None:
        self._out, self._pending, self._exchange = out, pending, exchange

    def result(self) -> torch.Tensor:
        with self._exchange():
            self._pending.wait()
        return self._out


class CollectiveExchange:
    """Exchange by all-to-all and all-gather of a `Group`. Heads and tokens may be uneven."""

    def __init__(self, group: Any, clock: Any = None) -> None:
        self._group = group
        self.size = group.size
        self.index = group.index
        self._timed = contextlib.nullcontext if clock is None else clock.exchange

    def during_blocks(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def start_heads(self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        return Here(CollectiveExchange.to_heads(self, parts, heads, tokens))

    def start_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        return Here(CollectiveExchange.to_tokens(self, out, heads, tokens))

    def check_tokens(self, local: int, tokens: Sequence[int]) -> None:
        """Raises ValueError when this rank does not hold what the plan says."""
        if local != tokens[self.index]:
            raise ValueError(f"rank {self.index} holds {local} tokens where the plan says {tokens[self.index]}")

    def _all_to_all(self, send: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Flat exchange; counts are elements per rank."""
        out = send.new_empty(sum(received))
        with self._timed():
            self._group.all_to_all(out, send, received, sent)
        return out

    def to_heads(
        self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]
    ) -> list[torch.Tensor]:
        batch, _, local, size = parts[0].shape
        self.check_tokens(local, tokens)
        counts = [stop - start for start, stop in heads]
        send = pack_heads(tuple(parts), tuple(heads))
        unit = batch * len(parts) * size
        mine = counts[self.index]
        received = self._all_to_all(
            send, [local * c * unit for c in counts], [tokens_there * mine * unit for tokens_there in tokens]
        )
        whole = received.view(sum(tokens), batch, len(parts), mine, size)
        return [whole[:, :, i].permute(1, 2, 0, 3) for i in range(len(parts))]

    def to_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> torch.Tensor:
        batch, mine, _, size = out.shape
        counts = [stop - start for start, stop in heads]
        local, unit = tokens[self.index], batch * size
        send = out.permute(2, 0, 1, 3).reshape(-1)  # token-major: each rank's tokens are one run
        received = self._all_to_all(send, [there * mine * unit for there in tokens], [local * c * unit for c in counts])
        return unpack_heads(received, counts, local, batch, size)

    def gather(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        with self._timed():
            return self._group.all_gather(local.movedim(dim, 0), counts).movedim(0, dim)

    def sum_parts(self, parts: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        with self._timed():
            return self._group.reduce_scatter(parts.movedim(dim, 0), counts).movedim(0, dim)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, the same bits on every rank."""
        with self._timed():
            return self._group.all_reduce(tensor)
