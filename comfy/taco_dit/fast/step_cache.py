"""Denoising steps that reuse what most blocks added in an earlier one. Lossy, so only where the configuration asks for it.

From one step to the next the blocks of a diffusion transformer add nearly the same to its tokens. What all blocks after the
first added in the last computed step is kept, and added instead of computing it again, when the first block's own
contribution has changed little since then (`first_block`: the first-block cache of ParaAttention, after TeaCache, Liu et
al. 2024), or in fixed intervals (`interval`: DeepCache's schedule, Ma et al. 2023).

The relative change is a sum over the tokens of all ranks that share a picture, added in the same order on each, so they
decide alike. What is kept belongs to one network, one set of conditionings and rows, and one sampling run. It is dropped
when weights change, when sigma grows (restarts), and is not used when a sigma is evaluated again, in the first
`warm_up_steps` computed steps, and in the last.

In a captured call the decision is between two graphs: the blocks, or what they added.
"""

from __future__ import annotations

import collections
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy.denoiser_batch import DenoiserBatch
from comfy.ldm.dit import Block
from comfy.ldm.dit_state import DiTState
from comfy.weights.store import store_of

MOST_SLOTS = 8
Streams = dict[str, torch.Tensor]
Span = Callable[[Sequence[Block], DiTState], DiTState]
_versions = itertools.count(1)


@dataclass(frozen=True)
class CacheSettings:
    """When a step is reused. threshold: relative change of the first block's contribution below which it is.

    interval: one step of so many is computed. warm_up_steps: computed at least, before the first is reused.
    """

    mode: str = "first_block"
    threshold: float = 0.08
    interval: int = 2
    warm_up_steps: int = 4

    def describe(self) -> str:
        """For people."""
        how = f"change below {self.threshold:g}" if self.mode == "first_block" else f"one of {self.interval} computed"
        return f"step cache ({self.mode}, {how})"


def _spans(blocks: Sequence[Block]) -> tuple[list[Block], list[tuple[bool, list[Block]]]]:
    """(blocks up to the first that may be skipped, the others in runs of those that may and may not be skipped)."""
    first = next((i for i, block in enumerate(blocks) if block.cacheable), len(blocks) - 1) + 1
    runs = itertools.groupby(blocks[first:], key=lambda block: block.cacheable)
    return list(blocks[:first]), [(cacheable, list(run)) for cacheable, run in runs]


def _added(after: DiTState, before: DiTState) -> Streams:
    """What blocks added to this rank's tokens of each stream."""
    return {name: tokens - before.streams[name] for name, tokens in after.streams.items()}


def _same_streams(after: DiTState, before: DiTState) -> bool:
    """Whether blocks changed nothing but the values of streams and the stack of skips."""
    alike = after.streams.keys() == before.streams.keys() and after.tokenwise.keys() == before.tokenwise.keys()
    shapes = alike and all(tokens.shape == before.streams[name].shape for name, tokens in after.streams.items())
    same = after.sample.keys() == before.sample.keys() and all(v is before.sample[k] for k, v in after.sample.items())
    return shapes and same


@dataclass
class _Kept:
    """Memory of one kind of call. first: what the first block added in the last computed step; rests: what each run of
    blocks that may be skipped added; change: by how much the first block's contribution differs from `first`, and the size
    of `first`, for each rank, [ranks, 2] fp32; outs: tokens after all blocks, which graphs write and read."""

    first: Streams
    rests: list[Streams]
    change: torch.Tensor
    outs: Streams | None = None
    version: int = field(default_factory=lambda: next(_versions))


