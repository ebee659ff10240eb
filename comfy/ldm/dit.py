"""The contract of every diffusion transformer: `embed -> blocks -> head` over one immutable state.

    call = dit.call_of(transformer_options)
    state = network.embed(...)                      # whole inputs -> DiTState
    state = dit.run_blocks(network, state, call)    # network.block_list(): tuple[Block, ...]
    return network.head(state)

A network is written for whole pictures and knows nothing of ranks. It states which tensors have a token axis and
combines tokens only in `comfy.ldm.modules.attention`. What surrounds its blocks is here, once for all families: patches
and replacements by custom nodes, ControlNet residuals, modulations computed beforehand, step caches.

The rule for foreign code: whatever is not ours (a replaced block, a patch, a replaced forward) sees whole streams and
`transformer_options`. Between our own blocks the streams are shards. A block's `forward` is the entrance for foreign
code and takes whole streams; `forward_state` is ours and takes a state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .dit_state import (
    CALL_KEY,
    Compute,
    DenoiserCall,
    DiTState,
    Meeting,
    TokenAxis,
    TokenPlan,
    Tokens,
    call_of,
    fallback_call,
)
from .pace import Pace, is_long
from .stages import compiled_stages, stage

SKIP = "skip"
"""Name of the token-wise value that a block takes from the skip stack."""

__all__ = [
    "CALL_KEY", "SKIP", "Block", "BlockArguments", "Compute", "DenoiserCall", "DiTState", "Meeting", "PreparedLayer",
    "Residual", "TokenAxis", "TokenPlan", "Tokens", "call_of", "compiled_stages", "fallback_call", "foreign_blocks",
    "own_block", "patched_inputs", "run_blocks", "stage",
]  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """Which ControlNet residual is added after a block: `call.control[source][index]`, to the stream `stream`."""

    stream: str
    source: str
    index: int


@dataclass(frozen=True)
class BlockArguments:
    """How a block and its patches are called by foreign code, in ComfyUI's argument names.

    tokens: for each token argument the streams it joins, in the order in which the module returns them.
    values: for each other argument the name of a tensor of the state (see `DiTState.value`).
    optional: arguments that the module is given only if they are not None; older replacements lack them.
    first: the argument that the module takes by position. renamed: the module's own names of arguments that have others
    for replacements. hidden: further arguments that only the module gets, as `values`; replacements do not know them.
    patch_values: what patches after a block are given besides tokens, as `values`.
    """

    tokens: Mapping[str, tuple[str, ...]]
    values: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    first: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)
    patch_values: Mapping[str, str] = field(default_factory=dict)

    def collect(self, state: DiTState, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a replacement patch is given: whole tensors and `transformer_options`."""
        out = {name: state.whole(*streams) for name, streams in self.tokens.items()}
        out.update({name: state.value(value) for name, value in self.values.items()})
        return {**out, "transformer_options": options}

    def call(self, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Call a block on whole tokens; `arguments` as from `collect`, possibly changed by a patch, and hidden ones."""
        known = {
            name: arguments[name]
            for name in (*self.tokens, *self.values, *self.hidden)
            if name in arguments and not (name in self.optional and arguments[name] is None)
        }
        if arguments.get("transformer_options"):
            known["transformer_options"] = arguments["transformer_options"]
        positional = () if self.first is None else (known.pop(self.first),)
        out = module(*positional, **{self.renamed.get(name, name): value for name, value in known.items()})
        return dict(zip(self.tokens, out if isinstance(out, (tuple, list)) else (out,)))

    def put(self, state: DiTState, results: Mapping[str, torch.Tensor]) -> DiTState:
        """The state with what foreign code returned.

        Where an argument joins several streams, all but the last keep their lengths. None: the tokens stay as they are
        (a last block that has no use for them).
        """
        wholes: dict[str, torch.Tensor] = {}
        for name, streams in self.tokens.items():
            tokens = results[name]
            if tokens is None:
                continue
            kept = [state.lengths[stream] for stream in streams[:-1]]
            wholes.update(zip(streams, tokens.split([*kept, tokens.shape[1] - sum(kept)], dim=1)))
        return state.with_whole(wholes)


@dataclass(frozen=True)
class Block:
    """One block of a network as its strategies see it.

    name: its path in the network. module: what is called. arguments: how foreign code calls it.
    cost: time relative to other blocks of the network, for distributing blocks over pipeline stages.
    replace_key: key of a replacement in `patches_replace["dit"]`. patches_after: kinds of patches (`patches[kind]`) that
    see the tokens after it. index: its place among the blocks of its kind, which patches are given.
    residual: the ControlNet residual that is added after it. cacheable: whether a step cache may skip it.
    takes_skip: it takes the tokens on top of the skip stack, its token-wise value `SKIP`; the ControlNet residual named
    here is added to them. leaves_skip: the stream that is put on top of the skip stack after it.
    """

    name: str
    module: nn.Module
    arguments: BlockArguments
    index: int
    cost: float = 1.0
    replace_key: tuple[str, int] | None = None
    patches_after: tuple[str, ...] = ()
    residual: Residual | None = None
    cacheable: bool = True
    takes_skip: Residual | None = None
    leaves_skip: str | None = None

    @property
    def own(self) -> bool:
        """Whether the module runs our own forward, which treats tokens one by one except in attention."""
        kind = type(self.module)
        return (
            getattr(kind, "_own_forward", None) is kind.forward
            and "forward" not in vars(self.module)
            and not self.module._forward_hooks
            and not self.module._forward_pre_hooks
        )


def own_block(kind: type[nn.Module]) -> type[nn.Module]:
    """Decorate a block class of ours, which has `forward_state(state, call) -> state` besides `forward`.

    It marks the class's own `forward`: a subclass, an instance or a class with another one is foreign. While a block's
    weights are not simply in its layers (cut or sharded over ranks), its `arranged_weights` surround `forward_state`,
    whoever called it.
    """
    own: Callable[..., DiTState] = kind.forward_state  # type: ignore[attr-defined]

    @functools.wraps(own)
    def forward_state(self: nn.Module, state: DiTState, call: DenoiserCall, *args: Any, **kwargs: Any) -> DiTState:
        weights = vars(self).get("arranged_weights")
        if weights is None:
            return own(self, state, call, *args, **kwargs)
        with weights.block(self, state):
            return own(self, state, call, *args, **kwargs)

    kind._own_forward, kind.forward_state = kind.forward, forward_state  # type: ignore[attr-defined]
    return kind


def foreign_blocks(network: nn.Module) -> list[str]:
    """Names of a network's blocks that are not ours (replaced, subclassed, hooked)."""
    block_list = getattr(network, "block_list", None)
    return [] if block_list is None else [block.name for block in block_list() if not block.own]


class PreparedLayer(NamedTuple):
    """A small layer whose output [B, 1, width] depends on per-sample tensors only."""

    module: nn.Module
    width: int
    compute: Callable[[], torch.Tensor]


def _prepared(layers: Sequence[PreparedLayer], plan: TokenPlan) -> dict[int, torch.Tensor]:
    """Outputs of per-sample layers, by `id` of the module; each is computed on one rank only and gathered.

    Reading their weights is what they cost: n ranks read a share of them each instead of all of them n times.
    """
    if not layers:
        return {}
    spread = plan.inside  # where linears are cut, ranks with parts of one layer compute it together
    start, stop = (0, len(layers)) if spread is None else spread.bounds(len(layers))
    mine = [out.flatten(1) for out in plan.outputs([layer.compute for layer in layers[start:stop] or layers[:1]])]
    flat = torch.cat(mine, dim=1) if stop > start else mine[0][:, :0]
    if spread is not None:
        shares = [spread.bounds(len(layers), rank) for rank in range(spread.size)]
        flat = spread.gather_parts(flat, 1, [sum(layer.width for layer in layers[a:b]) for a, b in shares])
    parts = flat.split([layer.width for layer in layers], dim=1)
    return {id(layer.module): part.unsqueeze(1) for layer, part in zip(layers, parts)}


def patched_inputs(options: Mapping[str, Any], values: dict[str, Any], kind: str = "post_input") -> dict[str, Any]:
    """Inputs of the blocks (whole tokens and their ids, by ComfyUI's names) after the patches of custom nodes."""
    for patch in options.get("patches", {}).get(kind, ()):
        changed = patch({**values, "transformer_options": options})
        values = {name: changed[name] for name in values}
    return values


def run_blocks(
    network: Any, state: DiTState, call: DenoiserCall, blocks: Sequence[Block] | None = None,
    after: Callable[[Block, DiTState], None] | None = None,
) -> DiTState:  # fmt: skip
    """A network's blocks (or a slice of them: a pipeline stage) with all that surrounds them.

    state: whole, from `network.embed`, or sharded by the call's plan, from earlier blocks. Returns a state that is
    sharded where `call.plan` says so. `after` sees the state after each block: control networks take their residuals
    from it; they are whole on every rank and compute all blocks, whatever the layout of the network that they control.
    Between blocks a prompt that was cancelled ends (see `pace`).
    """
    if after is not None:
        plan = None if call.plan is None else call.plan.inside
        call = dataclasses.replace(call, plan=plan, pipeline=None, cache=None)
    if call.pipeline is not None and blocks is None:
        return call.pipeline.run(network.block_list(), state, call, functools.partial(run_blocks, network))
    prepare = blocks is None and vars(network).get("layers_prepared", True)
    state = state if state.plan is call.plan else state.shard(call.plan)
    tokens = list(state.streams.values())
    pace = Pace(is_long(len(tokens[0]), sum(part.shape[1] for part in tokens), sum(state.lengths.values())))
    span = functools.partial(_run_span, network, call, pace, prepare, after=after)
    blocks = network.block_list() if blocks is None else blocks
    with contextlib.nullcontext() if call.plan is None else call.plan.during_blocks():
        if call.cache is None or not _ours(blocks, call.options):
            return span(blocks, state)
        return call.cache.run(blocks, state, span)


def _ours(blocks: Sequence[Block], options: Mapping[str, Any]) -> bool:
    """Whether nothing of custom nodes is in or between blocks, which may rely on all of them being computed."""
    foreign = ("patches", "patches_replace", "optimized_attention_override")
    return all(block.own for block in blocks) and not any(options.get(name) for name in foreign)


def _run_span(
    network: Any,
    call: DenoiserCall,
    pace: Pace,
    prepare: bool,
    blocks: Sequence[Block],
    state: DiTState,
    after: Callable[[Block, DiTState], None] | None,
) -> DiTState:
    """Some blocks, one after the other, with the modulations that they need computed beforehand where `prepare` says so."""
    plan, options = call.plan, call.options
    if prepare and plan is not None and hasattr(network, "prepared_layers"):
        layers = network.prepared_layers(state)
        if call.cache is not None:
            modules = {id(module) for block in blocks for module in block.module.modules()}
            layers = [layer for layer in layers if id(layer.module) in modules]
        call = dataclasses.replace(call, prepared=_prepared(layers, plan))
    replacements = options.get("patches_replace", {}).get("dit", {})
    for block in blocks:
        replacement = replacements.get(block.replace_key)
        if block.takes_skip is not None:
            state = _with_taken_skip(state, _residual(call.control, block.takes_skip))
        if replacement is None and block.own:
            state = _run_own(block, state, call)
        else:
            state = _run_foreign(block, state, options, replacement)
        for kind in block.patches_after:
            for patch in options.get("patches", {}).get(kind, ()):
                state = _run_patch(patch, block, state, options)
        if block.residual is not None:
            residual = _residual(call.control, block.residual)
            state = state if residual is None else state.add(block.residual.stream, residual)
        if block.leaves_skip is not None:
            state = state.with_skip(block.leaves_skip)
        if after is not None:
            after(block, state)
        pace.step(next(iter(state.streams.values())))
    return state


def _run_own(block: Block, state: DiTState, call: DenoiserCall) -> DiTState:
    module: Any = block.module
    run = functools.partial(module.forward_state, call=dataclasses.replace(call, layer=block.name))
    for surround in reversed(call.around):
        run = functools.partial(_surrounded, surround, block, run)
    return run(state)


def _surrounded(surround: Callable[..., Any], block: Block, run: Callable[..., Any], state: DiTState) -> DiTState:
    return surround(block, state, run)


def _run_foreign(block: Block, state: DiTState, options: Mapping[str, Any], replacement: Any) -> DiTState:
    """A replaced block, or a replacement patch that may call the original, on whole tokens."""
    arguments = block.arguments

    unknown = {name: state.value(value) for name, value in arguments.hidden.items()}

    def original(args: Mapping[str, Any]) -> dict[str, Any]:
        return arguments.call(block.module, {**unknown, **args})

    given = arguments.collect(state, options)
    out = original(given) if replacement is None else replacement(given, {"original_block": original})
    return arguments.put(state, out)


def _run_patch(patch: Any, block: Block, state: DiTState, options: Mapping[str, Any]) -> DiTState:
    """A patch after a block: whole tokens of each of its token arguments in, the same out.

    One of ours that treats tokens one by one has `forward_state(state, block index) -> state`, as blocks have.
    """
    if hasattr(patch, "forward_state"):
        return patch.forward_state(state, block.index)
    tokens = block.arguments.tokens
    given: dict[str, Any] = {name: state.whole(*streams) for name, streams in tokens.items()}
    given.update({name: state.value(value) for name, value in block.arguments.patch_values.items()})
    out = patch({**given, "block_index": block.index, "transformer_options": options})
    return block.arguments.put(state, out)


def _residual(control: Mapping[str, Any], at: Residual) -> torch.Tensor | None:
    residuals = control.get(at.source) or ()
    return residuals[at.index] if -len(residuals) <= at.index < len(residuals) else None


def _with_taken_skip(state: DiTState, residual: torch.Tensor | None) -> DiTState:
    """The top of the skip stack as the token-wise value `SKIP`, with a whole residual [B, L, C] added."""
    taken = state.skips[-1]
    _, state = state.without_skip()
    if residual is not None:
        start = 0 if state.plan is None else state.plan.bounds(sum(taken.lengths or ()))[0]
        part = residual[:, start : start + taken.value.shape[1]]
        taken = dataclasses.replace(taken, value=taken.value + part, whole=None)
    return state.replace(tokenwise={**state.tokenwise, SKIP: taken})
