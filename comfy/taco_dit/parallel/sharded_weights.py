"""Sharded weights: each rank keeps 1/N of every block's linears and gathers a block before it runs (ZeRO-3, Rajbhandari
et al. 2020, for inference).

The weights of a block are laid end to end in one buffer of bytes, of which rank r keeps the r-th part. Two buffers take
turns: while one block computes from its buffer, the next block is gathered into the other, on a side stream on CUDA.
Between blocks a linear's `weight` is this rank's piece, flat; while the block runs it is a view of the buffer. A linear
that foreign code calls by itself gathers its block first. All ranks must run the same blocks in the same order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from comfy.ldm.dit_state import DiTState
from comfy.weights.held import Held
from comfy.weights.store import WeightStore

ALIGNMENT = 256  # bytes: of weights within a buffer, as kernels like them, and of the ranks' parts


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class _Entry:
    """One weight of a block: where it begins in the block's buffer, in bytes."""

    key: str
    module: nn.Module
    shape: torch.Size
    dtype: torch.dtype
    start: int
    forward: Callable[..., torch.Tensor] | None = None
    """The `forward` that somebody has given the linear, called instead of its class's."""

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def piece(self, first: int, last: int) -> tuple[int, int]:
        """[start, stop) of the flattened weight that lies in the bytes `first` to `last` of the buffer."""
        bounds = (min(max(at - self.start, 0), self.size) for at in (first, last))
        start, stop = (at // self.dtype.itemsize for at in bounds)
        return start, stop


class _Block:
    """The linears of one block, and how their weights lie in a buffer."""

    def __init__(self, path: str, root: nn.Module, store: WeightStore, ranks: int) -> None:
        self.root = root
        self.entries: list[_Entry] = []
        position = 0
        for name, module in root.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            key = f"{path}.{name}.weight"
            source = store.source(key)
            self.entries.append(_Entry(key, module, source.shape, source.dtype, position))
            position += _aligned(source.nbytes)
        self.share = _aligned(-(-position // ranks))


class ShardedWeights:
    """The sharded blocks of one network. See the module's docstring.

    blocks: by their path in the store's model. group: the group of ranks among which weights are dealt, which nothing else
    uses meanwhile; of the generation that is current when it is called.
    """

    def __init__(
        self, size: int, index: int, group: Callable[[], Any], blocks: Mapping[str, nn.Module], store: WeightStore
    ) -> None:
        self.size, self.index = size, index
        self._group, self._store = group, store
        self._blocks = [_Block(path, root, store, size) for path, root in blocks.items()]
        self._buffers: list[torch.Tensor] = []
        self._views: dict[int, list[nn.Parameter]] = {}
        self._there: list[int | None] = [None, None]  # which block each buffer has
        self._pending = False
        self._running: list[int] = []

    # --- weights ---------------------------------------------------------------------------------------------------

    @property
    def extra_bytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * self.size * max((block.share for block in self._blocks), default=0)

    def held(self) -> dict[str, Held]:
        """What this rank holds, by key of the model's weights; of all others the whole."""
        out = {}
        for block in self._blocks:
            first = self.index * block.share
            for entry in block.entries:
                out[entry.key] = Held((entry.piece(first, first + block.share),), axis=None)
        return out

    def changed(self) -> None:
        """Pieces have other values: what was gathered before is not used again."""
        self._there = [None, None]

    def release(self) -> None:
        """The network leaves the device: so do the buffers."""
        self.changed()
        self._buffers, self._views = [], {}

    def install(self) -> None:
        """Let blocks gather their weights; the store must hold these pieces from now on."""
        for i, block in enumerate(self._blocks):
            vars(block.root)["arranged_weights"] = _Surround(self, i)
            for entry in block.entries:
                entry.forward = vars(entry.module).get("forward")
                vars(entry.module)["forward"] = functools.partial(self._called_alone, i, entry)

    def uninstall(self) -> None:
        """Back to linears that have their weights."""
        self.release()
        for block in self._blocks:
            vars(block.root).pop("arranged_weights", None)
            for entry in block.entries:
                _set_forward(entry.module, entry.forward)

    def replaced(self, model: nn.Module) -> list[str]:
        """Names of sharded linears in whose place somebody has put another module."""
        names = {entry.key.removesuffix(".weight"): entry.module for block in self._blocks for entry in block.entries}
        return [name for name, module in names.items() if module_at(model, name) is not module]

    # --- gathering -------------------------------------------------------------------------------------------------

    def _buffer(self, i: int, device: torch.device) -> torch.Tensor:
        if not self._buffers or self._buffers[0].device != device:
            with torch.inference_mode(False):
                self._buffers = [torch.empty(self.extra_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
            self._views = {}
        return self._buffers[i % 2]

    def _device(self) -> torch.device:
        return self._store.weights[self._blocks[0].entries[0].key].current.device

    def _fill(self, i: int, buffer: torch.Tensor) -> None:
        """Bring all of block i into its buffer, on the current stream."""
        block = self._blocks[i]
        whole = buffer[: self.size * block.share]
        first = self.index * block.share
        mine = whole[first : first + block.share]
        for entry in block.entries:
            piece = self._store.weights[entry.key].current.detach().reshape(-1)
            if piece.numel():
                at = max(entry.start - first, 0)
                mine[at : at + piece.nbytes].copy_(piece.view(torch.uint8))
        self._group().gather_into(whole, mine)

    def _gather(self, i: int, ahead: bool) -> None:
        """Gather block i; `ahead`: behind what the current stream computes meanwhile."""
        device = self._device()
        buffer = self._buffer(i, device)
        if device.type != "cuda":
            self._fill(i, buffer)
        else:
            side = _side_stream(device)
            side.wait_stream(
                torch.cuda.current_stream(device)
            )  # the block before the one that runs now used this buffer
            with torch.cuda.stream(side):
                self._fill(i, buffer)
            self._pending = True
            if not ahead:
                self._join(device)
        self._there[i % 2] = i

    def _join(self, device: torch.device) -> None:
        if self._pending:
            torch.cuda.current_stream(device).wait_stream(_side_stream(device))
            self._pending = False

    def _whole(self, i: int) -> list[nn.Parameter]:
        """The weights of block i as views of its buffer."""
        if i not in self._views:
            buffer = self._buffers[i % 2]
            with torch.inference_mode(False):
                self._views[i] = [
                    nn.Parameter(
                        buffer[entry.start : entry.start + entry.size].view(entry.dtype).view(entry.shape),
                        requires_grad=False,
                    )
                    for entry in self._blocks[i].entries
                ]
        return self._views[i]

    # --- running ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, i: int) -> Iterator[None]:
        """Surrounds block i: its weights are whole inside, and the next block's are on their way."""
        if self._running and self._running[-1] == i:  # a block that calls itself through foreign code
            yield
            return
        if self._running:
            raise RuntimeError(
                f"block {i} was called from inside block {self._running[-1]}, whose weights would be lost; this cannot be "
                "combined with sharded weights: set memory.shard_weights: false"
            )
        if i == 0:
            self.changed()  # a new call: graphs replay the gathers that were made since the network's beginning
        if self._there[i % 2] != i:
            self._gather(i, ahead=False)
        self._join(self._device())
        block, views = self._blocks[i], self._whole(i)
        pieces = [entry.module._parameters["weight"] for entry in block.entries]
        forwards = [vars(entry.module)["forward"] for entry in block.entries]
        for entry, view in zip(block.entries, views):
            entry.module._parameters["weight"] = view
            _set_forward(entry.module, entry.forward)
        self._running.append(i)
        try:
            if i + 1 < len(self._blocks) and self._there[(i + 1) % 2] != i + 1:
                self._gather(i + 1, ahead=True)
            yield
        finally:
            self._running.pop()
            for entry, piece, forward in zip(block.entries, pieces, forwards):
                entry.module._parameters["weight"] = piece
                _set_forward(entry.module, forward)

    def _called_alone(self, i: int, entry: _Entry, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A linear's `forward` while its block does not run."""
        with self.running(i):
            return entry.module(*args, **kwargs)


@dataclass
class _Surround:
    """The `arranged_weights` of one block."""

    weights: ShardedWeights
    place: int

    def block(self, module: nn.Module, state: DiTState) -> contextlib.AbstractContextManager[None]:
        """What surrounds the block, on whichever tokens it runs."""
        return self.weights.running(self.place)


def module_at(model: nn.Module, name: str) -> Any:
    """What is at a dotted path now, None where nothing is."""
    owner: Any = model
    for step in name.split("."):
        owner = getattr(owner, step, None)
    return owner


def _set_forward(module: nn.Module, forward: Callable[..., torch.Tensor] | None) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
