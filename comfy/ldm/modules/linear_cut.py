"""Linears of which this process has only a part: what code needs to know that uses a layer's weight itself.

A cut linear [out, in] has some of its outputs (column) or inputs (row). Called as a module it does all by itself. Code that
multiplies by its weight passes what goes in through `entered` and what comes out through `left`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn


class LinearCut(Protocol):
    """The `cut` of a linear."""

    whole: bool
    """Whether the linear is now called as if it was whole: not from inside a block of ours on its tokens."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What the part here multiplies: x [B, L, in] -> [B, L', in']."""

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """What the linear returns, from the product of the part here. A sum over ranks gets its bias here."""

    def here(self, first: int) -> int:
        """How many of the first `first` outputs are here; `first` is where a fused part begins."""

    def of_outputs(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Of `values`, whose axis `dim` has one entry for every n of all outputs: those of the outputs that are here."""

    def mean_squares(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Of each [.., out'] the mean of the squares of all outputs [.., 1] fp32; None where all are here."""


def cut_of(linear: nn.Module) -> LinearCut | None:
    """How a linear is cut, None where it is whole."""
    cut: LinearCut | None = vars(linear).get("cut")
    return cut


def entered(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the part of a linear that is here multiplies."""
    cut = cut_of(linear)
    return x if cut is None else cut.enter(x)


def left(linear: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """What a linear returns, from the product of the part that is here."""
    cut = cut_of(linear)
    return y if cut is None else cut.leave(y)


def outputs_here(linear: nn.Module, first: int) -> int:
    """How many of a linear's first `first` outputs are here."""
    cut = cut_of(linear)
    return first if cut is None else cut.here(first)


def of_outputs(linear: nn.Module, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Of `values`, whose axis `dim` has one entry for every n of a linear's outputs: those of the outputs that are here."""
    cut = cut_of(linear)
    return values if cut is None else cut.of_outputs(values, dim)


def mean_squares(linear: nn.Module, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """For norms over all outputs of linears that are cut alike: of each [.., out'] the mean of the squares of all outputs.

    [.., 1] in fp32, summed over the processes that have the others; None where all are here. `linear`: one of them.
    """
    cut = cut_of(linear)
    return [None] * len(outputs) if cut is None else cut.mean_squares(outputs)
