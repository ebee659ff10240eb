"""Values that pass through a diffusion transformer: its state, the denoiser call it belongs to, and token plans.

All are immutable: a block returns another state, and what is sharded is read from the state, never from a mutable flag.
`comfy.ldm.dit` re-exports the names of this module.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from comfy.ldm.modules.attention import AttentionSpec

CALL_KEY = "taco_denoiser_call"
"""The entry of `transformer_options` under which a `DenoiserCall` passes through foreign code."""


class Meeting(Protocol):
    """One attention between the tokens of all ranks, in four steps between which a block can compute.

    `send` starts bringing queries, keys and values together, `attend` runs the kernel on them, `send_back` starts
    returning the outputs to the ranks of their tokens, `result` is this rank's part. Nothing that a block computes
    between two steps may depend on the attention's output.
    """

    def send(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """q [B, H, Lq, D], k and v [B, KV, Lk, D]: all heads of this rank's tokens."""

    def attend(self) -> None:
        """Run the kernel."""

    def send_back(self) -> None:
        """Return the outputs."""

    def result(self) -> torch.Tensor:
        """[B, H, Lq, D]: all heads of this rank's queries."""


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`compute(q, k, v, mask)`: attention over the tokens given, [B, h, Lq, D] and [B, kv, Lk, D] -> [B, h, Lq, D].

