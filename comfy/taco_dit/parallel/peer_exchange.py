"""Exchange of heads and tokens by copy engines, beside what the multiprocessors compute.

A rank writes what it sends into a slot of each receiver's memory (`core.peer_memory`) on a stream of its own, while the
block goes on with what does not depend on it; the block's stream waits where it needs the result.

A slot is written again only when its reader is done. Exchanges take the slots in turn. A rank that has heard of exchange n
from all peers knows that they had begun n, so whatever they read before they began it has been read; with SLOTS slots at
most SLOTS - 1 results may be begun and not read. Across calls this holds because all ranks meet at the beginning of
each (`during_blocks`), captured or not; outside of a network's blocks collectives are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from comfy.taco_dit.core.peer_memory import SLOTS

from .exchange import Arriving, CollectiveExchange, Range, pack_heads, unpack_heads

_FENCE, _COPIES = 0, 1  # channels of the meetings
Piece = tuple[int, int, torch.Tensor]  # receiver's place, entry in its slot, flat data


class PeerExchange(CollectiveExchange):
    """As `CollectiveExchange`, through peers' memory where what is sent fits and the moment allows.

    memory: a `PeerMemory` of the group's ranks. Whether a transfer takes this way depends only on what all ranks know.
    """

    def __init__(self, group: Any, memory: Any, clock: Any = None) -> None:
        super().__init__(group, clock)
        self.memory = memory
        self._slot = self._unread = 0
        self._inside = False

    @contextlib.contextmanager
    def during_blocks(self) -> Iterator[None]:
        """Surrounds the blocks of a call; see `comfy.ldm.dit_state.TokenPlan.during_blocks`."""
        if self._inside:
            yield
            return
        self._slot = self._unread = 0
        self._inside = True
        self.memory.meet(_FENCE)
        try:
            yield
        finally:
            self._inside = False

    def _fits(self, entries: int, dtype: torch.dtype) -> bool:
        """Whether each rank's part of a transfer, at most `entries`, may go through peers' memory now."""
        return self._inside and self._unread < SLOTS - 1 and entries * dtype.itemsize <= self.memory.slot_bytes

    def _start(self, pieces: Sequence[Piece], entries: int, finish: Callable[[torch.Tensor], Any]) -> Arriving:
        """Begin to send `pieces`; `finish` makes the result of the `entries` that this rank receives."""
        slot, self._slot = self._slot, (self._slot + 1) % SLOTS
        self._unread += 1
        memory = self.memory
        memory.stream.wait_stream(torch.cuda.current_stream(memory.device))
        with torch.cuda.stream(memory.stream):
            for peer, offset, data in pieces:
                if data.numel():
                    memory.write(slot, peer, offset, data)
            memory.meet(_COPIES)
            done = torch.cuda.Event()
            done.record(memory.stream)
        received = memory.received(slot, entries, pieces[0][2].dtype)
        return _Transfer(self, done, pieces, lambda: finish(received))

    def read(self, done: Any) -> None:
        """Let the current stream wait for a transfer, whose result is read before the next is begun."""
        with self._timed():
            torch.cuda.current_stream(self.memory.device).wait_event(done)
        self._unread -= 1

    def start_heads(self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        """As `Exchange.start_heads`."""
        batch, _, local, size = parts[0].shape
        counts = [stop - start for start, stop in heads]
        unit = batch * len(parts) * size
        if not self._fits(sum(tokens) * max(counts) * unit, parts[0].dtype):
            return super().start_heads(parts, heads, tokens)
        self.check_tokens(local, tokens)
        sent = pack_heads(tuple(parts), tuple(heads)).split([local * count * unit for count in counts])
        before, mine = sum(tokens[: self.index]), counts[self.index]
        pieces = [(peer, before * count * unit, data) for peer, (count, data) in enumerate(zip(counts, sent))]

        def finish(received: torch.Tensor) -> list[torch.Tensor]:
            whole = received.view(sum(tokens), batch, len(parts), mine, size)
            return [whole[:, :, i].permute(1, 2, 0, 3) for i in range(len(parts))]

        return self._start(pieces, sum(tokens) * mine * unit, finish)

    def start_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> Arriving:
        """As `Exchange.start_tokens`."""
        batch, mine, _, size = out.shape
        counts = [stop - start for start, stop in heads]
        unit = batch * size
        if not self._fits(max(tokens) * sum(counts) * unit, out.dtype):
            return super().start_tokens(out, heads, tokens)
        sent = out.permute(2, 0, 1, 3).reshape(-1).split([there * mine * unit for there in tokens])
        first = list(accumulate(counts, initial=0))[self.index]
        pieces = [(peer, there * first * unit, data) for peer, (there, data) in enumerate(zip(tokens, sent))]
        local = tokens[self.index]
        return self._start(
            pieces, local * sum(counts) * unit, lambda received: unpack_heads(received, counts, local, batch, size)
        )

    def to_heads(
        self, parts: Sequence[torch.Tensor], heads: Sequence[Range], tokens: Sequence[int]
    ) -> list[torch.Tensor]:
        """As `Exchange.to_heads`."""
        brought: list[torch.Tensor] = self.start_heads(parts, heads, tokens).result()
        return brought

    def to_tokens(self, out: torch.Tensor, heads: Sequence[Range], tokens: Sequence[int]) -> torch.Tensor:
        """As `Exchange.to_tokens`."""
        returned: torch.Tensor = self.start_tokens(out, heads, tokens).result()
        return returned


class _Transfer:
    """An `Arriving` by copy engines. It keeps what is sent: its memory must not be reused before the streams meet."""

    def __init__(self, exchange: PeerExchange, done: Any, sent: Sequence[Piece], finish: Callable[[], Any]) -> None:
        self._exchange, self._done, self._sent, self._finish = exchange, done, sent, finish

    def result(self) -> Any:
        if self._sent:
            self._exchange.read(self._done)
            self._sent, self._found = (), self._finish()
        return self._found
