"""Sequence parallelism by ring attention (Liu et al. 2023), alone or around Ulysses (USP, Fang & Zhao 2024).

The ranks of a token group are `ring` parts of neighbours. Within a part heads are exchanged as in `UlyssesPlan`, so each
rank has its part's tokens of some heads. Keys and values of these heads then go from part to part, and every rank attends
to each in turn; outputs are merged by their log-sum-exp, in fp32. Queries stay. While one part is attended to the next
is on its way.

Where heads suffice Ulysses sends less; the ring has no limit on ranks. A custom node's attention function gives no
log-sum-exp and must see all tokens of its heads, so such a call takes Ulysses over all ranks of the token group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from comfy.ldm.dit_state import Compute, Meeting
from comfy.ldm.modules import kernels
from comfy.ldm.modules.attention import AttentionSpec, broadcast_mask, own_attention
from comfy.taco_dit.core.plan import ParallelDims

from .exchange import CollectiveExchange, CollectiveRing, Exchange, Passing, Ring, SingleExchange, head_ranges
from .sequence_parallel import HeadMeeting, RowMeeting, UlyssesPlan, bring_heads
from .zigzag import Zigzag


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) of a part; their places in whole streams are between `first` and `last`."""

    start: int
    stop: int
    first: int
    last: int


class RingPlan(UlyssesPlan):
    """A `comfy.ldm.dit.TokenPlan` over one token group of `ring.size * heads.size` ranks.

    exchange: over the whole group. heads: over this rank's part, neighbours in the group. ring: over the ranks that have
    this rank's place in their parts, in the order of the parts.
    """

    def __init__(self, exchange: Exchange, heads: Exchange, ring: Ring) -> None:
        super().__init__(exchange)
        if heads.size * ring.size != self.size:
            raise ValueError(f"{heads.size} x {ring.size} ranks are not the {self.size} ranks of the token group")
        self.heads, self.ring = heads, ring
        self.zigzag = functools.cache(self._zigzag)

    @contextlib.contextmanager
    def during_blocks(self) -> Iterator[None]:
        """See `comfy.ldm.dit.TokenPlan.during_blocks`."""
        with self.exchange.during_blocks(), self.heads.during_blocks():
            yield

    def part(self, counts: tuple[int, ...], index: int) -> tuple[int, int]:
        """[start, stop) in rank order of the tokens of part `index`; `counts` are the tokens of each rank."""
        first = index * self.heads.size
        start = sum(counts[:first])
        return start, start + sum(counts[first : first + self.heads.size])

    def places(self, lengths: tuple[int, ...], index: int, device: torch.device) -> torch.Tensor:
        """Places in whole streams of the tokens of part `index`, in rank order."""
        return self.orders(lengths, device)[1][slice(*self.part(self.counts(lengths), index))]

    def _zigzag(self, lengths: tuple[int, ...], device: torch.device) -> Zigzag:
        cpu = torch.device("cpu")
        return Zigzag([self.places(lengths, i, cpu) for i in range(self.ring.size)], self.ring.index, device)

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """See `comfy.ldm.dit.TokenPlan.meet`."""
        if not (spec.queries.sharded and spec.sources.sharded):
            return RowMeeting(self, spec, compute)
        if compute is not own_attention:
            return HeadMeeting(self, spec, compute, in_order)
        return RingMeeting(self, spec)


def native_plan(
    group: Callable[[tuple[int, ...]], Any], dims: ParallelDims, rank: int, clock: Any = None,
    exchange_of: Callable[[tuple[int, ...]], Exchange] | None = None,
) -> UlyssesPlan:  # fmt: skip
    """The token plan of `rank` under `dims`.

    group: makes the process group of some ranks. exchange_of: makes the exchange of heads among some; default:
    collectives.
    """

    def collectives(ranks: tuple[int, ...]) -> Exchange:
        return CollectiveExchange(group(ranks), clock)

    exchange_of = exchange_of or collectives
    if dims.ring_degree == 1:
        return UlyssesPlan(exchange_of(dims.token_group(rank)))
    heads = SingleExchange() if dims.ulysses_degree == 1 else exchange_of(dims.ulysses_group(rank))
    return RingPlan(collectives(dims.token_group(rank)), heads, CollectiveRing(group(dims.ring_group(rank)), clock))