It is `attention.own_attention`, or a custom node's function, which sees all tokens of the heads it is given.
"""


class TokenPlan(Protocol):
    """How the token axis of one denoiser call is spread over ranks. Immutable."""

    size: int
    """Number of ranks."""

    index: int
    """This rank's place among them."""

    @property
    def inside(self) -> TokenPlan | None:
        """How the tokens between a block's cut linears are spread: attention runs on them. It is this plan itself unless
        linears are cut over ranks; None: they are not spread."""

    def during_blocks(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds the blocks of a call, on all ranks: inside, each attention meets those of the others in order."""

    def outputs(self, layers: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """What these functions return, each the output [.., width] of one linear of per-sample tensors."""

    def bounds(self, length: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank's tokens (by default this rank's) in a stream of `length` tokens."""

    def gather(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """The whole of a tensor whose axis `dim` joins this rank's parts of streams of `lengths` tokens, in order."""

    def gather_parts(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """All ranks' tensors joined along `dim`, where rank r has `counts[r]` entries."""

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """An attention of this rank's tokens with those of all ranks.

        `in_order`: `compute` needs all tokens in the order of whole streams (masks and foreign functions do); without
        it any order will do that is the same for keys and values.
        """


class BlockPipeline(Protocol):
    """How the blocks of a network are spread over stages, each of which has some of them."""

    def run(self, blocks: Sequence[Any], state: DiTState, call: DenoiserCall, run: Callable[..., DiTState]) -> DiTState:
        """The state after all blocks, on every stage; `run(state, call, blocks)` runs some of them on this one."""


class BlockCache(Protocol):
    """What may let blocks of a call be replaced by what they added in an earlier one."""

    def run(
        self, blocks: Sequence[Any], state: DiTState, span: Callable[[Sequence[Any], DiTState], DiTState]
    ) -> DiTState:
        """The blocks on a state; `span(blocks, state)` computes some of them."""


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """What one call of a network needs besides its inputs.

    plan: how tokens are spread, None when they are not. layout: where the network's weights live (the core's object,
    opaque here). options: ComfyUI's `transformer_options`. control: residuals of ControlNets by list name
    (`input`, `output`, ...), whole tokens [B, L, C] each. prepared: outputs of per-sample layers that were computed
    beforehand, by `id` of the module. around: functions `(block, state, run) -> state` that surround each of our own
    blocks on shards, outermost first: prefetching of weights. cache: what may stand in for some blocks.
    layer: name of the block that is running, None where foreign code called it. pipeline: runs the blocks where they are
    spread over stages; None where all are on this process.
    """

    plan: TokenPlan | None = None
    layout: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    prepared: Mapping[int, torch.Tensor] = field(default_factory=dict)
    around: tuple[Callable[..., Any], ...] = ()
    cache: BlockCache | None = None
    layer: str | None = None
    pipeline: BlockPipeline | None = None

    def __copy__(self) -> DenoiserCall:
        return self

    def __deepcopy__(self, memo: Any) -> DenoiserCall:
        # packs copy transformer_options deeply; process groups cannot be copied, and a call is a value anyway
        return self

    def within(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """A copy of `options` that carries this call to the networks that get them."""
        return {**(options or {}), CALL_KEY: self}


_fallback: contextvars.ContextVar[DenoiserCall | None] = contextvars.ContextVar("denoiser_call", default=None)
_SERIAL = DenoiserCall()


def call_of(options: Mapping[str, Any] | None, control: Mapping[str, Any] | None = None) -> DenoiserCall:
    """The denoiser call that `transformer_options` belong to, with these as its `options`, and ControlNet residuals.

    Foreign code that drops `transformer_options` between the engine and a network is the one case in which the call is
    taken from `fallback_call`.
    """
    options = {} if options is None else options
    call = options.get(CALL_KEY) or _fallback.get() or _SERIAL
    return dataclasses.replace(call, options=options, control=control or {})


@contextlib.contextmanager
def fallback_call(call: DenoiserCall) -> Iterator[None]:
    """Inside, networks and blocks that are called without their `transformer_options` belong to `call`."""
    token = _fallback.set(call)
    try:
        yield
    finally:
        _fallback.reset(token)


@dataclass(frozen=True)
class Tokens:
    """The tokens on one side of an attention: whole streams of `lengths`, in order; on each rank a part if `sharded`."""

    lengths: tuple[int, ...]
    sharded: bool = False


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """A tensor whose axis `dim` has one entry for each token of `streams`, joined in that order.

    lengths: tokens of each whole stream. whole: the whole tensor where `value` is a part of it and it is still there.
    inside: whether it goes with the tokens of attention (rotary tables), not with those between blocks: where linears are
    cut over ranks, these are more tokens with fewer heads.
    """

    value: torch.Tensor
    streams: tuple[str, ...]
    dim: int
    lengths: tuple[int, ...] | None = None
    whole: torch.Tensor | None = None
    inside: bool = False

    def of(self, lengths: Mapping[str, int], name: str) -> TokenAxis:
        """With its streams' lengths filled in. Raises ValueError when the axis does not fit them."""
        mine = tuple(lengths[stream] for stream in self.streams)
        if self.value.shape[self.dim] != sum(mine):
            raise ValueError(
                f"{name} has {self.value.shape[self.dim]} entries on axis {self.dim} where the streams "
                f"{', '.join(self.streams)} have {sum(mine)} tokens; declare the axis that runs over tokens"
            )
        return dataclasses.replace(self, lengths=mine)

    def shard(self, plan: TokenPlan) -> TokenAxis:
        """This rank's part."""
        assert self.lengths is not None
        spread = plan.inside if self.inside else plan
        if spread is None:
            return dataclasses.replace(self, whole=self.value)
        parts, offset = [], 0
        for length in self.lengths:
            start, stop = spread.bounds(length)
            parts.append(self.value.narrow(self.dim, offset + start, stop - start))
            offset += length
        value = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        return dataclasses.replace(self, value=value, whole=self.value)

    def gathered(self, plan: TokenPlan | None) -> torch.Tensor:
        """The whole tensor."""
        if plan is None:
            return self.value
        if self.whole is not None:
            return self.whole
        assert self.lengths is not None
        spread = plan.inside if self.inside else plan
        return self.value if spread is None else spread.gather(self.value, self.dim, self.lengths)


@dataclass(frozen=True, eq=False)
class DiTState:
    """The tensors that blocks of a diffusion transformer take and return.

    streams: tokens [B, L, C] in the order of joint attention. tokenwise: tensors with a declared token axis (rotary
    tables, per-token modulation, masks of keys), sharded with their streams. sample: tensors without one (modulation
    vectors [B, C], joint attention masks over whole streams), the same on every rank. skips: stack of tensors with a
    token axis that later blocks take back (U-shaped transformers). plan: the plan whose shards the tensors are, None
    when they are whole. lengths: tokens of each whole stream.
    """

    streams: Mapping[str, torch.Tensor]
    tokenwise: Mapping[str, TokenAxis] = field(default_factory=dict)
    sample: Mapping[str, Any] = field(default_factory=dict)
    skips: tuple[TokenAxis, ...] = ()
    plan: TokenPlan | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    joined: torch.Tensor | None = None
    """All streams in one tensor, of which they are views, after a block that works on it."""

    def __post_init__(self) -> None:
        if self.lengths:
            return
        for name, tokens in self.streams.items():
            if tokens.ndim != 3:
                raise ValueError(f"stream {name!r} must be [B, L, C], got {tuple(tokens.shape)}; batch comes first")
        lengths = {name: tokens.shape[1] for name, tokens in self.streams.items()}
        object.__setattr__(self, "lengths", lengths)
        axes = {name: axis.of(lengths, name) for name, axis in self.tokenwise.items()}
        object.__setattr__(self, "tokenwise", axes)

    def replace(self, **changes: Any) -> DiTState:
        """A state with other fields; new streams must be as long as the old ones (`with_whole` for others)."""
        if "streams" in changes and "joined" not in changes:
            changes["joined"] = None
        return dataclasses.replace(self, **changes)

    def with_stream(self, name: str, tokens: torch.Tensor) -> DiTState:
        """With another tensor for a stream, whole or a part as the state is."""
        return self.replace(streams={**self.streams, name: tokens})

    def with_whole(self, wholes: Mapping[str, torch.Tensor]) -> DiTState:
        """With whole tokens [B, L, C] for some streams; L may have changed. On shards this rank takes its part."""
        streams, lengths = dict(self.streams), dict(self.lengths)
        for name, tokens in wholes.items():
            lengths[name] = tokens.shape[1]
            if self.plan is not None:
                start, stop = self.plan.bounds(tokens.shape[1])
                tokens = tokens[:, start:stop]
            streams[name] = tokens
        return self.replace(streams=streams, lengths=lengths)

    def joint(self) -> torch.Tensor:
        """This rank's tokens of all streams in order, [B, sum of L, C]."""
        if self.joined is not None:
            return self.joined
        streams = tuple(self.streams.values())
        return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)

    def with_joint(self, tokens: torch.Tensor) -> DiTState:
        """With parts of `tokens` [B, sum of L, C] for all streams, as long as they are now."""
        parts = tokens.split([stream.shape[1] for stream in self.streams.values()], dim=1)
        return self.replace(streams=dict(zip(self.streams, parts)), joined=tokens)

    def shard(self, plan: TokenPlan | None) -> DiTState:
        """This rank's part of every tensor with a token axis; the state itself without a plan.

        Raises ValueError when the state is sharded already.
        """
        if plan is None:
            return self
        if self.plan is not None:
            raise ValueError("this state is sharded already; only a whole state can be sharded")
        streams = {}
        for name, tokens in self.streams.items():
            start, stop = plan.bounds(self.lengths[name])
            streams[name] = tokens[:, start:stop]
        tokenwise = {name: axis.shard(plan) for name, axis in self.tokenwise.items()}
        skips = tuple(axis.shard(plan) for axis in self.skips)
        return self.replace(streams=streams, tokenwise=tokenwise, skips=skips, plan=plan)

    def tokens(self, *names: str) -> Tokens:
        """The tokens of some streams (all without names) as one side of an attention."""
        return Tokens(tuple(self.lengths[name] for name in names or self.streams), self.plan is not None)

    def inside(self, *names: str) -> list[int]:
        """How many tokens of each of these streams (all without names) attention gets on this rank."""
        spread = None if self.plan is None else self.plan.inside
        lengths = [self.lengths[name] for name in names or self.streams]
        if spread is None:
            return lengths
        bounds = [spread.bounds(length) for length in lengths]
        return [stop - start for start, stop in bounds]

    def whole(self, *names: str) -> torch.Tensor:
        """All tokens of the streams named, joined in that order, [B, L, C], on every rank."""
        if set(names) == set(self.streams) and tuple(names) == tuple(self.streams):
            local = self.joint()
        else:
            local = torch.cat([self.streams[name] for name in names], dim=1) if names[1:] else self.streams[names[0]]
        if self.plan is None:
            return local
        return self.plan.gather(local, 1, [self.lengths[name] for name in names])

    def local(self, name: str) -> torch.Tensor:
        """This rank's part of a tensor with a token axis.

        Raises ValueError when its streams have grown or shrunk since it was made (a replaced block changed the number
        of tokens).
        """
        axis = self.tokenwise[name]
        now = tuple(self.lengths[stream] for stream in axis.streams)
        if axis.lengths != now:
            raise ValueError(
                f"{name} was made for {axis.lengths} tokens of {', '.join(axis.streams)}, which now have {now}; "
                "a replaced block that changes the number of tokens must also replace the blocks that follow"
            )
        return axis.value

    def value(self, name: str) -> Any:
        """A whole tensor by name, from `tokenwise` or `sample`; None when there is none of that name."""
        axis = self.tokenwise.get(name)
        return self.sample.get(name) if axis is None else axis.gathered(self.plan)

    def add(self, name: str, residual: torch.Tensor) -> DiTState:
        """Whole residual tokens [B, L', C] added to the first L' tokens of a stream."""
        tokens = self.streams[name]
        start = 0 if self.plan is None else self.plan.bounds(self.lengths[name])[0]
        part = residual[:, start : start + tokens.shape[1]]
        if part.shape[1] == 0:
            return self
        if part.shape[1] < tokens.shape[1]:
            head = tokens[:, : part.shape[1]] + part
            return self.with_stream(name, torch.cat([head, tokens[:, part.shape[1] :]], dim=1))
        return self.with_stream(name, tokens + part)

    def with_skip(self, name: str) -> DiTState:
        """With a stream's tokens as they are now on top of the skip stack."""
        length = self.lengths[name]
        return self.replace(skips=(*self.skips, TokenAxis(self.streams[name], (name,), 1, (length,))))

    def without_skip(self) -> tuple[torch.Tensor, DiTState]:
        """This rank's part of the tokens on top of the skip stack [B, L, C], and the state without them."""
        return self.skips[-1].value, self.replace(skips=self.skips[:-1])