class Slot:
    """The cache of one kind of call: `DenoiserCall.cache`."""

    def __init__(self, settings: CacheSettings, network: Any) -> None:
        self.settings = settings
        self.network = weakref.ref(network)
        self.recorder: Any = None
        self.reused: bool | None = None
        """What was decided in the call under way; None: nothing yet."""
        self._kept: _Kept | None = None
        self._unusable = False
        self.forget()

    def forget(self) -> None:
        """Nothing of what was computed is to be used again; the memory stays, for graphs refer to it."""
        self._tag: Any = None
        self._sigma = math.inf
        self._computed = self._skipped = 0
        self._valid = self._admitted = self._repeated = False

    @property
    def identity(self) -> Any:
        """What a captured call that reads and writes this memory belongs to."""
        return id(self), 0 if self._kept is None else self._kept.version

    # --- deciding --------------------------------------------------------------------------------------------------

    def begin(self, tag: Any, sigma: float, last: bool) -> None:
        """Before a call at `sigma`. tag: the conditionings and weights; last: whether it is the last step of the run."""
        if tag != self._tag or sigma > self._sigma:
            self.forget()
        after_repeated, self._repeated = self._repeated, sigma == self._sigma
        # Calls at one sigma may be of different tokens (windows), which only the first block's contribution tells apart.
        doubtful = self._repeated or (after_repeated and self.settings.mode == "interval")
        enough = self._computed >= self.settings.warm_up_steps
        self._admitted = self._valid and enough and not doubtful and not last
        self._tag, self._sigma, self.reused = tag, sigma, None

    def decide(self) -> bool:
        """Whether the call reuses what is kept; once a call, when the first block's contribution is measured."""
        reuse = self._admitted
        if reuse and self.settings.mode == "interval":
            reuse = self._skipped + 1 < self.settings.interval
        elif reuse:
            assert self._kept is not None
            difference, size = map(sum, zip(*self._kept.change.tolist(), strict=True))
            reuse = difference < self.settings.threshold * size
        self.reused, self._valid = reuse, True
        self._skipped = self._skipped + 1 if reuse else 0
        self._computed += not reuse
        return reuse

    # --- running ---------------------------------------------------------------------------------------------------

    def run(self, blocks: Sequence[Block], state: DiTState, span: Span) -> DiTState:
        """The blocks on a state; `span(blocks, state)` runs some of them."""
        if self._unusable:
            return span(blocks, state)
        first, runs = _spans(blocks)
        after = span(first, state)
        if not _same_streams(after, state):
            self._unusable = True
            return self._rest(runs, after, span, None)[0]
        kept = self._memory(_added(after, state), len(runs), after)
        self._measure(kept, _added(after, state), after)
        if self.recorder is None:
            return (
                self._reuse(kept, runs, after, span) if self.decide() else self._compute(kept, runs, state, after, span)
            )
        return self._record(kept, runs, state, after, span)

    def _memory(self, added: Streams, runs: int, after: DiTState) -> _Kept:
        kept = self._kept
        alike = kept is not None and kept.first.keys() == added.keys()
        if kept is None or not alike or any(kept.first[n].shape != t.shape for n, t in added.items()):
            self._valid = self._admitted = False
            device = next(iter(added.values())).device
            change = torch.zeros(1 if after.plan is None else after.plan.size, 2, device=device)
            rests = [{name: torch.zeros_like(tokens) for name, tokens in added.items()} for _ in range(runs)]
            kept = self._kept = _Kept({name: torch.zeros_like(t) for name, t in added.items()}, rests, change)
        return kept

    def _measure(self, kept: _Kept, added: Streams, after: DiTState) -> None:
        """Put the change of the first block's contribution on all ranks that share the picture."""
        if self.settings.mode == "interval":
            return
        pairs = [(tokens.float(), kept.first[name].float()) for name, tokens in added.items()]
        difference = torch.stack([(now - before).abs().sum() for now, before in pairs]).sum()
        size = torch.stack([before.abs().sum() for _, before in pairs]).sum()
        mine = torch.stack((difference, size)).unsqueeze(0)
        whole = mine if after.plan is None else after.plan.gather_parts(mine, 0, [1] * after.plan.size)
        kept.change.copy_(whole)

    def _compute(self, kept: _Kept, runs: Any, before: DiTState, after: DiTState, span: Span) -> DiTState:
        for name, tokens in _added(after, before).items():
            kept.first[name].copy_(tokens)
        state, whole = self._rest(runs, after, span, kept)
        self._valid = self._valid and whole
        self._unusable = self._unusable or not whole
        return state

    def _rest(self, runs: Any, state: DiTState, span: Span, kept: _Kept | None) -> tuple[DiTState, bool]:
        """The runs of blocks after the first block, and whether what they added can be added again."""
        whole = True
        for i, (cacheable, blocks) in enumerate(runs):
            after = span(blocks, state)
            if cacheable and kept is not None:
                if _same_streams(after, state) and not after.skips:
                    for name, tokens in _added(after, state).items():
                        kept.rests[i][name].copy_(tokens)
                else:
                    whole = False
            state = after
        return state, whole

    def _reuse(self, kept: _Kept, runs: Any, state: DiTState, span: Span) -> DiTState:
        for i, (cacheable, blocks) in enumerate(runs):
            if cacheable:
                streams = {name: tokens + kept.rests[i][name] for name, tokens in state.streams.items()}
                state = state.replace(streams=streams, skips=())
            else:
                state = span(blocks, state)
        return state

    def _record(self, kept: _Kept, runs: Any, before: DiTState, after: DiTState, span: Span) -> DiTState:
        """While a call is captured: both ways in graphs of their own, which write the same memory."""
        if kept.outs is None:
            kept.outs = {name: torch.empty_like(tokens) for name, tokens in kept.first.items()}
        outs = kept.outs

        def write(state: DiTState) -> None:
            for name, tokens in state.streams.items():
                outs[name].copy_(tokens)

        self.recorder.fork(
            self.decide,
            lambda: write(self._compute(kept, runs, before, after, span)),
            lambda: write(self._reuse(kept, runs, after, span)),
        )
        return after.replace(streams=dict(outs), skips=())