class RingMeeting:
    """Queries and keys are sharded: heads are exchanged within the part, keys and values go round the ring."""

    def __init__(self, plan: RingPlan, spec: AttentionSpec) -> None:
        self._plan, self._spec = plan, spec
        self._ranges = head_ranges(spec.heads, spec.shared_heads, plan.heads.size)
        self._mine, self._keys = (ranges[plan.heads.index] for ranges in self._ranges)
        counts = plan.counts(spec.queries.lengths), plan.counts(spec.sources.lengths)
        first = plan.ring.index * plan.heads.size
        self._queries, self._sources = (found[first : first + plan.heads.size] for found in counts)
        # A rank sees few of the keys or all of them under a causal mask, unless tokens are dealt anew for this attention.
        self._dealt = spec.causal and spec.keys is None and self._mine[1] > self._mine[0]
        self._merged: dict[Run, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- tokens of parts -------------------------------------------------------------------------------------------

    def _runs(self, lengths: tuple[int, ...], index: int) -> list[Run]:
        """The tokens of part `index`, in pieces of which causal masks hide all or nothing where that is possible."""
        if self._dealt:
            runs, start = [], 0
            for a, b in self._plan.zigzag(lengths, torch.device("cpu")).chunks(index):
                runs.append(Run(start, start + b - a, a, b - 1))
                start += b - a
            return [run for run in runs if run.stop > run.start]
        start, stop = self._plan.part(self._plan.counts(lengths), index)
        if start == stop:
            return []
        if not self._spec.causal:
            return [Run(0, stop - start, 0, sum(lengths) - 1)]
        places = self._plan.places(lengths, index, torch.device("cpu"))
        return [Run(0, stop - start, int(places.min()), int(places.max()))]

    def _places(self, lengths: tuple[int, ...], index: int, device: torch.device) -> torch.Tensor:
        if self._dealt:
            return self._plan.zigzag(lengths, device).places(index)
        return self._plan.places(lengths, index, device)

    # --- the four steps --------------------------------------------------------------------------------------------

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        plan, spec = self._plan, self._spec
        q, k, v = bring_heads(plan.heads, (q, k, v), self._ranges, self._queries, self._sources)
        if self._dealt:
            q, k, v = plan.zigzag(spec.queries.lengths, q.device).deal(plan.ring, q, k, v)
        self._q = q
        if q.shape[1] == 0:  # more ranks in the part than heads; so it is for this rank's peers in the ring
            return
        self._kv = torch.stack((k, v))
        self._passing = self._pass_on(self._kv, 0)

    def _owner(self, step: int) -> int:
        """The part whose keys and values are here at a step."""
        return (self._plan.ring.index - step) % self._plan.ring.size

    def _pass_on(self, kv: torch.Tensor, step: int) -> Passing | None:
        """Begin to bring the keys and values of the next step."""
        if step + 1 == self._plan.ring.size:
            return None
        lengths, owner = self._spec.sources.lengths, self._owner(step + 1)
        if self._dealt:
            tokens = sum(b - a for a, b in self._plan.zigzag(lengths, torch.device("cpu")).chunks(owner))
        else:
            start, stop = self._plan.part(self._plan.counts(lengths), owner)
            tokens = stop - start
        return self._plan.ring.pass_on(kv, (*kv.shape[:3], tokens, kv.shape[4]))

    def attend(self) -> None:
        q = self._q
        if q.shape[1] == 0:
            self._out = q
            return
        kv, passing = self._kv, self._passing
        for step in range(self._plan.ring.size):
            if step:
                assert passing is not None
                kv = passing.result()
                passing = self._pass_on(kv, step)
            self._attend_part(kv, self._owner(step))
        outs = []
        queries = self._runs(self._spec.queries.lengths, self._plan.ring.index)
        for run in queries:
            found = self._merged.get(run)
            outs.append(torch.zeros_like(q[:, :, run.start : run.stop]) if found is None else found[0].to(q.dtype))
        self._out = torch.cat(outs, dim=2) if outs else q
        del self._kv, self._passing

    def _attend_part(self, kv: torch.Tensor, owner: int) -> None:
        """Attend to one part's keys and merge with what is there."""
        plan, spec = self._plan, self._spec
        k, v = plan.fitting_keys(spec, self._mine, self._keys, kv[0], kv[1])
        keys = self._runs(spec.sources.lengths, owner)
        for queries in self._runs(spec.queries.lengths, plan.ring.index):
            for run in keys:
                if spec.causal and run.first > queries.last:
                    continue  # all of it is later than these queries
                span = slice(run.start, run.stop)
                mask = self._mask(queries, run, owner)
                q = self._q[:, :, queries.start : queries.stop]
                out, lse = kernels.run(q, k[:, :, span], v[:, :, span], mask, need_lse=True)
                assert lse is not None
                before = self._merged.get(queries)
                self._merged[queries] = (out.float(), lse) if before is None else kernels.merge(*before, out, lse)

    def _mask(self, queries: Run, keys: Run, owner: int) -> torch.Tensor | None:
        """The mask between some queries of this rank and some keys of part `owner`."""
        spec, device = self._spec, self._q.device
        if spec.causal and keys.last <= queries.first:
            spec = dataclasses.replace(spec, causal=False)
        if not spec.ordered:
            return None
        rows = self._places(spec.queries.lengths, self._plan.ring.index, device)[queries.start : queries.stop]
        columns = self._places(spec.sources.lengths, owner, device)[keys.start : keys.stop]
        return broadcast_mask(spec.block(device, rows, self._mine, columns))

    def send_back(self) -> None:
        plan, out = self._plan, self._out
        if self._dealt:
            out = plan.zigzag(self._spec.queries.lengths, out.device).take_back(plan.ring, out)
        self._returning = plan.heads.start_tokens(out, self._ranges[0], self._queries)

    def result(self) -> torch.Tensor:
        returned: torch.Tensor = self._returning.result()
        return returned
