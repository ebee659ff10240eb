"""Work of many equal items, distributed over the ranks: tiles of a VAE, ControlNets, encodings of several prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from comfy.taco_dit import runtime

from .group_values import gather_values
from .plan import share

Item = TypeVar("Item")
Result = torch.Tensor | tuple[torch.Tensor, ...]


def spread(items: Sequence[Item], work: Callable[[Item], Result], manager: Any = None) -> list[Result]:
    """`[work(item) for item in items]`, each item computed on one rank only and the results available on all.

    All ranks must call with equal items at the same place. `work` returns a tensor or a tuple of tensors, of any shapes
    and dtypes, on this rank's device. `manager` is the distributed manager, by default that of the running process. On
    one rank, outside of prompts, and in a node that runs on rank 0 alone, this is a plain loop. Raises TypeError when
    `work` returns something else; when it raises on one rank, the others are released by the failing rank's
    `Lockstep.fail`.
    """
    current = runtime.current()
    if manager is None and not current.lockstep.together:
        return [work(item) for item in items]
    manager = current.manager if manager is None else manager
    size = manager.world_size
    if size == 1 or len(items) < 2:
        return [work(item) for item in items]
    start, stop = share(len(items), size, manager.rank)
    mine = [work(item) for item in items[start:stop]]
    tensors = [_tensors(result) for result in mine]
    group = manager.data.group(range(size))
    # A result is sent as bytes together with its shapes: items may differ.
    described = [
        [isinstance(result, tuple), [[str(t.dtype).removeprefix("torch."), *t.shape] for t in parts]]
        for result, parts in zip(mine, tensors)
    ]
    everyone = gather_values(group, described, manager.device)
    flat = [t.contiguous().view(-1).view(torch.uint8) for parts in tensors for t in parts if t.numel()]
    sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=manager.device)
    sizes = [sum(_bytes(t) for _, parts in rank for t in parts) for rank in everyone]
    received = group.all_gather(sent, sizes)
    return _unpacked(received, [result for rank in everyone for result in rank])


def spread_batch(batch: torch.Tensor, work: Callable[[torch.Tensor], Any]) -> Any:
    """`work(batch)` for work that treats each entry of the first axis by itself, distributed over the ranks.

    batch [B, ...], the same on every rank. `work` maps a part [b, ...] to a tensor [b, ...] or a tuple of them. On one
    rank, and for a single entry, it is called once with the whole batch.
    """
    current = runtime.current()
    size = current.manager.world_size if current.lockstep.together else 1
    if size == 1 or batch.shape[0] < 2:
        return work(batch)
    device = current.manager.device
    parts = batch.tensor_split(min(size, batch.shape[0]))

    def on_device(part: torch.Tensor) -> Result:
        out = work(part)
        return tuple(t.to(device) for t in out) if isinstance(out, tuple) else out.to(device)

    done: list[Any] = spread(parts, on_device)
    return tuple(map(torch.cat, zip(*done))) if isinstance(done[0], tuple) else torch.cat(done)


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    parts = result if isinstance(result, tuple) else (result,)
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise TypeError(f"spread work must return a tensor or a tuple of tensors, got {type(part).__name__}")
    return parts


def _bytes(described: list[Any]) -> int:
    """Bytes of a tensor described as [dtype, *shape]."""
    return torch.Size(described[1:]).numel() * getattr(torch, described[0]).itemsize


def _unpacked(received: torch.Tensor, results: list[Any]) -> list[Result]:
    out: list[Result] = []
    position = 0
    for is_tuple, parts in results:
        tensors = []
        for described in parts:
            size = _bytes(described)
            raw = received[position : position + size].clone()  # a copy is aligned for its dtype
            tensors.append(raw.view(getattr(torch, described[0])).view(described[1:]))
            position += size
        out.append(tuple(tensors) if is_tuple else tensors[0])
    return out
