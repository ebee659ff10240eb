"""What Wan's networks for faces and sounds share: features by frame, and attention of video tokens to those of their frame.

Shapes: B videos, F latent frames, L video tokens, C channels, n tokens for each frame, t features in time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, attention


class CausalConv1d(nn.Module):
    """A convolution over [B, C, t] of three features, which looks back only; the first repeats."""

    def __init__(self, in_dim: int, out_dim: int, stride: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.conv = operations.Conv1d(in_dim, out_dim, 3, stride=stride, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (2, 0), mode="replicate"))


class MotionEncoder(nn.Module):
    """Features [B, t, in_dim] -> tokens [B, t / 4, heads + 1, C]: one for each head, and one that is learned."""

    def __init__(
        self, in_dim: int, widths: tuple[int, int, int], heads: int, padding_dim: int, place: dict[str, Any],
        operations: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        first, second, third = widths
        self.num_heads = heads
        self.conv1_local = CausalConv1d(in_dim, first * heads, 1, place, operations)
        self.conv2 = CausalConv1d(first, second, 2, place, operations)
        self.conv3 = CausalConv1d(second, third, 2, place, operations)
        self.padding_tokens = nn.Parameter(torch.empty(1, 1, 1, padding_dim, **place), requires_grad=False)

    @staticmethod
    def _active(x: torch.Tensor) -> torch.Tensor:
        """[B, C, t] normed over channels, and SiLU."""
        rows = x.transpose(1, 2)
        return F.silu(F.layer_norm(rows, rows.shape[-1:], eps=1e-6)).transpose(1, 2)

    def slower(self, x: torch.Tensor) -> torch.Tensor:
        """[B, widths[0], t] -> [B, t / 4, widths[2]]."""
        for layer in (self.conv2, self.conv3):
            x = layer(self._active(x))
        return self._active(x).transpose(1, 2)

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, t, in_dim] -> [B, t / 4, heads, widths[2]]."""
        local = self.conv1_local(x.transpose(1, 2)).unflatten(1, (self.num_heads, -1)).flatten(0, 1)
        return self.slower(local).unflatten(0, (x.shape[0], self.num_heads)).transpose(1, 2)

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, F, heads, C] and the learned one."""
        learned = comfy.ops.cast_to_input(self.padding_tokens, tokens, copy=False)
        return torch.cat((tokens, learned.expand(*tokens.shape[:2], 1, -1)), dim=2)


def with_frames(state: dit.DiTState, tokens: torch.Tensor, count: int | None = None) -> dit.DiTState:
    """A whole state in which video tokens attend to `tokens` [B, F, n, C] of their frame.

    count: how many of the first video tokens belong to frames, all by default. Those after them take nothing.
    Raises ValueError when the frames do not divide them evenly.
    """
    video = state.streams["img"]
    frames, each = tokens.shape[1:3]
    count = video.shape[1] if count is None else count
    if count % frames:
        raise ValueError(f"{count} video tokens cannot belong to {frames} frames; give as many as the latent has")
    places = torch.arange(video.shape[1], device=video.device) // (count // frames)
    mask = places.clamp(max=frames - 1)[:, None] == torch.arange(frames * each, device=video.device)[None] // each
    tokenwise = {**state.tokenwise, "frame": dit.TokenAxis(places.clamp(max=frames - 1), ("img",), 0)}
    if count < video.shape[1]:
        tokenwise["reached"] = dit.TokenAxis((places < frames).to(video)[:, None], ("img",), 0)
    sample = {**state.sample, "frame_tokens": tokens.flatten(1, 2), "frame_mask": mask[None]}
    return dit.DiTState(state.streams, tokenwise, sample)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, state: dit.DiTState, call: dit.DenoiserCall
) -> torch.Tensor:
    """Queries [B, H, l, D] of this rank's video tokens to keys and values [B, H, F * n, D] of their frame -> [B, l, C]."""
    spec = AttentionSpec(heads, state.tokens("img"), dit.Tokens((k.shape[2],)), mask=state.sample["frame_mask"])
    return attention(q, k, v, spec, call)


def add_reached(x: torch.Tensor, added: torch.Tensor, state: dit.DiTState) -> torch.Tensor:
    """x + added for tokens that belong to a frame."""
    return x + (added * state.local("reached") if "reached" in state.tokenwise else added)
