"""Host memory to a GPU at the speed of the link, also from pages that are not pinned.

A copy from ordinary (pageable) memory, such as a memory-mapped file, goes through one small buffer of the driver and
reaches about a seventh of what the link can do (7.6 of 55 GB/s on an H100). Here a thread copies one large piece after the
other into a ring of pinned memory, with as many cores as the rank has, while the copy engine sends the pieces before it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

PIECE_BYTES = 32 << 20
PIECES = 8
MAX_THREADS = 16

Pair = tuple[torch.Tensor, torch.Tensor]
_Part = tuple[torch.Tensor, torch.Tensor]


def can_stage(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether a pair is an ordinary copy of bytes from host memory to a GPU."""
    return (
        source.device.type == "cpu"
        and target.device.type == "cuda"
        and source.dtype == target.dtype
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
        and not source.is_pinned()
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as uint8 [n]."""
    return tensor.detach().view(-1).view(torch.uint8) if tensor.ndim else tensor.detach().reshape(1).view(torch.uint8)


def _parts(pairs: Sequence[Pair], piece: int) -> Iterator[list[_Part]]:
    """Tasks of at most `piece` bytes: parts of large tensors, or several small tensors together."""
    together: list[_Part] = []
    room = piece
    for source, target in pairs:
        flat, place = _bytes_of(source), _bytes_of(target)
        if flat.numel() > room and together:
            yield together
            together, room = [], piece
        while flat.numel() > piece:
            yield [(flat[:piece], place[:piece])]
            flat, place = flat[piece:], place[piece:]
        if flat.numel():
            together.append((flat, place))
            room -= flat.numel()
    if together:
        yield together


class Arrival:
    """Copies under way. `wait` makes the current stream wait for them (the host waits only until they are issued)."""

    def __init__(self, stream: Any, tasks: list[Future[None]]) -> None:
        self._stream = stream
        self._tasks = tasks
        self._done: Any = None

    def wait(self) -> None:
        """Let what the current stream does next see the copies. Raises what a copy raised."""
        if self._done is None:
            for task in self._tasks:
                task.result()
            self._tasks = []
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
        torch.cuda.current_stream(self._stream.device).wait_event(self._done)


def copy_threads() -> int:
    """Cores that one rank may use for copying."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // ranks))


class Stager:
    """The pinned ring, the copying thread and the copy stream of one GPU. Use `stager_for`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1, "weights", initializer=self._enter)
        self._free: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()
        ring = torch.empty(PIECES * PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        for piece in ring.split(PIECE_BYTES):
            self._free.put((piece, torch.cuda.Event()))

    def _enter(self) -> None:
        torch.cuda.set_device(self.device)
        torch.set_num_threads(copy_threads())  # of this thread: torch splits a large copy over them

    def start(self, pairs: Sequence[Pair], *, targets_free: bool = False) -> Arrival:
        """Begin to copy each host tensor to its target on the GPU; every pair must satisfy `can_stage`.

        `targets_free`: the targets were allocated on the stager's stream, so that nothing else can be using their
        memory. Otherwise the copies wait for the work that the current stream has been given so far.
        """
        if not targets_free:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            for _, target in pairs:
                target.record_stream(self.stream)
        return Arrival(self.stream, [self._worker.submit(self._send, list(_parts(pairs, PIECE_BYTES)))])

    def copy(self, pairs: Sequence[Pair]) -> None:
        """`start` and wait, as `Arrival.wait` does."""
        self.start(pairs).wait()

    def _send(self, tasks: list[list[_Part]]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for parts in tasks:
                piece, sent = self._free.get()
                try:
                    sent.synchronize()  # the copy engine is done with what the piece held before
                    position = 0
                    for source, target in parts:
                        part = piece[position : position + source.numel()]
                        part.copy_(source)
                        target.copy_(part, non_blocking=True)
                        position += source.numel()
                    sent.record(self.stream)
                finally:
                    self._free.put((piece, sent))


_stagers: dict[torch.device, Stager] = {}
_lock = threading.Lock()


def stager_for(device: torch.device) -> Stager:
    """The stager of a GPU, made on first use."""
    with _lock:
        if device not in _stagers:
            _stagers[device] = Stager(device)
        return _stagers[device]


def copy_all(pairs: Sequence[Pair]) -> None:
    """Copy every source to its target: through the ring where that is possible, else as torch does."""
    staged = [pair for pair in pairs if can_stage(*pair)]
    with torch.inference_mode():
        for source, target in pairs:
            if not can_stage(source, target):
                target.copy_(source)
    if staged:
        stager_for(staged[0][1].device).copy(staged)
