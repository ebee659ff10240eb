"""Token merging: self-attention of a UNet's widest level on fewer queries (Bolya & Hoffman 2023)."""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

STRIDE = 2


class Merging:
    """Which tokens of x [B, L, C] on a grid merge into which.

    One token of each 2 x 2 cells, drawn at random, stays; of the others, the `count` that are most like one of those
    merge into it. Merged tokens come in another order; `undo` puts them back.
    """

    def __init__(self, x: torch.Tensor, height: int, width: int, count: int) -> None:
        cells = (height // STRIDE, width // STRIDE)
        drawn = torch.randint(STRIDE * STRIDE, (*cells, 1), device=x.device)
        marks = torch.zeros((*cells, STRIDE * STRIDE), device=x.device, dtype=torch.int64).scatter_(2, drawn, -1)
        marks = marks.unflatten(2, (STRIDE, STRIDE)).transpose(1, 2).flatten(2).flatten(0, 1)
        grid = torch.zeros((height, width), device=x.device, dtype=torch.int64)
        grid[: marks.shape[0], : marks.shape[1]] = marks
        order = grid.flatten().argsort(stable=True)
        kept = cells[0] * cells[1]
        self.kept, self.others = order[:kept], order[kept:]
        self.tokens = x.shape[1]
        unit = x / x.norm(dim=-1, keepdim=True)
        likeness, nearest = (unit[:, self.others] @ unit[:, self.kept].transpose(1, 2)).max(dim=-1)
        ranked = likeness.argsort(dim=-1, descending=True)
        count = min(count, len(self.others))
        self.merged, self.alone = ranked[:, :count, None], ranked[:, count:, None]
        self.into = nearest.unsqueeze(-1).gather(1, self.merged)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L - count, C]: tokens that stay alone, then means of those that merged."""
        width = x.shape[-1]
        others, kept = x[:, self.others], x[:, self.kept]
        merged = others.gather(1, self.merged.expand(-1, -1, width))
        kept = kept.scatter_reduce(1, self.into.expand(-1, -1, width), merged, reduce="mean")
        return torch.cat([others.gather(1, self.alone.expand(-1, -1, width)), kept], dim=1)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L - count, C] -> [B, L, C]: tokens that merged are equal."""
        width = x.shape[-1]
        alone, kept = x.split([self.alone.shape[1], len(self.kept)], dim=1)
        out = x.new_empty((x.shape[0], self.tokens, width))
        out[:, self.kept] = kept
        merged = kept.gather(1, self.into.expand(-1, -1, width))
        others = x.new_empty((x.shape[0], len(self.others), width))
        others.scatter_(1, self.alone.expand(-1, -1, width), alone)
        others.scatter_(1, self.merged.expand(-1, -1, width), merged)
        out[:, self.others] = others
        return out


class _Patches:
    """The two patches of one clone: merge before self-attention, undo after it."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.merging: Merging | None = None

    def merge(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> Any:
        """Fewer queries on the level of the picture's own size; elsewhere nothing changes."""
        height, width = extra["original_shape"][-2:]
        tokens = q.shape[1]
        count = int(tokens * self.ratio)
        self.merging = None
        downscaled = math.ceil(math.sqrt(height * width // tokens)) > 1
        if downscaled or count <= 0 or height == 1 or width == 1:
            return q, k, v
        self.merging = Merging(q, height, width, count)
        return self.merging.apply(q), k, v

    def undo(self, out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        """All tokens again."""
        return out if self.merging is None else self.merging.undo(out)


class TomePatchModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TomePatchModel",
            category="model_patches/unet",
            inputs=[io.Model.Input("model"), share("ratio", 0.3)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, ratio: float):
        patches = _Patches(ratio)
        model = model.clone()
        model.set_model_attn1_patch(patches.merge)
        model.set_model_attn1_output_patch(patches.undo)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(TomePatchModel)
