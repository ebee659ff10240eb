"""Collectives on tensors in host memory, over streams between each two ranks.

Used where ranks compute on the CPU, and to send what a node of rank 0 returned. The streams come from the control plane,
so there is no port that another process could connect to. A stream is closed to leave a collective whose peer does not
come: that frees both sides at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .control_channel import Channel, ConnectionLost


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor, as a buffer."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


class _InThreads:
    """Communication in other threads. It keeps its tensors, whose memory the threads read and write."""

    def __init__(self, futures: list[Future[None]], tensors: tuple[torch.Tensor, ...]) -> None:
        self._futures, self._tensors = futures, tensors

    def wait(self) -> None:
        """Raises ConnectionLost when a peer ended or left."""
        for future in self._futures:
            future.result()


class SocketGroup:
    """One rank's part in a group. `open_pair(name)` gives a stream to the rank that asks for the same name.

    Collectives raise ConnectionLost when a peer ended or left.
    """

    def __init__(self, open_pair: Callable[[str], Channel], name: str, ranks: Sequence[int], rank: int) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(rank)
        self._lock = threading.Lock()
        self._closed = False
        self._channels: dict[int, Channel] = {}
        # A thread per peer sends, so that receiving in any order cannot block a circle of ranks.
        self._senders = ThreadPoolExecutor(max(1, self.size - 1), "taco-send")
        # One thread each way from the first `shift` on, so that several end in the order in which they began.
        self._to_next = ThreadPoolExecutor(1, "taco-to-next")
        self._from_previous = ThreadPoolExecutor(1, "taco-from-previous")
        for peer in range(self.size):
            if peer != self.index:
                low, high = sorted((peer, self.index))
                self._channels[peer] = open_pair(f"{name}{low}-{high}")

    def _exchange(self, sent: dict[int, Any], received: dict[int, Any]) -> None:
        """Send a buffer to each rank of `sent` and fill the buffers of `received`; empty ones are left out."""
        if self._closed:
            raise ConnectionLost("connection closed: this group was left")
        futures: list[Future[None]] = []
        for peer, view in sent.items():
            if len(view):
                futures.append(self._senders.submit(self._channels[peer].send_bytes, view))
        for peer, view in received.items():
            if len(view):
                self._channels[peer].receive_into(view)
        for future in futures:
            future.result()

    def all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> None:
        """Part i of `send` (rows of the first axis) goes to rank i; parts may be of any size, also 0."""
        source, target = send.contiguous(), out if out.is_contiguous() else torch.empty_like(out).contiguous()
        parts, places = source.split(list(send_splits)), target.split(list(out_splits))
        places[self.index].copy_(parts[self.index])
        peers = self._channels
        self._exchange({p: _bytes_of(parts[p]) for p in peers}, {p: _bytes_of(places[p]) for p in peers})
        if target is not out:
            out.copy_(target)

    def all_gather(self, local: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Concatenate every rank's `local` along the first axis; rank i contributes `rows[i]` rows."""
        source = local.contiguous()
        out = source.new_empty((sum(rows), *source.shape[1:]))
        places = out.split(list(rows))
        places[self.index].copy_(source)
        mine = _bytes_of(source)
        self._exchange(dict.fromkeys(self._channels, mine), {p: _bytes_of(places[p]) for p in self._channels})
        return out

    def gather_into(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill the contiguous `out` with every rank's `local` of equal size; `local` may be this rank's place in it."""
        places = out.view(-1).split(local.numel())
        mine = places[self.index]
        if mine.data_ptr() != local.data_ptr():
            mine.copy_(local.reshape(-1))
        sent = _bytes_of(mine)
        self._exchange(dict.fromkeys(self._channels, sent), {p: _bytes_of(places[p]) for p in self._channels})

    def reduce_scatter(self, parts: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """This rank's rows of the sum of every rank's `parts`, added in the order of ranks."""
        source = parts.contiguous()
        mine = rows[self.index]
        received = source.new_empty((self.size, mine, *source.shape[1:]))
        self.all_to_all(received.view(self.size * mine, *source.shape[1:]), source, [mine] * self.size, rows)
        return received.sum(0, dtype=source.dtype)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `tensor`, added in the order of ranks."""
        return self.all_gather(tensor.unsqueeze(0), [1] * self.size).sum(0, dtype=tensor.dtype)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` with that of the rank at position `source`."""
        whole = tensor.contiguous()
        if self.index == source:
            self._exchange(dict.fromkeys(self._channels, _bytes_of(whole)), {})
            return
        self._exchange({}, {source: _bytes_of(whole)})
        if whole is not tensor:
            tensor.copy_(whole)

    def shift(self, out: torch.Tensor, send: torch.Tensor) -> _InThreads:
        """Begin to send `send` to the next rank and to fill `out` from the previous one; both flat and contiguous."""
        if self._closed:
            raise ConnectionLost("connection closed: this group was left")
        futures: list[Future[None]] = []
        if send.numel():
            channel = self._channels[(self.index + 1) % self.size]
            futures.append(self._to_next.submit(channel.send_bytes, _bytes_of(send)))
        if out.numel():
            channel = self._channels[(self.index - 1) % self.size]
            futures.append(self._from_previous.submit(channel.receive_into, _bytes_of(out)))
        return _InThreads(futures, (out, send))

    def start_all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> _InThreads:
        """`all_to_all`, which is over on return: what computes on the CPU would wait for the same cores."""
        self.all_to_all(out, send, out_splits, send_splits)
        return _InThreads([], (out, send))

    def abort(self) -> None:
        """Leave collectives in progress, from any thread; the group is unusable afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for channel in self._channels.values():
            channel.close()
        for threads in (self._senders, self._to_next, self._from_previous):
            threads.shutdown(wait=False)
