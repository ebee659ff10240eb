"""Sequence parallelism by Ulysses (Jacobs et al. 2023): tokens are sharded between attentions, heads within them.

Exact for any number of tokens, heads and ranks: shards may differ by one token or one head, and a rank may hold none.
Nothing is padded, so no mask is needed to hide padding, and masks that exist keep their meaning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from comfy.ldm.dit_state import Compute, Meeting
from comfy.ldm.modules.attention import AttentionSpec
from comfy.taco_dit.core.plan import share

from .exchange import Exchange, Range, head_ranges


def _orders(size: int, lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of stream-ordered tokens in rank order, and the inverse; [L] each.

    In rank order each rank has its parts of all streams, in order of streams, then comes the next rank.
    """
    with torch.inference_mode(False):  # ordinary tensors, which may also take part in training
        places = torch.empty(sum(lengths), dtype=torch.long)
        position = 0
        for rank in range(size):
            offset = 0
            for length in lengths:
                start, stop = share(length, size, rank)
                places[offset + start : offset + stop] = torch.arange(position, position + stop - start)
                position += stop - start
                offset += length
        inverse = torch.empty_like(places)
        inverse[places] = torch.arange(len(places))
        return places.to(device), inverse.to(device)


def _head_index(queries: Range, first: int, group: int, device: torch.device) -> torch.Tensor:
    """For each query head its key head, counted from `first`; `group` query heads share one."""
    with torch.inference_mode(False):
        return torch.tensor([head // group - first for head in range(*queries)], dtype=torch.long, device=device)


@functools.lru_cache(maxsize=1024)
def _counts(lengths: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Tokens per rank in all streams of `lengths` together."""
    bounds = [[share(length, size, rank) for length in lengths] for rank in range(size)]
    return tuple(sum(stop - start for start, stop in parts) for parts in bounds)


class ArrivingHeads:
    """Queries, keys and values on their way to the ranks of their heads."""

    def __init__(
        self,
        exchange: Exchange,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        ranges: tuple[list[Range], list[Range]],
        queries: Sequence[int],
        sources: Sequence[int],
    ) -> None:
        (q, k, v), (heads, shared) = inputs, ranges
        if q.shape == k.shape and queries == sources and heads == shared:
            self._parts = [exchange.start_heads((q, k, v), heads, queries)]
        else:
            self._parts = [exchange.start_heads((q,), heads, queries), exchange.start_heads((k, v), shared, sources)]

    def result(self) -> list[torch.Tensor]:
        """q, k and v as from `bring_heads`."""
        return [tensor for part in self._parts for tensor in part.result()]


def bring_heads(
    exchange: Exchange,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ranges: tuple[list[Range], list[Range]],
    queries: Sequence[int],
    sources: Sequence[int],
) -> list[torch.Tensor]:
    """q [B, H, Lq, D], k and v [B, KV, Lk, D] of this rank's tokens -> its heads of all tokens, in rank order.

    ranges: as from `head_ranges`. queries, sources: tokens of each rank on both sides.
    """
    return ArrivingHeads(exchange, inputs, ranges, queries, sources).result()


class UlyssesPlan:
    """A `comfy.ldm.dit.TokenPlan` over one token group."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.size = exchange.size
        self.index = exchange.index
        # Index tensors are kept as long as the plan: captured graphs read them, and making one waits for the device.
        self.orders = functools.cache(functools.partial(_orders, self.size))
        self.head_index = functools.cache(_head_index)

    @property
    def inside(self) -> UlyssesPlan:
        """See `comfy.ldm.dit.TokenPlan.inside`."""
        return self

    def during_blocks(self) -> AbstractContextManager[None]:
        """See `comfy.ldm.dit.TokenPlan.during_blocks`."""
        return self.exchange.during_blocks()

    def outputs(self, layers: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """See `comfy.ldm.dit.TokenPlan.outputs`."""
        return [layer() for layer in layers]

    def bounds(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank's tokens in a stream, by default this rank's."""
        return share(length, self.size, self.index if rank is None else rank)

    def counts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens per rank in all streams of `lengths` together."""
        return _counts(tuple(lengths), self.size)

    def gather_parts(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """Parts of all ranks, of the given lengths, concatenated."""
        return self.exchange.gather(local, dim, counts)

    def gather(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Whole streams, joined in order, from this rank's parts of them."""
        ranked = self.exchange.gather(local, dim, self.counts(lengths))
        if len(lengths) == 1:
            return ranked  # rank order is the stream's order
        return ranked.index_select(dim, self.orders(tuple(lengths), local.device)[0])

    def sum_parts(self, parts: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """This rank's parts of whole streams, joined in order, whose tensor is the sum of all ranks' `parts`."""
        if len(lengths) > 1:
            parts = parts.index_select(dim, self.orders(tuple(lengths), parts.device)[1])
        return self.exchange.sum_parts(parts, dim, self.counts(lengths))

    def fitting_keys(
        self, spec: AttentionSpec, mine: Range, keys: Range, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, kv, L, D] of the key heads `keys`, one for each query head `mine` where they share unevenly."""
        group = spec.heads // spec.shared_heads
        if group == 1 or not (mine[0] % group or mine[1] % group):
            return k, v
        index = self.head_index(mine, keys[0], group, k.device)
        return k.index_select(1, index), v.index_select(1, index)

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """See `comfy.ldm.dit.TokenPlan.meet`."""
        if spec.queries.sharded and spec.sources.sharded:
            return HeadMeeting(self, spec, compute, in_order)
        return RowMeeting(self, spec, compute)


class HeadMeeting:
    """Queries and keys are sharded: all-to-all to all tokens of some heads, attention, all-to-all back."""

    def __init__(self, plan: UlyssesPlan, spec: AttentionSpec, compute: Compute, in_order: bool) -> None:
        self._plan, self._spec, self._compute, self._in_order = plan, spec, compute, in_order
        self._ranges = head_ranges(spec.heads, spec.shared_heads, plan.size)
        self._queries = plan.counts(spec.queries.lengths)
        self._sources = plan.counts(spec.sources.lengths)

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._inputs = ArrivingHeads(self._plan.exchange, (q, k, v), self._ranges, self._queries, self._sources)

    def attend(self) -> None:
        plan, spec = self._plan, self._spec
        q, k, v = self._inputs.result()
        mine, keys = (ranges[plan.index] for ranges in self._ranges)
        k, v = plan.fitting_keys(spec, mine, keys, k, v)
        if q.shape[1] == 0:  # more ranks than heads: this one only keeps tokens
            self._out = q
            return
        if self._in_order:
            q = self._ordered(q, spec.queries.lengths)
            k, v = (self._ordered(t, spec.sources.lengths) for t in (k, v))
        out = self._compute(q, k, v, spec.block(q.device, heads=mine))
        self._out = self._ordered(out, spec.queries.lengths, back=True) if self._in_order else out

    def _ordered(self, t: torch.Tensor, lengths: tuple[int, ...], back: bool = False) -> torch.Tensor:
        """[B, h, L, D] from rank order to the order of whole streams, or back."""
        if len(lengths) == 1:
            return t
        return t.index_select(2, self._plan.orders(lengths, t.device)[back])

    def send_back(self) -> None:
        self._returning = self._plan.exchange.start_tokens(self._out, self._ranges[0], self._queries)

    def result(self) -> torch.Tensor:
        returned: torch.Tensor = self._returning.result()
        return returned


class RowMeeting:
    """Whole keys: this rank's queries attend to them without communication. Shards of keys are gathered first."""

    def __init__(self, plan: UlyssesPlan, spec: AttentionSpec, compute: Compute) -> None:
        self._plan, self._spec, self._compute = plan, spec, compute

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        sources = self._spec.sources
        if sources.sharded:
            k, v = (self._plan.gather(t, 2, sources.lengths) for t in (k, v))
        self._inputs = q, k, v

    def attend(self) -> None:
        spec, plan = self._spec, self._plan
        q, k, v = self._inputs
        if q.shape[2] == 0:
            self._out = q
            return
        rows = None
        if spec.queries.sharded and spec.ordered:
            inverse = plan.orders(spec.queries.lengths, q.device)[1]
            start = sum(plan.counts(spec.queries.lengths)[: plan.index])
            rows = inverse[start : start + q.shape[2]]
        self._out = self._compute(q, k, v, spec.block(q.device, rows))

    def send_back(self) -> None:
        pass

    def result(self) -> torch.Tensor:
        return self._out
