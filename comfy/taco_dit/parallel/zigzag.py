"""Tokens dealt so that every part of a ring has equal work under a causal mask.

Shards are contiguous, so that under a causal mask the first part would attend to its own keys and the last to all. For
such an attention the tokens are cut into 2n chunks, and part i of n gets the chunks i and 2n-1-i: an early one, which sees
little, and a late one. That costs one more all-to-all before the attention, of queries, keys and values, and one after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from comfy.taco_dit.core.plan import share

from .exchange import Ring


class Zigzag:
    """How part `index` gives and gets its tokens.

    parts: for each part the places of its tokens in whole streams, on the host; together they are all places.
    """

    def __init__(self, parts: Sequence[torch.Tensor], index: int, device: torch.device) -> None:
        self.size, self.index, self.device = len(parts), index, device
        self.total = sum(len(part) for part in parts)
        with torch.inference_mode(False):  # ordinary tensors, which may also take part in training
            owners = [self._owners(part) for part in parts]
            leaving = torch.sort(owners[index], stable=True).indices
            arriving = torch.cat([part[owner == index] for part, owner in zip(parts, owners)]).argsort()
            self.sent = owners[index].bincount(minlength=self.size).tolist()
            self.received = [int((owner == index).sum()) for owner in owners]
            self._leaving, self._home = leaving.to(device), leaving.argsort().to(device)
            self._arriving, self._away = arriving.to(device), arriving.argsort().to(device)
        self.places = functools.cache(self._places)  # kept: captured graphs read them

    def chunks(self, part: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """[start, stop) of the places of a part's two chunks."""
        pieces = 2 * self.size
        return share(self.total, pieces, part), share(self.total, pieces, pieces - 1 - part)

    def _owners(self, places: torch.Tensor) -> torch.Tensor:
        """The part that each place goes to."""
        table = torch.empty(self.total, dtype=torch.long)
        for part in range(self.size):
            for start, stop in self.chunks(part):
                table[start:stop] = part
        return table[places]

    def _places(self, part: int) -> torch.Tensor:
        """Places of the tokens that a part gets, ascending."""
        with torch.inference_mode(False):
            return torch.cat([torch.arange(*chunk) for chunk in self.chunks(part)]).to(self.device)

    def deal(self, ring: Ring, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Each [B, h, L, D] of this part's tokens -> of those it gets, in the order of whole streams."""
        rows = torch.cat(tensors, dim=1).permute(2, 0, 1, 3).index_select(0, self._leaving)
        got = ring.deal(rows, self.sent, self.received).index_select(0, self._arriving)
        return list(got.permute(1, 2, 0, 3).split([tensor.shape[1] for tensor in tensors], dim=1))

    def take_back(self, ring: Ring, out: torch.Tensor) -> torch.Tensor:
        """[B, h, L, D] of the tokens that this part got -> of its own, as they were."""
        rows = out.permute(2, 0, 1, 3).index_select(0, self._away)
        return ring.deal(rows, self.received, self.sent).index_select(0, self._home).permute(1, 2, 0, 3)
