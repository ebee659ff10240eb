"""Cells of neighbouring places of a video as an axis each, and back: how autoencoders fold places into channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cells_of(x: torch.Tensor, time: int, space: int) -> torch.Tensor:
    """[B, C, T, H, W] -> [B, C, time, space, space, T / time, H / space, W / space]: the places of each cell come first.

    Rows are folded by `pixel_unshuffle`, which rows of a picture on several ranks know.
    """
    frames = F.pixel_unshuffle(x.transpose(1, 2).flatten(0, 1), space)
    cells = frames.unflatten(1, (x.shape[1], space, space)).unflatten(0, (x.shape[0], -1, time))
    return cells.permute(0, 3, 2, 4, 5, 1, 6, 7)


def from_cells(cells: torch.Tensor) -> torch.Tensor:
    """The reverse of `cells_of`: [B, C, t, s, s, T, H, W] -> [B, C, T * t, H * s, W * s]."""
    frames = cells.permute(0, 5, 2, 1, 3, 4, 6, 7).flatten(3, 5).flatten(0, 2)
    return F.pixel_shuffle(frames, cells.shape[3]).unflatten(0, (cells.shape[0], -1)).transpose(1, 2)
