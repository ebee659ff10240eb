"""Work of many equal items, distributed over the ranks: tiles of a VAE, ControlNets, encodings of several prompts.

And convolutional networks for fewer pictures than there are ranks, which get their rows dealt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

import comfy.model_management
from comfy.taco_dit import runtime

from .group_values import gather_values
from .plan import share

ROWS_FROM_PIXELS = 1 << 19
"""Size of pictures from which on their rows are dealt: in smaller ones exchanging takes about as long as computing."""

Item = TypeVar("Item")
Result = torch.Tensor | tuple[torch.Tensor, ...]


def spread(items: Sequence[Item], work: Callable[[Item], Result], manager: Any = None) -> list[Result]:
    """`[work(item) for item in items]`, each item computed on one rank only and the results available on all.

    All ranks must call with equal items at the same place. `work` returns a tensor or a tuple of tensors, of any shapes
    and dtypes, on this rank's device. `manager` is the distributed manager, by default that of the running process. On
    one rank, outside of prompts, and in a node that runs on rank 0 alone, this is a plain loop. Raises TypeError when
    `work` returns something else. When it runs out of memory on one rank, all ranks raise that error; when it raises
    another on one rank, the others are released by the failing rank's `Lockstep.fail`.
    """
    current = runtime.current()
    if manager is None and not current.lockstep.together:
        return [work(item) for item in items]
    manager = current.manager if manager is None else manager
    size = manager.world_size
    if size == 1 or len(items) < 2:
        return [work(item) for item in items]
    start, stop = share(len(items), size, manager.rank)
    group = manager.data.group(range(size))
    mine = _within_memory(work, items[start:stop])
    tensors = [_tensors(result) for result in mine or ()]
    # A result is sent as bytes together with its shapes: items may differ.
    described = [
        [isinstance(result, tuple), [[str(t.dtype).removeprefix("torch."), *t.shape] for t in parts]]
        for result, parts in zip(mine or (), tensors)
    ]
    everyone = gather_values(group, None if mine is None else described, manager.device)
    if None in everyone:
        raise comfy.model_management.OOM_EXCEPTION(f"rank {everyone.index(None)} ran out of memory")
    flat = [t.contiguous().view(-1).view(torch.uint8) for parts in tensors for t in parts if t.numel()]
    sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=manager.device)
    sizes = [sum(_bytes(t) for _, parts in rank for t in parts) for rank in everyone]
    received = group.all_gather(sent, sizes)
    return _unpacked(received, [result for rank in everyone for result in rank])


def _within_memory(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result] | None:
    """The results of this rank's items, or None when memory does not suffice."""
    try:
        return [work(item) for item in items]
    except comfy.model_management.OOM_EXCEPTION:
        return None


def spread_rounds(
    work: Callable[[torch.Tensor], torch.Tensor], items: Iterable[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """As `map(work, items)`, distributed over the ranks a few items at a time: never are all results on a GPU."""
    current = runtime.current()
    size = current.manager.world_size if current.lockstep.together else 1
    if size == 1:
        yield from map(work, items)
        return
    waiting = list(items)
    for start in range(0, len(waiting), 2 * size):
        results: list[Any] = spread(waiting[start : start + 2 * size], work)
        yield from results


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


def rows_over(pictures: int, pixels: int) -> int:
    """Over how many ranks `spread_pictures` deals the rows of each of so many pictures; 1: each is on one rank."""
    current = runtime.current()
    config = current.config.parallel
    if pixels < ROWS_FROM_PIXELS or not (current.lockstep.together and config.enabled and config.spatial_parallel):
        return 1
    size: int = current.manager.world_size
    return size if pictures < size else 1


def is_spread(batch: torch.Tensor, network: torch.nn.Module, pixels: int) -> bool:
    """Whether `spread_pictures` distributes this work. Then all ranks hear of one that is out of memory."""
    from comfy.taco_dit.parallel.spatial_parallel import takes_rows

    current = runtime.current()
    if not current.lockstep.together or current.manager.world_size == 1:
        return False
    return batch.shape[0] > 1 or (rows_over(batch.shape[0], pixels) > 1 and takes_rows(network))


def spread_pictures(
    batch: torch.Tensor,
    work: Callable[[torch.Tensor], torch.Tensor],
    network: torch.nn.Module,
    by_rows: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    pixels: int,
    unit: int = 1,
) -> torch.Tensor:
    """`work(batch)` for a convolutional network. As many pictures as can be dealt evenly are dealt whole, others by rows.

    batch [B, C, ..., H, W], the same on every rank. `work` maps a part [b, ...] to results [b, ...], as `by_rows` does
    with rows of one picture on `device`, on which `network` computes (`comfy.taco_dit.parallel.spatial_parallel`).
    `pixels`: of one picture where it is largest. `unit`: rows that stay on one rank, the factor by which the network makes
    pictures smaller. Raises the out-of-memory error on
    all ranks when one of them has it.
    """
    from comfy.taco_dit.parallel.spatial_parallel import run_by_rows, takes_rows

    current = runtime.current()
    size = current.manager.world_size
    by_itself = batch.shape[0] % size
    if not by_itself or rows_over(by_itself, pixels) == 1 or not takes_rows(network):
        return spread_batch(batch, work)
    group = current.manager.data.group(range(size), device.type)
    dealt = batch.shape[0] - by_itself
    done = [spread_batch(batch[:dealt], work)] if dealt else []
    for picture in batch[dealt:].split(1):
        out = run_by_rows(by_rows, picture, group, device, unit)
        done.append(out.to(done[0].device) if done else out)
    return torch.cat(done)


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
