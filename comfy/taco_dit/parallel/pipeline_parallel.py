"""Pipeline parallelism: each stage of ranks has some of a network's blocks, and tokens go from stage to stage.

One copy of the network is spread over the stages of its layout (`Layout.pipeline_stages`). Every stage embeds the inputs
itself, which is little work; after its blocks it sends the tokens on, and the last stage gives the result to all. To keep
all stages busy a call is cut into items that follow one another through the stages:

- rows (conditionings and pictures; Huang et al. 2019, GPipe): exact. With one row the stages work in turn, which pools
  memory but saves no time.
- patches of tokens (Fang et al. 2024, PipeFusion): a patch attends to the keys and values that the other patches had in
  the call before. Lossy, so only on request; see `patch_plan`.

With S stages and n items a call takes (n + S - 1) / (n S) of the time of one rank.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from comfy.ldm.dit import Block
from comfy.ldm.dit_state import DenoiserCall, DiTState, TokenAxis
from comfy.taco_dit.core.config_manager import ParallelConfig
from comfy.taco_dit.core.data_plane import Group, Pending
from comfy.taco_dit.core.layout import Layout
from comfy.taco_dit.core.plan import share
from comfy.taco_dit.core.rows import has_foreign_code

from .patch_plan import PatchPlan, StaleKeys

Run = Callable[..., DiTState]
"""`run(state, call, blocks=blocks)`: the state after some blocks on this rank."""


class Links:
    """What the stages of one copy send one another.

    group: makes the group of some ranks. ranks: of the stages, in order. rank: this process.
    """

    def __init__(self, group: Callable[[tuple[int, ...]], Group], ranks: Sequence[int], rank: int) -> None:
        self.size, self.index = len(ranks), tuple(ranks).index(rank)
        pairs = list(zip(ranks, ranks[1:]))
        self._before = group(pairs[self.index - 1]) if self.index else None
        self._after = group(pairs[self.index]) if self.index + 1 < self.size else None
        self._all = group(tuple(ranks))

    @property
    def is_first(self) -> bool:
        """Whether no stage comes before this one."""
        return self._before is None

    @property
    def is_last(self) -> bool:
        """Whether no stage comes after this one."""
        return self._after is None

    def send(self, flat: torch.Tensor) -> Pending:
        """Begin to send a flat tensor to the next stage."""
        assert self._after is not None
        return self._after.shift(flat.new_empty(0), flat)

    def receive(self, out: torch.Tensor) -> Pending:
        """Begin to fill a flat tensor from the stage before."""
        assert self._before is not None
        return self._before.shift(out, out.new_empty(0))

    def from_last(self, tensor: torch.Tensor) -> None:
        """Overwrite a contiguous tensor with the last stage's."""
        self._all.broadcast(tensor, self.size - 1)


def _packed(state: DiTState) -> torch.Tensor:
    """The tokens of all streams as one flat tensor."""
    return torch.cat([tokens.reshape(-1) for tokens in state.streams.values()])


def _unpacked(state: DiTState, flat: torch.Tensor) -> DiTState:
    """The state with the tokens of `flat` in its streams, which have the shapes they have now."""
    parts = flat.split([tokens.numel() for tokens in state.streams.values()])
    return state.replace(
        streams={name: part.view(tokens.shape) for (name, tokens), part in zip(state.streams.items(), parts)}
    )


