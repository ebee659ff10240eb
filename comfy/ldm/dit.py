"""The contract of every diffusion transformer: `embed -> blocks -> head` over one state object.

A network here is written for whole pictures and knows nothing of ranks. It states which tensors have a token axis
(`DiTState`) and lets tokens meet only in `comfy.ldm.modules.attention.attention`. A parallel strategy is a
`TokenPlan` made active around the call; this module says what a plan can do and is all that networks know of it.

The rule for foreign code: whatever is not ours (a replaced block, a patch, a whole replaced forward) always sees whole
streams. Between our own blocks the streams are sharded; `whole_tokens` and `sharded_tokens` mark the difference, and a
block of ours that is handed whole streams shards them itself (`shards_own_tokens`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class TokenPlan(Protocol):
    """How the token axis of one network call is spread. Tensors are whole or this rank's shard."""

    sharded: bool
    """Whether the tokens in flight are shards right now."""

    layout: tuple[int, ...]
    """Tokens per rank that take part in joint attention, while `sharded`."""

    stream_lengths: tuple[int, ...]
    """Tokens of each whole stream in joint attention, in order, while `sharded`."""

    size: int
    """Number of ranks."""

    def bounds(self, length: int) -> tuple[int, int]:
        """[start, stop) of this rank's tokens in a stream of `length` tokens."""

    def share_bounds(self, length: int, rank: int) -> tuple[int, int]:
        """`bounds` of any rank."""

    def gather_lengths(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Parts of all ranks, `lengths[rank]` entries of `dim` each, concatenated."""

    def lengths(self, length: int) -> tuple[int, ...]:
        """Tokens per rank of a stream of `length` tokens."""

    def gather(self, local: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """Shards of all ranks, concatenated along `dim` to `length` entries."""

    def gather_in_order(self, local: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens in joint attention, in stream order, from this rank's part along `dim`."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        function: Callable[..., torch.Tensor],
        *,
        layout: tuple[int, ...],
        in_order: bool,
        beside: Callable[[], Any] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Attention over the tokens of all ranks.

        q, k, v: [B, H, L_local, D], all heads of this rank's tokens; `layout`: tokens per rank.
        `function(q, k, v)` gets all tokens of some heads, [B, h, L, D], and returns [B, h, L, D]; in stream order if
        `in_order` (masks and foreign functions need it), else in any order that is the same for q, k and v. `beside`
        is work that needs no result of the attention and may run while tokens travel.
        Returns ([B, H, L_local, D], result of `beside`).
        """


_active: contextvars.ContextVar[TokenPlan | None] = contextvars.ContextVar("token_plan", default=None)


def active_plan() -> TokenPlan | None:
    """The plan of the network call in progress, or None when tokens are not spread."""
    return _active.get()


@contextlib.contextmanager
def use_plan(plan: TokenPlan | None) -> Iterator[None]:
    """Make `plan` active for the network calls inside."""
    token = _active.set(plan)
    try:
        yield
    finally:
        _active.reset(token)


_compiled: dict[Any, Callable[..., Any]] = {}
_uncompilable: set[Any] = set()
_compile_stages: contextvars.ContextVar[bool] = contextvars.ContextVar("compile_stages", default=False)


@contextlib.contextmanager
def compiled_stages(enabled: bool = True) -> Iterator[None]:
    """Inside, `stage` functions run compiled by torch.compile."""
    token = _compile_stages.set(enabled)
    try:
        yield
    finally:
        _compile_stages.reset(token)


def stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a part of a block in which no tokens meet: pure, without communication, worth compiling as one piece.

    Each stage is compiled once and serves all blocks of its kind, for one size and then, when another comes, for any.
    Where compiling fails (no C compiler, an unsupported GPU) the stage runs plainly from then on, said once.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not _compile_stages.get() or function in _uncompilable:
            return function(*args, **kwargs)
        if function not in _compiled:
            # Streams, batch sizes, patch kinds and models of several sizes all meet in one function.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            _compiled[function] = torch.compile(function)
        try:
            return _compiled[function](*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _uncompilable.add(function)
            logging.warning("torch.compile failed (%s); this part runs uncompiled", str(error).splitlines()[0])
            return function(*args, **kwargs)

    return wrapper


_prepared: contextvars.ContextVar[dict[int, torch.Tensor] | None] = contextvars.ContextVar("prepared", default=None)


def prepared(module: Any) -> torch.Tensor | None:
    """The output of a per-sample layer if it was computed beforehand, together with those of other blocks."""
    ready = _prepared.get()
    return None if ready is None else ready.get(id(module))


@contextlib.contextmanager
def with_prepared(results: dict[int, torch.Tensor] | None) -> Iterator[None]:
    """Make results known to `prepared`, by the id of their module."""
    token = _prepared.set(results)
    try:
        yield
    finally:
        _prepared.reset(token)


def prepare_together(
    modules: Sequence[Any], widths: Sequence[int], compute: Callable[[Any], torch.Tensor]
) -> dict[int, torch.Tensor] | None:
    """Outputs [B, 1, width] of small per-sample layers, each computed on one rank only and gathered; None without a plan.

    All blocks' modulations depend on nothing but the conditioning vector, and reading their weights is what they cost:
    n ranks read a share of them each instead of all of them n times.
    """
    plan = _active.get()
    if plan is None or not modules:
        return None
    start, stop = plan.bounds(len(modules))
    mine = [compute(module).flatten(1) for module in modules[start:stop]]
    flat = torch.cat(mine, dim=1) if mine else compute(modules[0]).flatten(1)[:, :0]
    ends = [plan.share_bounds(len(modules), rank) for rank in range(plan.size)]
    lengths = [sum(widths[a:b]) for a, b in ends]
    whole = plan.gather_lengths(flat, 1, lengths)
    parts = whole.split(list(widths), dim=1)
    return {id(module): part.unsqueeze(1) for module, part in zip(modules, parts)}


@contextlib.contextmanager
def _marked(sharded: bool, layout: tuple[int, ...]) -> Iterator[None]:
    plan = _active.get()
    if plan is None:
        yield
        return
    before = plan.sharded, plan.layout
    plan.sharded, plan.layout = sharded, layout
    try:
        yield
    finally:
        plan.sharded, plan.layout = before


def whole_tokens() -> contextlib.AbstractContextManager[None]:
    """Inside, streams are whole: foreign code runs here."""
    return _marked(False, ())


def sharded_tokens(layout: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    """Inside, streams are shards with `layout` tokens per rank in joint attention."""
    return _marked(True, layout)


@dataclass
class DiTState:
    """What travels through the blocks of a diffusion transformer.

    `streams[name]`: tokens [B, L, C] in the order in which joint attention concatenates them.
    `rotary[name]`: rotary table of the stream, [B or 1, 1, L, D/2, 2, 2].
    `sample`: tensors without a token axis (modulation vectors), replicated.
    `mask`: attention mask over all tokens in stream order, or None.
    `lengths`: tokens of each whole stream; `starts`: this rank's first token in it.
    """

    streams: dict[str, torch.Tensor]
    rotary: dict[str, torch.Tensor] = field(default_factory=dict)
    sample: dict[str, torch.Tensor] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    plan: TokenPlan | None = None
    _joint: tuple[torch.Tensor, ...] | None = None
    _pe: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, tokens in self.streams.items():
            if tokens.ndim != 3:
                raise ValueError(f"stream {name!r} must be [B, L, C], got {tuple(tokens.shape)}")
            self.lengths.setdefault(name, tokens.shape[1])
            self.starts.setdefault(name, 0)

    @property
    def pe(self) -> torch.Tensor:
        """Rotary table of all streams, concatenated in stream order."""
        if self._pe is None:
            tables = [self.rotary[name] for name in self.streams]
            self._pe = torch.cat(tables, dim=2) if len(tables) > 1 else tables[0]
        return self._pe

    def joint(self) -> torch.Tensor:
        """This rank's tokens of all streams in stream order, [B, sum of L, C]."""
        streams = tuple(self.streams.values())
        if self._joint is not None and all(a is b for a, b in zip(self._joint[1:], streams)):
            return self._joint[0]
        return torch.cat(streams, dim=1)

    def set_joint(self, tokens: torch.Tensor) -> None:
        """Replace all streams by parts of `tokens`, as long as they are now."""
        parts = tokens.split([stream.shape[1] for stream in self.streams.values()], dim=1)
        self.streams.update(zip(self.streams, parts))
        self._joint = (tokens, *parts)

    def shard(self, plan: TokenPlan | None) -> DiTState:
        """This rank's part of every tensor with a token axis; the state itself without a plan."""
        if plan is None:
            return self
        streams, rotary, starts = {}, {}, {}
        for name, tokens in self.streams.items():
            start, stop = plan.bounds(self.lengths[name])
            streams[name] = tokens[:, start:stop]
            starts[name] = start
            if name in self.rotary:
                rotary[name] = self.rotary[name][:, :, start:stop]
        return DiTState(
            streams, rotary, self.sample, self.mask, self.options, dict(self.lengths), starts, plan
        )  # fmt: skip

    def layout(self) -> tuple[int, ...]:
        """Tokens per rank over all streams; empty when the state is whole."""
        if self.plan is None:
            return ()
        return tuple(sum(parts) for parts in zip(*(self.plan.lengths(n) for n in self.lengths.values())))

    def whole(self, name: str) -> torch.Tensor:
        """All tokens of a stream, [B, L, C], on every rank."""
        if self.plan is None:
            return self.streams[name]
        return self.plan.gather(self.streams[name], 1, self.lengths[name])

    def put(self, name: str, tokens: torch.Tensor) -> None:
        """Replace a stream by whole tokens [B, L, C]; L may have changed."""
        self.lengths[name] = tokens.shape[1]
        if self.plan is not None:
            start, stop = self.plan.bounds(tokens.shape[1])
            self.starts[name] = start
            tokens = tokens[:, start:stop]
        self.streams[name] = tokens

    def add(self, name: str, residual: torch.Tensor) -> None:
        """Add whole residual tokens [B, L', C] to the first L' tokens of a stream."""
        tokens, start = self.streams[name], self.starts[name]
        part = residual[:, start : start + tokens.shape[1]]
        if part.shape[1] == 0:
            return
        if part.shape[1] == tokens.shape[1]:
            self.streams[name] = tokens + part
        else:
            self.streams[name] = torch.cat([tokens[:, : part.shape[1]] + part, tokens[:, part.shape[1] :]], dim=1)


def shards_own_tokens(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a block's forward: handed whole streams under a plan, it runs on shards and returns whole streams.

    `names` are its stream arguments [B, L, C], in the order of joint attention; its rotary argument must be `pe`. The
    block must return its streams, in the order of `names`.
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            plan = _active.get()
            if plan is None or plan.sharded:
                return forward(self, *args, **kwargs)
            return _run_on_shards(functools.partial(forward, self), forward, plan, names, args, kwargs)

        return wrapper

    return decorate


def _run_on_shards(
    call: Callable[..., Any],
    forward: Callable[..., Any],
    plan: TokenPlan,
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    order = forward.__code__.co_varnames[1 : 1 + len(args)]
    values = {**dict(zip(order, args)), **kwargs}
    pe, offset, local_pe, lengths = values.get("pe"), 0, [], {}
    for name in names:
        length = values[name].shape[1]
        lengths[name] = length
        start, stop = plan.bounds(length)
        values[name] = values[name][:, start:stop]
        if pe is not None:
            local_pe.append(pe[:, :, offset + start : offset + stop])
        offset += length
    if pe is not None:
        values["pe"] = torch.cat(local_pe, dim=2)
    layout = tuple(sum(parts) for parts in zip(*(plan.lengths(n) for n in lengths.values())))
    # Attention masks are permuted by stream, so the plan must know where streams begin.
    with sharded_tokens(layout), _streams(plan, tuple(lengths.values())):
        out = call(**values)
    if len(names) == 1:
        return plan.gather(out, 1, lengths[names[0]])
    return tuple(plan.gather(part, 1, lengths[name]) for part, name in zip(out, names))


@contextlib.contextmanager
def _streams(plan: Any, lengths: tuple[int, ...]) -> Iterator[None]:
    before = plan.stream_lengths
    plan.stream_lengths = lengths
    try:
        yield
    finally:
        plan.stream_lengths = before


@contextlib.contextmanager
def blocks_on(state: DiTState) -> Iterator[None]:
    """Mark the loop over a network's own blocks on `state`, sharded or whole."""
    if state.plan is None:
        yield
        return
    with sharded_tokens(state.layout()), _streams(state.plan, tuple(state.lengths.values())):
        yield
