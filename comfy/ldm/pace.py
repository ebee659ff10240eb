"""Points inside a long computation at which a cancelled prompt can end.

Between two blocks of a network the host asks whether the prompt was cancelled, or another rank failed. On a GPU the host
issues a whole call in milliseconds and would then wait for it until its end; in long calls it stays at most `AHEAD`
blocks in front, which costs the GPU nothing, as there is always a block to go on with.
"""

from __future__ import annotations

import collections
from typing import Any

import torch

import comfy.model_management

AHEAD = 2
LONG_CELLS = 1 << 16  # latent cells from which on a picture takes an autoencoder about a second: 2048 x 2048 pixels
LONG_PAIRS = 1 << 32  # pairs of tokens from which on a block of Flux takes a tenth of a second: 4096 x 4096 pixels


def is_long(rows: int, mine: int, whole: int) -> bool:
    """Whether a call is long in which this rank has `mine` of the `whole` tokens of each of `rows` rows."""
    return rows * mine * whole >= LONG_PAIRS


class Pace:
    """The pace of one call of a network, which is `long` or not."""

    def __init__(self, long: bool) -> None:
        self._long = long
        self._issued: collections.deque[Any] = collections.deque()

    def step(self, made: torch.Tensor) -> None:
        """After a block, whose output is `made`. While a CUDA graph is captured this does nothing.

        Raises InterruptProcessingException, or what another rank's failure raises here.
        """
        if made.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            if self._long:
                self._wait(made.device)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _wait(self, device: torch.device) -> None:
        issued = torch.cuda.Event()
        issued.record(torch.cuda.current_stream(device))
        self._issued.append(issued)
        if len(self._issued) > AHEAD:
            self._issued.popleft().synchronize()
