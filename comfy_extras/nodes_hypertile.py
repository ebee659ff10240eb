"""HyperTile: queries of self-attention in tiles, of which each attends to a part of the picture only."""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def random_divisor(value: int, least: int, choices: int) -> int:
    """In how many parts of at least `least` to cut `value`: one of the first `choices` possibilities, drawn at random.

    ComfyUI never draws the last one; the draw is from torch's global generator, which sampling seeds.
    """
    sizes = [size for size in range(min(least, value), value + 1) if value % size == 0][:choices]
    place = int(torch.randint(0, len(sizes) - 1, (1,)).item()) if len(sizes) > 1 else 0
    return value // sizes[place]


class _Tiles:
    """The two patches of one clone: cut before self-attention, put together after it."""

    def __init__(self, tile_size: int, swap_size: int, max_depth: int, scale_depth: bool) -> None:
        self.tile = max(32, tile_size) // 8
        self.swap_size, self.max_depth, self.scale_depth = swap_size, max_depth, scale_depth
        self.cut_into: tuple[int, int, int, int] | None = None

    def cut(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> Any:
        """q [B, L, C] as [B * tiles, L / tiles, C], on levels down to `max_depth`.

        Keys and values are regrouped, too, but in the order of the tokens, as in ComfyUI: tiles of queries attend to
        stripes of the picture.
        """
        rows, columns = extra["original_shape"][-2:]
        cells = [(rows / 2**level) * (columns / 2**level) for level in range(self.max_depth + 1)]
        tokens = q.shape[1]
        if tokens not in cells:
            return q, k, v
        aspect = columns / rows
        # ComfyUI takes the longer side of a wide picture for its height; tiles of other shapes would change pictures.
        height, width = round(math.sqrt(tokens * aspect)), round(math.sqrt(tokens / aspect))
        least = self.tile * (2 ** cells.index(tokens) if self.scale_depth else 1)
        down, across = (random_divisor(side, least, self.swap_size) for side in (height, width))
        if down * across <= 1:
            return q, k, v
        self.cut_into = down, across, height // down, width // across
        q = q.unflatten(1, (down, height // down, across, width // across)).transpose(2, 3)
        return q.reshape(-1, tokens // (down * across), q.shape[-1]), *(self._stripes(t, down * across) for t in (k, v))

    def _stripes(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        return tensor.reshape(-1, tensor.shape[1] // count, tensor.shape[2])

    def join(self, out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        """The inverse of `cut` for queries."""
        if self.cut_into is None:
            return out
        down, across, height, width = self.cut_into
        self.cut_into = None
        tiles = out.reshape(-1, down, across, height, width, out.shape[-1]).transpose(2, 3)
        return tiles.reshape(-1, down * height * across * width, out.shape[-1])


# (name, default, least, most)
_NUMBERS = (("tile_size", 256, 1, 2048), ("swap_size", 2, 1, 128), ("max_depth", 0, 0, 10))


class HyperTile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        numbers = [io.Int.Input(name, default=value, min=low, max=high) for name, value, low, high in _NUMBERS]
        switch = io.Boolean.Input("scale_depth", default=False)
        return io.Schema(
            node_id=cls.__name__,
            category="model_patches/unet",
            inputs=[io.Model.Input("model"), *numbers, switch],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, tile_size: int, swap_size: int, max_depth: int, scale_depth: bool):
        tiles = _Tiles(tile_size, swap_size, max_depth, scale_depth)
        model = model.clone()
        model.set_model_attn1_patch(tiles.cut)
        model.set_model_attn1_output_patch(tiles.join)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(HyperTile)
