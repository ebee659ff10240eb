"""Tensor parallelism (Shoeybi et al. 2019) with activations sharded between blocks (Korthikanti et al. 2022).

A network's linears are cut as its record declares. Between blocks each rank of a tensor group has some tokens with all
channels; so norms, modulations and residuals are computed once, not on every rank. A column linear first gathers the
tokens of its group and gives all of them for some heads or hidden channels; attention runs on these heads; a row linear's
partial sums are added and dealt out by tokens again (reduce-scatter). Blocks are the same as on one rank: the linears do
this by themselves while one of our blocks runs on the shards of a `TensorPlan`. Called from anywhere else (a replaced
block of a custom node that calls `block.img_attn.qkv` on whole tokens) they take and return whole tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from comfy.families.base import Sizes, Split
from comfy.ldm.dit_state import Compute, DiTState, Meeting
from comfy.ldm.modules.attention import AttentionSpec, LocalMeeting
from comfy.taco_dit.core.plan import share
from comfy.weights.held import Held
from comfy.weights.store import WeightStore

from .exchange import CollectiveExchange, Range
from .sequence_parallel import UlyssesPlan
from .sharded_weights import module_at


class TensorPlan:
    """A `comfy.ldm.dit.TokenPlan` for ranks that share linears: the tokens of `inside` dealt once more among them.

    inside: how tokens are spread over copies of the network, None when they are not. among: the plan over the ranks of
    this copy. Ranks are counted copy by copy.
    """

    def __init__(self, inside: UlyssesPlan | None, among: UlyssesPlan) -> None:
        self.inside, self.among = inside, among
        copies, copy = (1, 0) if inside is None else (inside.size, inside.index)
        self.size, self.index = copies * among.size, copy * among.size + among.index

    def _of_copy(self, length: int, copy: int | None = None) -> Range:
        return (0, length) if self.inside is None else self.inside.bounds(length, copy)

    def _inside(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of this copy in streams of these lengths."""
        bounds = [self._of_copy(length) for length in lengths]
        return [stop - start for start, stop in bounds]

    def bounds(self, length: int, rank: int | None = None) -> Range:
        """[start, stop) of a rank's tokens in a stream, by default this rank's."""
        copy, tensor = divmod(self.index if rank is None else rank, self.among.size)
        first, last = self._of_copy(length, copy)
        start, stop = self.among.bounds(last - first, tensor)
        return first + start, first + stop

    def gather(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Whole streams, joined in order, from this rank's parts of them."""
        copy = self.among.gather(local, dim, self._inside(lengths))
        return copy if self.inside is None else self.inside.gather(copy, dim, lengths)

    def gather_parts(self, local: torch.Tensor, dim: int, counts: Sequence[int]) -> torch.Tensor:
        """Parts of all ranks, of the given lengths, concatenated."""
        size = self.among.size
        copies = [list(counts[i : i + size]) for i in range(0, len(counts), size)]
        whole = self.among.gather_parts(local, dim, copies[self.index // size])
        return whole if self.inside is None else self.inside.gather_parts(whole, dim, [sum(c) for c in copies])

    def enter(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """This copy's tokens [B, L', C] of streams of these lengths, from this rank's x [B, L, C]."""
        return self.among.gather(x, 1, self._inside(lengths))

    def leave(self, y: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """This rank's tokens [B, L, C] of the sum over the copy's ranks of y [B, L', C]."""
        return self.among.sum_parts(y, 1, self._inside(lengths))

    def during_blocks(self) -> contextlib.AbstractContextManager[None]:
        """See `comfy.ldm.dit.TokenPlan.during_blocks`."""
        return contextlib.nullcontext() if self.inside is None else self.inside.during_blocks()

    def outputs(self, layers: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """See `comfy.ldm.dit.TokenPlan.outputs`: each rank computes its part of each, which are gathered together."""
        found: list[tuple[LinearPart, torch.Tensor]] = []
        token = _deferred.set(found)
        try:
            outs = [layer() for layer in layers]
        finally:
            _deferred.reset(token)
        parts = [part for part, _ in found]
        mine = {id(local): i for i, (_, local) in enumerate(found)}
        if len(found) != len(mine) or any(id(local) not in {id(out) for out in outs} for _, local in found):
            return [layer() for layer in layers]  # one of them computes more than one linear
        if not found:
            return outs
        flat = torch.cat([local.flatten(1) for _, local in found], dim=1)
        rows = [local.numel() // local.shape[0] // max(1, local.shape[-1]) for _, local in found]
        widths = [[part.widths[rank] * n for part, n in zip(parts, rows)] for rank in range(self.among.size)]
        gathered = self.among.gather_parts(flat, 1, [sum(each) for each in widths])
        ranks = [rank.split(each, dim=1) for rank, each in zip(gathered.split([sum(w) for w in widths], 1), widths)]
        whole = [
            part.whole_of([rank[i].view(*local.shape[:-1], -1) for rank in ranks])
            for i, (part, local) in enumerate(found)
        ]
        return [whole[mine[id(out)]] if id(out) in mine else out for out in outs]

    def meet(self, spec: AttentionSpec, compute: Compute, in_order: bool) -> Meeting:
        """See `comfy.ldm.dit.TokenPlan.meet`; this rank's heads are among the copies' alone."""
        if spec.heads == 0:
            return LocalMeeting(spec, compute)
        spec = self._with_own_mask(spec)
        if self.inside is None:
            return LocalMeeting(spec, compute)
        return self.inside.meet(spec, compute, in_order)

    def _with_own_mask(self, spec: AttentionSpec) -> AttentionSpec:
        """Of a mask for each head the part for this rank's heads, which are dealt in groups that share a key head."""
        mask = spec.mask
        if mask is None or mask.ndim != 4 or mask.shape[1] in (1, spec.heads):
            return spec
        unit = spec.heads // spec.shared_heads
        start, stop = share(mask.shape[1] // unit, self.among.size, self.among.index)
        return AttentionSpec(
            spec.heads, spec.queries, spec.keys, mask[:, start * unit : stop * unit], spec.kv_heads, spec.layer,
            spec.causal,
        )  # fmt: skip


@dataclass
class _Inside:
    """A block of a cut network that is running on shards; the tokens gathered last serve all linears that take them."""

    weights: TensorWeights
    plan: TensorPlan
    lengths: Mapping[str, int]
    gathered: tuple[torch.Tensor, torch.Tensor] | None = field(default=None)

    def of(self, tokens: tuple[str, ...] | None) -> list[int]:
        return [self.lengths[name] for name in (self.lengths if tokens is None else tokens)]

    def enter(self, x: torch.Tensor, tokens: tuple[str, ...] | None) -> torch.Tensor:
        if self.gathered is None or self.gathered[0] is not x:
            self.gathered = x, self.plan.enter(x, self.of(tokens))
        return self.gathered[1]


# A linear gets nothing but a tensor: which block it is called from, on which shards, cannot be passed as an argument.
_inside: ContextVar[_Inside | None] = ContextVar("inside_a_cut_block", default=None)
_deferred: ContextVar[list[tuple[Any, torch.Tensor]] | None] = ContextVar("outputs_gathered_together", default=None)


class LinearPart:
    """The part of a linear (or of a token embedding's columns) that this rank has; the `cut` of the module.

    It is the module's `forward` while it is installed. See `comfy.ldm.modules.linear_cut.LinearCut`.
    """

    def __init__(
        self, name: str, module: nn.Module, shape: Sequence[int], split: Split, sizes: Sizes, weights: TensorWeights
    ) -> None:
        self.name, self.module, self.split, self._weights = name, module, split, weights
        self.axis = 1 if (split.kind == "row") != isinstance(module, nn.Embedding) else 0
        ranks = range(weights.size)
        if split.parts:
            fused = sum(sizes[part][0] for part in split.parts)
            if fused != shape[self.axis]:
                raise ValueError(
                    f"{name} has {shape[self.axis]} channels on axis {self.axis}, but its record declares the parts "
                    f"{', '.join(split.parts)} with {fused} together"
                )
            self._ranges = [split.ranges(sizes, rank, weights.size) for rank in ranks]
            self._starts = [sum(sizes[part][0] for part in split.parts[:i]) for i in range(len(split.parts))]
        else:
            self._ranges = [[share(shape[self.axis], weights.size, rank)] for rank in ranks]
            self._starts = [0]
        self._shape = shape
        self._forward: Callable[..., torch.Tensor] | None = None
        self.widths = [sum(stop - start for start, stop in ranges) for ranges in self._ranges]

    # --- weights ---------------------------------------------------------------------------------------------------

    def held(self, store: WeightStore) -> dict[str, Held]:
        """What this rank holds of the module's weights, by key: parts of those with the axis that is cut."""
        mine = tuple(self._ranges[self._weights.index])
        out = {}
        for name, _ in (*self.module.named_parameters(recurse=False), *self.module.named_buffers(recurse=False)):
            shape = store.source(f"{self.name}.{name}").shape
            by_output = self.split.kind != "row" and len(shape) > 0 and shape[0] == self._shape[self.axis]
            if name == "weight" or by_output:  # biases, and scales of rows in quantised formats
                out[f"{self.name}.{name}"] = Held(mine, self.axis if name == "weight" else 0)
        return out

    # --- computing -------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> _Inside | None:
        inside = _inside.get()
        return inside if inside is not None and inside.weights is self._weights else None

    @property
    def whole(self) -> bool:
        """See `LinearCut.whole`."""
        return self.split.kind != "gathered" and self._now is None and not self._weights.own_tokens

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """See `LinearCut.enter`. Raises ValueError for tokens that are not those of the streams declared."""
        split, now = self.split, self._now
        if now is not None or self._weights.own_tokens:
            if split.kind != "column" or split.tokens == () or now is None:
                return x
            count = sum(stop - start for start, stop in map(now.plan.bounds, now.of(split.tokens)))
            if x.ndim != 3 or x.shape[1] != count:
                raise ValueError(
                    f"{self.name} got {tuple(x.shape)} where this rank has {count} tokens of "
                    f"{', '.join(now.lengths if split.tokens is None else split.tokens)}; declare the streams in its Split"
                )
            return now.enter(x, split.tokens)
        if split.kind == "row":
            return torch.cat([x[..., start:stop] for start, stop in self._ranges[self._weights.index]], dim=-1)
        return x

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """See `LinearCut.leave`."""
        split, now = self.split, self._now
        exchange = self._weights.exchange
        if split.kind == "row":
            dealt = now is not None and split.tokens != ()
            assert now is not None or not dealt
            y = now.plan.leave(y, now.of(split.tokens)) if dealt and now is not None else exchange().sum(y)
            bias = getattr(self.module, "bias", None)
            return y if bias is None else y + bias.to(y)
        if split.kind == "column" and (now is not None or self._weights.own_tokens):
            return y
        deferred = _deferred.get()
        if deferred is not None and split.kind == "gathered":
            deferred.append((self, y))
            return y
        joined = exchange().gather(y, y.ndim - 1, self.widths)
        return self.whole_of(list(joined.split(self.widths, dim=-1)))

    def whole_of(self, ranks: Sequence[torch.Tensor]) -> torch.Tensor:
        """All outputs [.., out] from each rank's [.., out'], with fused parts in their places."""
        if len(self._starts) == 1:
            return torch.cat(list(ranks), dim=-1)
        pieces = [
            rank.split([stop - start for start, stop in ranges], dim=-1) for rank, ranges in zip(ranks, self._ranges)
        ]
        return torch.cat([rank[part] for part in range(len(self._starts)) for rank in pieces], dim=-1)

    def here(self, first: int) -> int:
        """See `LinearCut.here`. Raises ValueError when no part begins at `first`."""
        if self.whole:
            return first
        if first not in self._starts:
            raise ValueError(f"{self.name} has parts that begin at {self._starts}, not at {first}")
        mine = self._ranges[self._weights.index][: self._starts.index(first)]
        return sum(stop - start for start, stop in mine)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's `forward`."""
        own = functools.partial(type(self.module).forward, self.module) if self._forward is None else self._forward
        if isinstance(self.module, nn.Embedding):
            return self.leave(own(x, *args, **kwargs))
        x = self.enter(x)
        if self.split.kind != "row":
            return self.leave(own(x, *args, **kwargs))
        with _without_bias(self.module):
            y = own(x, *args, **kwargs)
        return self.leave(y)

    def install(self) -> None:
        """Be the module's `forward`, around one that somebody has given it."""
        own = vars(self.module)
        self._forward = own.get("forward")
        own["cut"] = own["forward"] = self

    def uninstall(self) -> None:
        """Leave the module as it was."""
        own = vars(self.module)
        own.pop("cut", None)
        if own.pop("forward", None) is not None and self._forward is not None:
            own["forward"] = self._forward


@contextlib.contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """Inside, a linear has no bias: it belongs to the sum over ranks."""
    bias = module._parameters.get("bias")
    if bias is None:
        yield
        return
    module._parameters["bias"] = None
    try:
        yield
    finally:
        module._parameters["bias"] = bias


@functools.cache
def _never_compiled() -> None:
    """Keep the exchanges of cut linears out of compiled stages. Not at import: torch's compiler takes 70 MB of memory."""
    LinearPart.__call__ = torch.compiler.disable(LinearPart.__call__)  # type: ignore[method-assign]


class TensorWeights:
    """A network (or several in one model) whose linears are cut over the ranks of a tensor group.

    exchange: makes the exchange of the group, of the generation that is current when it is called. own_tokens: whether
    every rank has all tokens throughout (text encoders), so that there are no shards between blocks.
    """

    def __init__(
        self, size: int, index: int, exchange: Callable[[], CollectiveExchange], own_tokens: bool = False
    ) -> None:
        self.size, self.index, self.exchange, self.own_tokens = size, index, exchange, own_tokens
        self.parts: dict[str, LinearPart] = {}
        self._held: list[tuple[WeightStore, LinearPart]] = []
        self._blocks: list[nn.Module] = []

    def cut(
        self,
        root: nn.Module,
        split_of: Callable[[str], Split | None],
        sizes: Sizes,
        blocks: Mapping[str, nn.Module],
        store: WeightStore,
        prefix: str = "",
    ) -> None:
        """Plan the cuts of the linears of a network `root`, whose weights begin with `prefix` in the store's model.

        split_of: by a linear's name in the network, None for linears that stay whole. blocks: those that run on shards.
        Raises ValueError for a linear whose sizes are not those declared.
        """
        for name, module in root.named_modules():
            split = split_of(name) if isinstance(module, (nn.Linear, nn.Embedding)) else None
            if split is not None and split.kind != "whole":
                shape = store.source(f"{prefix}{name}.weight").shape
                part = self.parts[prefix + name] = LinearPart(prefix + name, module, shape, split, sizes, self)
                self._held.append((store, part))
        self._blocks += blocks.values()

    def held(self) -> dict[str, Held]:
        """What this rank holds, by key of the model's weights; of all others the whole."""
        return {key: held for store, part in self._held for key, held in part.held(store).items()}

    def install(self) -> None:
        """Let the linears compute with their parts; the store must hold these parts from now on."""
        _never_compiled()
        for part in self.parts.values():
            part.install()
        for block in self._blocks:
            vars(block)["arranged_weights"] = self

    def uninstall(self) -> None:
        """Back to linears that are whole."""
        for part in self.parts.values():
            part.uninstall()
        for block in self._blocks:
            vars(block).pop("arranged_weights", None)

    def replaced(self, model: nn.Module) -> list[str]:
        """Names of cut linears in whose place somebody has put another module or another `forward`."""
        out = []
        for name, part in self.parts.items():
            found = module_at(model, name)
            if found is not part.module or vars(found).get("forward") is not part:
                out.append(name)
        return out

    @contextlib.contextmanager
    def block(self, module: nn.Module, state: DiTState) -> Iterator[None]:
        """Surrounds a block of ours: on the shards of a `TensorPlan` its linears have parts, else they are whole."""
        plan = state.plan
        token = _inside.set(_Inside(self, plan, state.lengths) if isinstance(plan, TensorPlan) else None)
        try:
            yield
        finally:
            _inside.reset(token)
