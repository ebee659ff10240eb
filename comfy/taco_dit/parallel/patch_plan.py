"""PipeFusion's attention (Fang et al. 2024): a patch of tokens attends to keys and values that are partly a call old.

Between two steps of a sampler activations change little. A stage computes patch after patch; each attends to the keys and
values of all tokens, of which those of patches that this stage has computed in this call are new, the others of the call
before. The first calls of a run are computed exactly and fill the memory of keys and values.

Lossy. The error falls with every call that is computed exactly (`warm_up`), and is zero when all are.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from comfy.ldm.dit_state import Compute, DenoiserCall, DiTState, Meeting
from comfy.ldm.modules.attention import AttentionSpec
from comfy.taco_dit.core.plan import share

from .exchange import SingleExchange
from .sequence_parallel import HeadMeeting, RowMeeting, UlyssesPlan, bring_heads

Layer = tuple[str | None, int]
"""Name of a block, and which of its attentions among all tokens."""


@dataclass
class Memory:
    """Keys and values of one network call: by layer [B, KV, L, D] each, in the order of patches.

    shapes: batch, and lengths of all streams, for which they are.
    """

    shapes: tuple[object, ...]
    layers: dict[Layer, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class PatchPlan(UlyssesPlan):
    """A `comfy.ldm.dit.TokenPlan` of one patch: part `patch` of `patches` of the tokens that each rank has.

    within: how tokens are spread over ranks besides, None when they are not. patch: None while all patches are computed
    at once, exactly, and remembered.
    """

    def __init__(self, within: UlyssesPlan | None, memory: Memory, patches: int, patch: int | None) -> None:
        super().__init__(SingleExchange() if within is None else within.exchange)
        self.within, self.memory, self.patches, self.patch = within, memory, patches, patch
        self._seen: collections.Counter[str | None] = collections.Counter()
        self.places = functools.cache(self._places)

    def _of_rank(self, length: int, rank: int | None, patch: int | None) -> tuple[int, int]:
        first, last = share(length, self.size, self.index if rank is None else rank)
        if patch is None:
            return first, last
        start, stop = share(last - first, self.patches, patch)
        return first + start, first + stop

    def bounds(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank's tokens of this patch in a stream, by default this rank's."""
        return self._of_rank(length, rank, self.patch)

    def counts(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of this patch per rank in all streams of `lengths` together."""
        return self._counts_of(lengths, self.patch)

    def _counts_of(self, lengths: Sequence[int], patch: int | None) -> tuple[int, ...]:
        bounds = [[self._of_rank(length, rank, patch) for length in lengths] for rank in range(self.size)]
        return tuple(sum(stop - start for start, stop in parts) for parts in bounds)

    def gather(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Whole streams, while all patches are computed at once. Raises ValueError for a single patch."""
        if self.patch is not None:
            raise ValueError(
                "a patch of tokens was asked for whole streams, which PipeFusion does not have; set parallel.pipefusion to "
                "false for this workflow"
            )
        return super().gather(local, dim, lengths)

    def part(self, state: DiTState) -> DiTState:
        """This patch of a state that is spread over ranks as this plan's ranks are."""
        if self.patch is None:
            return state.replace(plan=self)
        streams, tokenwise = {}, {}
        for name, tokens in state.streams.items():
            start, stop = share(tokens.shape[1], self.patches, self.patch)
            streams[name] = tokens[:, start:stop]
        for name, axis in state.tokenwise.items():
            pieces, offset = [], 0
            for length in axis.lengths or ():
                total, start, stop = self._within_rank(length)
                pieces.append(axis.value.narrow(axis.dim, offset + start, stop - start))
                offset += total
            whole = axis.value if axis.whole is None else axis.whole
            tokenwise[name] = dataclasses.replace(axis, value=torch.cat(pieces, dim=axis.dim), whole=whole)
        return state.replace(streams=streams, tokenwise=tokenwise, plan=self)

    def _within_rank(self, length: int) -> tuple[int, int, int]:
        """This rank's tokens in a stream of `length`, and [start, stop) of the patch among them."""
        first, last = share(length, self.size, self.index)
        assert self.patch is not None
        return (last - first, *share(last - first, self.patches, self.patch))

    def span(self, lengths: Sequence[int]) -> tuple[int, int]:
        """[start, stop) of this patch in the order of patches."""
        counts = [sum(self._counts_of(lengths, patch)) for patch in range(self.patches)]
        if self.patch is None:
            return 0, sum(counts)
        start = sum(counts[: self.patch])
        return start, start + counts[self.patch]

    def _places(self, lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Places in whole streams of all tokens in the order of patches: patch by patch, rank by rank, stream by stream."""
        places = []
        for patch in range(self.patches):
            for rank in range(self.size):
                offset = 0
                for length in lengths:
                    start, stop = self._of_rank(length, rank, patch)
                    places.append(torch.arange(offset + start, offset + stop))
                    offset += length
        with torch.inference_mode(False):
            return torch.cat(places).to(device)

    def layer(self, name: str | None) -> Layer:
        """A key for the attention that is computed now; a block may have several."""
        self._seen[name] += 1
        return name, self._seen[name]

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """See `comfy.ldm.dit.TokenPlan.meet`."""
        if not (spec.queries.sharded and spec.sources.sharded):
            return RowMeeting(self, spec, compute)
        kind = RememberedMeeting if self.patch is None else PatchMeeting
        return kind(self, spec, compute, in_order)


class RememberedMeeting(HeadMeeting):
    """An exact attention whose keys and values are kept for the next call."""

    _plan: PatchPlan

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().send(q, k, v)
        plan, lengths = self._plan, self._spec.sources.lengths
        _, k, v = self._inputs.result()
        # from the order of ranks, in which they arrived, to that of patches
        index = plan.orders(lengths, k.device)[0][plan.places(lengths, k.device)]
        layer = plan.layer(self._spec.layer)
        known = plan.memory.layers.get(layer)
        if known is None or known[0].shape != k.shape:
            plan.memory.layers[layer] = k.index_select(2, index), v.index_select(2, index)
            return
        for kept, new in zip(known, (k, v)):
            kept.copy_(new.index_select(2, index))


class PatchMeeting(HeadMeeting):
    """Queries of one patch attend to its own keys and values and to those that are remembered of the others."""

    _plan: PatchPlan

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        plan = self._plan
        self._q, k, v = bring_heads(plan.exchange, (q, k, v), self._ranges, self._queries, self._sources)
        self._kept = plan.memory.layers[plan.layer(self._spec.layer)]
        start, stop = plan.span(self._spec.sources.lengths)
        for kept, new in zip(self._kept, (k, v)):
            kept[:, :, start:stop] = new

    def attend(self) -> None:
        plan, spec, q = self._plan, self._spec, self._q
        if q.shape[1] == 0 or q.shape[2] == 0:
            self._out = q
            return
        mine, keys = (ranges[plan.index] for ranges in self._ranges)
        k, v = plan.fitting_keys(spec, mine, keys, *self._kept)
        mask = None
        if spec.ordered:
            rows = plan.places(spec.queries.lengths, q.device)[slice(*plan.span(spec.queries.lengths))]
            mask = spec.block(q.device, rows, mine, plan.places(spec.sources.lengths, q.device))
        self._out = self._compute(q, k, v, mask)


class StaleKeys:
    """Keys and values of the network calls of one sampling run, and which calls are computed exactly.

    patches: into how many parts tokens are cut, at least the number of stages. warm_up: exact calls at the beginning of a
    run, at least one. stale_calls: denoiser calls of this run that were not computed exactly.
    """

    def __init__(self, patches: int, warm_up: int) -> None:
        self.patches, self.warm_up = patches, max(1, warm_up)
        self.begin_run()

    def begin_run(self) -> None:
        """A new sampling run: nothing is remembered."""
        self._memories: dict[int, Memory] = {}
        self._since, self._before = 0, float("inf")
        self._exact, self._ordinal, self._counted = True, 0, False
        self.stale_calls = 0

    def release(self) -> None:
        """Give up keys and values, after a run; what was counted stays."""
        self._memories.clear()

    def begin_call(self, sigma: float, exact: bool = False) -> None:
        """A new denoiser call at noise level `sigma`. `exact`: code that is not ours needs whole tokens in it.

        Where the noise level rises, a sampler begins again with another picture, and so does the warm-up.
        """
        self._since = 1 if sigma > self._before * 1.001 else self._since + 1
        self._before = sigma
        self._exact, self._ordinal, self._counted = exact or self._since <= self.warm_up, 0, False

    def plans(self, state: DiTState, call: DenoiserCall) -> list[PatchPlan] | None:
        """The patches of a denoiser call's next network call; one plan for all tokens where they are computed exactly.

        None: where linears are cut, tokens are not cut into patches.
        """
        within = call.plan
        if within is not None and not isinstance(within, UlyssesPlan):
            return None
        shapes = (next(iter(state.streams.values())).shape[0], *state.lengths.items())
        memory = self._memories.get(self._ordinal)
        exact = self._exact or memory is None or memory.shapes != shapes
        if memory is None or memory.shapes != shapes:
            memory = self._memories[self._ordinal] = Memory(shapes)
        self._ordinal += 1
        if exact:
            return [PatchPlan(within, memory, self.patches, None)]
        self.stale_calls += not self._counted
        self._counted = True
        return [PatchPlan(within, memory, self.patches, patch) for patch in range(self.patches)]