class StepCache:
    """The slots of one process, and what was reused in a sampling run. One per engine."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.steps: list[bool] = []
        """For each denoiser call of the run whether it was reused."""
        self._slots: collections.OrderedDict[Any, Slot] = collections.OrderedDict()
        self._ends: tuple[Any, float] = (None, math.inf)
        self._busy = False

    def expected_share(self) -> float:
        """The share of the next run's calls that is expected to be reused: as configured, or as in the run before."""
        if self.settings.mode == "interval":
            return 1 - 1 / self.settings.interval
        return sum(self.steps) / len(self.steps) if self.steps else 0.0

    def begin_run(self) -> None:
        """Before sampling: nothing of another run is reused."""
        self.steps, self._busy = [], True
        for slot in self._slots.values():
            slot.forget()

    def end_run(self) -> None:
        """After sampling, also after a failure."""
        self._busy = False

    def release_memory(self) -> None:
        """Give up the memory, as far as no captured call needs it; not within a run, where all ranks have to decide alike."""
        if not self._busy:
            self._slots.clear()

    def _last_sigma(self, options: dict[str, Any]) -> float:
        """The sigma of the run's last step; infinite, so that all are the last, where the sampler does not tell."""
        sigmas = options.get("sample_sigmas")
        if not isinstance(sigmas, torch.Tensor) or len(sigmas) < 2:
            return math.inf
        if self._ends[0] is not sigmas:  # reading it makes the host wait for the device
            self._ends = sigmas, float(sigmas[-2])
        return self._ends[1]

    def slot(self, model: Any, batch: DenoiserBatch, place: Any) -> Slot:
        """The slot of a batch, ready for its call. place: what else tells batches of one denoiser call apart, hashable."""
        network = model.diffusion_model
        shapes = tuple((k, tuple(v.shape)) for k, v in batch.conditioning.items() if isinstance(v, torch.Tensor))
        key = id(network), tuple(batch.cond_or_uncond), tuple(batch.x.shape), shapes, place
        slot = self._slots.get(key)
        if slot is None or slot.network() is not network:
            slot = self._slots[key] = Slot(self.settings, network)
        self._slots.move_to_end(key)
        while len(self._slots) > MOST_SLOTS:
            self._slots.popitem(last=False)
        options = batch.conditioning.get("transformer_options") or {}
        sigma = float(batch.sigma.max())
        tag = tuple(options.get("uuids") or ()), store_of(model).rewritten  # the same on all ranks at the same call
        slot.begin(tag, sigma, sigma <= self._last_sigma(options))
        return slot

    def note_step(self, slots: Sequence[Slot]) -> None:
        """After a denoiser call: it was reused if all its batches were."""
        self.steps.append(bool(slots) and all(slot.reused for slot in slots))

    def text(self) -> str:
        """For the console."""
        return f"{self.steps.count(False)} of {len(self.steps)} steps computed"
