"""Weights that do not fit on a GPU, brought over before their layers ask for them.

The first pass through the network shows in which order its layers are used; from then on copies for the layers to come
run while others compute, around the end of a denoising step too. Where host memory suffices the weights are kept pinned,
so that the copy engine needs nobody's help; else they go through the pinned ring of `staging`.
"""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from comfy import accounting

from .pinned import pinned_copies
from .staging import can_stage, stager_for

AHEAD_BYTES = 768 << 20
IN_USE_BYTES = 768 << 20

Tensors = dict[str, torch.Tensor]
_Pending = tuple[Tensors, Callable[[], None], int, tuple[Any, Any]]
"""(copies, what makes the current stream wait for them, bytes, the originals)."""


def _weights_of(module: Any) -> tuple[Any, Any]:
    """The weight and the bias that a layer has now."""
    return getattr(module, "weight", None), getattr(module, "bias", None)


class WeightStream:
    """The layers of one network whose weights wait in host memory. `take` is called by `comfy.ops.cast_bias_weight`."""

    def __init__(self, device: torch.device, modules: Sequence[Any], before: WeightStream | None = None) -> None:
        self._device = device
        self.modules = tuple(modules)
        self._pinned: dict[torch.Tensor, torch.Tensor] = {}
        self._pin({} if before is None else before._pinned)
        self._next: dict[int, Any] = {}
        self._last: Any = None
        self._pending: dict[int, _Pending] = {}
        self._pending_bytes = 0
        self._in_use: collections.deque[tuple[Any, int]] = collections.deque()
        self._in_use_bytes = 0
        self.attach()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStream:
        other = WeightStream.__new__(WeightStream)
        memo[id(self)] = other
        other.__init__(self._device, [copy.deepcopy(module, memo) for module in self.modules])  # type: ignore[misc]
        return other

    def attach(self) -> None:
        """Let the layers find their stream."""
        for module in self.modules:
            module.streamed_weights = self

    def _pin(self, known: dict[torch.Tensor, torch.Tensor]) -> None:
        """Keep pinned copies of the layers' weights, and those that an earlier stream made: layers come and go from prompt
        to prompt when memory is short."""
        sources = [
            weight
            for module in self.modules
            for name, weight in module.named_parameters(recurse=False)
            if name in ("weight", "bias") and type(weight) is torch.nn.Parameter and weight.device.type == "cpu"
        ]
        self._pinned = dict(known)
        missing = [source for source in sources if source not in known]
        copies = pinned_copies(missing)
        if copies is not None:
            self._pinned.update(zip(missing, copies))

    def take(self, module: Any) -> Tensors:
        """The weights of a layer on the device, `weight` and, if it has one, `bias`, as they are stored.

        They belong to the caller; the current stream may use them at once.
        """
        if not self._is_coming(module):
            self._forget_pending()
            self._request(module)
        tensors, wait, size, _ = self._pending.pop(id(module))
        self._pending_bytes -= size
        wait()
        stream = torch.cuda.current_stream(self._device)
        for tensor in tensors.values():
            tensor.record_stream(stream)
        self._note_use(size, stream)
        if self._last is not None:
            self._next[id(self._last)] = module
        self._last = module
        self._request_ahead(module)
        return tensors

    def _is_coming(self, module: Any) -> bool:
        """Whether a layer's weights are on their way, and are still those that it has: hooks change them between calls."""
        pending = self._pending.get(id(module))
        return pending is not None and all(a is b for a, b in zip(pending[3], _weights_of(module), strict=True))

    def _note_use(self, size: int, stream: Any) -> None:
        """Let the host wait when too many bytes of layers that have not computed yet are on the device."""
        event = torch.cuda.Event()
        event.record(stream)  # everything before this layer
        self._in_use.append((event, size))
        self._in_use_bytes += size
        while self._in_use_bytes > IN_USE_BYTES and len(self._in_use) > 1:
            passed, freed = self._in_use.popleft()
            passed.synchronize()
            self._in_use_bytes -= freed

    def _request_ahead(self, module: Any) -> None:
        following = self._next.get(id(module))
        while following is not None and following is not module and self._pending_bytes < AHEAD_BYTES:
            if id(following) not in self._pending:
                self._request(following)
            following = self._next.get(id(following))

    def _request(self, module: Any) -> None:
        """Begin to bring a layer's weights over."""
        stager = stager_for(self._device)
        tensors: Tensors = {}
        pairs = []
        with torch.cuda.stream(stager.stream), torch.inference_mode(False):
            for name, source in module.named_parameters(recurse=False):
                if name not in ("weight", "bias") or type(source) is not torch.nn.Parameter:
                    continue
                target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
                tensors[name] = target
                pinned = self._pinned.get(source)
                if pinned is None and can_stage(source, target):
                    pairs.append((source, target))
                else:
                    target.copy_(source.detach() if pinned is None else pinned, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stager.stream)
        if pairs:
            wait = stager.start(pairs, targets_free=True).wait
        else:
            wait = functools.partial(torch.cuda.Stream.wait_event, torch.cuda.current_stream(self._device), arrived)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._pending[id(module)] = (tensors, wait, size, _weights_of(module))
        self._pending_bytes += size
        accounting.count("weight_bytes", size)

    def _forget_pending(self) -> None:
        """The layers ran in another order: copies made in vain are freed."""
        self._pending.clear()
        self._pending_bytes = 0
