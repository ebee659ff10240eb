"""Sequence parallelism by Ulysses (Jacobs et al. 2023): tokens are sharded between attentions, heads within them.

Exact for any number of tokens, heads and ranks: shards may differ by one token or one head, and a rank may hold none.
Nothing is padded, so no mask is needed to hide padding, and masks that exist keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from comfy.ldm import dit
from comfy.taco_dit.core.plan import share

from .exchange import Exchange


class UlyssesPlan:
    """A `comfy.ldm.dit.TokenPlan` over one token group."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.size = exchange.size
        self.sharded = False
        self.layout: tuple[int, ...] = ()
        self.stream_lengths: tuple[int, ...] = ()
        self._orders: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def bounds(self, length: int) -> tuple[int, int]:
        """[start, stop) of this rank's tokens in a stream."""
        return share(length, self.exchange.size, self.exchange.index)

    def share_bounds(self, length: int, rank: int) -> tuple[int, int]:
        """[start, stop) of any rank's share."""
        return share(length, self.exchange.size, rank)

    def gather_lengths(self, local: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Parts of all ranks, of the given lengths, concatenated."""
        return self.exchange.gather(local, dim, lengths)

    def lengths(self, length: int) -> tuple[int, ...]:
        """Tokens per rank of a stream."""
        parts = (share(length, self.exchange.size, rank) for rank in range(self.exchange.size))
        return tuple(stop - start for start, stop in parts)

    def gather(self, local: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """A whole stream from its shards."""
        return self.exchange.gather(local, dim, self.lengths(length))

    def gather_in_order(self, local: torch.Tensor, dim: int) -> torch.Tensor:
        """All tokens of joint attention in stream order."""
        ranked = self.exchange.gather(local, dim, self.layout)
        return ranked.index_select(dim, self._order(local.device)[0])

    def _order(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of stream-ordered tokens in rank order, and the inverse; [L] each.

        Joint attention concatenates the shards of all streams on each rank, then the ranks.
        """
        key = (self.stream_lengths, device)
        if key not in self._orders:
            places = torch.empty(sum(self.stream_lengths), dtype=torch.long)
            position = 0
            for rank in range(self.exchange.size):
                offset = 0
                for length in self.stream_lengths:
                    start, stop = share(length, self.exchange.size, rank)
                    places[offset + start : offset + stop] = torch.arange(position, position + stop - start)
                    position += stop - start
                    offset += length
            inverse = torch.empty_like(places)
            inverse[places] = torch.arange(len(places))
            self._orders[key] = places.to(device), inverse.to(device)
        return self._orders[key]

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
        """See `comfy.ldm.dit.TokenPlan.attend`."""
        heads = q.shape[1]
        q, k, v = self.exchange.to_heads((q, k, v), layout)
        aside = beside() if beside is not None else None
        if q.shape[1] == 0:  # more ranks than heads: this one only keeps tokens
            out = q
        elif in_order:
            places, inverse = self._order(q.device)
            q, k, v = (t.index_select(2, places) for t in (q, k, v))
            with dit.use_plan(None):  # a foreign function may call ours again: its tokens have met already
                out = function(q, k, v).index_select(2, inverse)
        else:
            out = function(q, k, v)
        return self.exchange.to_tokens(out, heads, layout), aside