def _rows(value: Any, batch: int, start: int, stop: int) -> Any:
    """Rows [start, stop) of tensors that have `batch` of them, also in lists, tuples and dataclasses; else as it is."""
    cut = functools.partial(_rows, batch=batch, start=start, stop=stop)
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
        return value[start:stop]
    if type(value) in (list, tuple):
        return type(value)(map(cut, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{each.name: cut(getattr(value, each.name)) for each in dataclasses.fields(value)}
        )
    return value


def rows_of_state(state: DiTState, start: int, stop: int) -> DiTState:
    """Rows [start, stop) of every tensor of a state that has one for each row of the batch."""
    batch = next(iter(state.streams.values())).shape[0]
    cut = functools.partial(_rows, batch=batch, start=start, stop=stop)

    def cut_axis(axis: TokenAxis) -> TokenAxis:
        return dataclasses.replace(axis, value=cut(axis.value), whole=cut(axis.whole))

    return state.replace(
        streams={name: cut(tokens) for name, tokens in state.streams.items()},
        tokenwise={name: cut_axis(axis) for name, axis in state.tokenwise.items()},
        sample={name: cut(value) for name, value in state.sample.items()},
    )


def rows_of_call(call: DenoiserCall, batch: int, start: int, stop: int) -> DenoiserCall:
    """The call with rows [start, stop) of ControlNet residuals and prepared layers."""
    cut = functools.partial(_rows, batch=batch, start=start, stop=stop)
    return dataclasses.replace(
        call,
        control={kind: [cut(residual) for residual in residuals] for kind, residuals in call.control.items()},
        prepared={module: cut(out) for module, out in call.prepared.items()},
    )


class StagePipeline:
    """The `pipeline` of a denoiser call: runs a network's blocks in the stages of this rank's copy.

    links: to the other stages. stages: [start, stop) of each stage's blocks. rows_independent: whether rows may follow one
    another instead of being computed together. stale: keys and values of the call before, for PipeFusion; None: exact.
    """

    def __init__(
        self,
        links: Links,
        stages: Sequence[tuple[int, int]],
        rows_independent: bool = True,
        stale: StaleKeys | None = None,
    ) -> None:
        self._links, self._stages = links, stages
        self._rows_independent, self._stale = rows_independent, stale

    def run(self, blocks: Sequence[Block], state: DiTState, call: DenoiserCall, run: Run) -> DiTState:
        """The state after all blocks, on every rank; `run` runs some of them on this one.

        Raises ValueError when the blocks are not those that were cut into stages, and when tokens would have to be kept
        for blocks of another stage.
        """
        if self._stages[-1][1] != len(blocks):
            raise ValueError(
                f"this network was cut into pipeline stages with {self._stages[-1][1]} blocks, but has {len(blocks)} now; "
                "load the model again, or set parallel.pipeline_parallel to false for packs that add or remove blocks"
            )
        call = dataclasses.replace(call, pipeline=None)
        mine = blocks[slice(*self._stages[self._links.index])]
        state = state if state.plan is call.plan else state.shard(call.plan)
        done = self._through(self._items(state, call), functools.partial(run, blocks=mine))
        return self._collected(state, done)

    def _items(self, state: DiTState, call: DenoiserCall) -> Iterator[tuple[DiTState, DenoiserCall]]:
        """What follows one another through the stages: (state, call) of each."""
        batch = next(iter(state.streams.values())).shape[0]
        plans = None if self._stale is None else self._stale.plans(state, call)
        if plans is not None:
            for plan in plans:
                yield plan.part(state), dataclasses.replace(call, plan=plan)
            return
        # Streams of another batch (several VACE controls) are rows in an order of their own.
        alike = all(tokens.shape[0] == batch for tokens in state.streams.values())
        count = min(batch, 4 * self._links.size) if self._rows_independent and alike else 1
        for i in range(count):
            start, stop = share(batch, count, i)
            yield rows_of_state(state, start, stop), rows_of_call(call, batch, start, stop)

    def _through(
        self, items: Iterator[tuple[DiTState, DenoiserCall]], run: Callable[[DiTState, DenoiserCall], DiTState]
    ) -> list[DiTState]:
        """Each item's state after this stage. The next item's tokens are on their way while one is computed."""
        links, listed = self._links, list(items)
        sent: list[tuple[Pending, torch.Tensor]] = []
        done = []
        arriving = None if links.is_first else self._expect(listed[0][0])
        for i, (state, call) in enumerate(listed):
            if arriving is not None:
                pending, flat = arriving
                arriving = self._expect(listed[i + 1][0]) if i + 1 < len(listed) else None
                pending.wait()
                state = _unpacked(state, flat)
            state = run(state, call)
            if state.skips:
                raise ValueError(
                    f"block {self._stages[links.index][1] - 1} ends a pipeline stage while tokens are kept for later blocks "
                    "(skip connections), which stages do not pass on; set parallel.pipeline_parallel to false for this model"
                )
            if not links.is_last:
                flat = _packed(state)
                sent.append((links.send(flat), flat))
            done.append(state)
        for pending, _ in sent:
            pending.wait()
        return done

    def _expect(self, state: DiTState) -> tuple[Pending, torch.Tensor]:
        """Begin to receive the tokens of an item from the stage before."""
        like = next(iter(state.streams.values()))
        flat = like.new_empty(sum(tokens.numel() for tokens in state.streams.values()))
        return self._links.receive(flat), flat

    def _collected(self, state: DiTState, done: Sequence[DiTState]) -> DiTState:
        """`state` with the last stage's tokens of all items."""
        by_tokens = isinstance(done[0].plan, PatchPlan)
        if self._links.is_last:
            flat = _packed(_joined(state, done, by_tokens))
        else:
            like = next(iter(state.streams.values()))
            flat = like.new_empty(sum(tokens.numel() for tokens in state.streams.values()))
        self._links.from_last(flat)
        return _unpacked(state, flat)


def _joined(state: DiTState, done: Sequence[DiTState], by_tokens: bool) -> DiTState:
    """`state` with the streams of its items, which are its patches or its rows."""
    axis = 1 if by_tokens else 0
    return state.replace(
        streams={name: torch.cat([item.streams[name] for item in done], dim=axis) for name in state.streams}
    )


class Pipelines:
    """The pipelines of a process: what the engine needs for networks in stages."""

    def __init__(self, config: ParallelConfig, manager: Any) -> None:
        self._config, self._manager = config, manager
        self._links: dict[tuple[int, Layout], Links] = {}
        self._stale: weakref.WeakKeyDictionary[Any, StaleKeys] = weakref.WeakKeyDictionary()
        self._calls = 0

    def begin_run(self) -> None:
        """Before sampling: keys and values of the last run are of another picture."""
        self._stale.clear()
        self._calls = 0

    def end_run(self) -> None:
        """After sampling, whether it succeeded or not: keys and values of all blocks are gigabytes."""
        for keys in self._stale.values():
            keys.release()

    def of(
        self, model: Any, layout: Layout, batches: Sequence[Any], options: dict[str, Any], rows_independent: bool
    ) -> StagePipeline | None:
        """The pipeline of a denoiser call of a model; None when its layout has one stage."""
        if layout.stages == 1:
            return None
        stale = self._stale_keys(model, layout) if self._config.pipefusion else None
        if stale is not None:
            sigma = max(float(batch.sigma.max()) for batch in batches)
            stale.begin_call(sigma, has_foreign_code(model.diffusion_model, batches, options))
            self._calls += 1
        return StagePipeline(self._links_of(layout), layout.pipeline_stages, rows_independent, stale)

    def _stale_keys(self, model: Any, layout: Layout) -> StaleKeys:
        if model not in self._stale:
            patches = self._config.pipefusion_patches or 4 * layout.stages
            self._stale[model] = StaleKeys(patches, self._config.pipefusion_warmup_steps)
        return self._stale[model]

    def _links_of(self, layout: Layout) -> Links:
        data, rank = self._manager.data, self._manager.rank
        key = (data.generation, layout)
        if key not in self._links:
            self._links = {known: links for known, links in self._links.items() if known[0] == data.generation}
            self._links[key] = Links(functools.partial(data.group, purpose="stages"), layout.stage_group(rank), rank)
        return self._links[key]

    def status(self) -> dict[str, int] | None:
        """How the calls of this run or the last were computed under PipeFusion; None: exactly, without it."""
        if not self._config.pipefusion or not self._calls:
            return None
        return {"calls": self._calls, "stale_calls": sum(keys.stale_calls for keys in self._stale.values())}

    def lossy(self) -> list[str]:
        """For people: that this run was not exact, and how much of it; empty where it was."""
        found = self.status()
        if found is None:
            return []
        return [f"PipeFusion: {found['stale_calls']} of {found['calls']} calls attended to keys of the call before"]
