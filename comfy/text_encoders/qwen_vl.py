"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): a language model that is given pictures as tokens among the words.

The vision tower takes pictures in their own proportions. A token stands for 2 x 2 patches, which follow one another, so the
order of patches is that of tokens, row by row. Most layers attend within windows of 4 x 4 tokens, smaller at the right and
bottom edges, and a few to the whole picture. All is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from comfy.clip_model import merge_heads
from comfy.clip_vision_model import CLIP_MEAN, CLIP_STD
from comfy.text_encoders.llama import LanguageModel, RMSNorm, rotary_angles, rotary_tables, rotate

StateDict = dict[str, torch.Tensor]

MERGE = 2
"""Patches of a token, in each direction."""
FRAMES = 2
"""Frames of a patch; a picture is both of them."""
FEWEST_PIXELS, MOST_PIXELS = 56 * 56, 12845056
_EPS = 1e-6
_THETA = 10000.0
_HEAD = 80
_WINDOW_TOKENS = 4
_LAYERS_OF_WHOLE = 8  # each eighth layer attends to the whole picture
_MROPE_SECTIONS = (16, 24, 24)

VISION_7B: dict[str, Any] = {"width": 1280, "layers": 32, "heads": 16, "inner": 3420, "patch": 14}
"""Sizes of the tower of the 3B and 7B models."""


def vision_config(sd: StateDict) -> dict[str, Any] | None:
    """The sizes of the tower in a text encoder's file; None where the file has none."""
    patches = sd.get("visual.patch_embed.proj.weight")
    if patches is None:
        return None
    prefix, width = "visual.blocks.", patches.shape[0]
    layers = {int(key.removeprefix(prefix).split(".")[0]) for key in sd if key.startswith(prefix)}
    inner = sd[f"{prefix}0.mlp.gate_proj.weight"].shape[0]
    heads = max(1, width // _HEAD)
    return {"width": width, "layers": len(layers), "heads": heads, "inner": inner, "patch": patches.shape[-1]}


def seen_size(height: int, width: int, patch: int) -> tuple[int, int]:
    """Sides, in whole tokens, at which a picture is seen: rounded, and scaled where it has too few or too many pixels."""
    unit = patch * MERGE
    sides = [round(side / unit) * unit for side in (height, width)]
    area = math.prod(sides)
    if area > MOST_PIXELS:
        factor = math.sqrt(height * width / MOST_PIXELS)
        sides = [max(unit, math.floor(side / factor / unit) * unit) for side in (height, width)]
    elif area < FEWEST_PIXELS:
        factor = math.sqrt(FEWEST_PIXELS / (height * width))
        sides = [math.ceil(side * factor / unit) * unit for side in (height, width)]
    return sides[0], sides[1]


def picture_patches(image: torch.Tensor, patch: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture [H, W, 3+] in 0..1 -> patches [n, 3, FRAMES, patch, patch] in the tower's order, and their (rows, columns)."""
    pixels = image[..., :3].movedim(-1, 0).unsqueeze(0).float()
    size = seen_size(pixels.shape[2], pixels.shape[3], patch)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]
    middle, spread = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    rows, columns = size[0] // patch, size[1] // patch
    pixels = (pixels - middle) / spread
    grid = pixels.unflatten(2, (columns // MERGE, MERGE, patch)).unflatten(1, (rows // MERGE, MERGE, patch))
    patches = grid.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)
    return patches.unsqueeze(2).expand(-1, -1, FRAMES, -1, -1), (rows, columns)


def patch_places(rows: int, columns: int) -> torch.Tensor:
    """(row, column) of each patch in the tower's order: [2, rows * columns]."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    grid = grid.unflatten(2, (-1, MERGE)).unflatten(1, (-1, MERGE))
    return grid.permute(0, 1, 3, 2, 4).flatten(1)


def _strips(length: int, side: int) -> list[tuple[slice, int]]:
    """Whole windows along an axis, then what is left: (where, length of a window)."""
    whole = length // side * side
    parts = [(slice(0, whole), side), (slice(whole, length), length - whole)]
    return [part for part in parts if part[0].stop > part[0].start]


def windows(rows: int, columns: int, side: int = _WINDOW_TOKENS) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Tokens of a grid sorted by window, [rows * columns], windows of one size together; (windows, tokens in each) by size."""
    places = torch.arange(rows * columns).view(rows, columns)
    order, shapes = [], []
    for down, height in _strips(rows, side):
        for across, width in _strips(columns, side):
            part = places[down, across].unflatten(1, (-1, width)).unflatten(0, (-1, height))
            part = part.transpose(1, 2).flatten(2).flatten(0, 1)
            order.append(part.flatten())
            shapes.append((part.shape[0], part.shape[1]))
    return torch.cat(order), shapes


class _Attention(torch.nn.Module):
    """Attention of patches, in windows."""

    def __init__(self, width: int, heads: int, operations: Any, **place: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width, **place)
        self.proj = operations.Linear(width, width, **place)

    def forward(
        self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], shapes: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """x [n, C]; shapes: (windows, patches in each) of runs of windows, in order."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3).unbind(0)
        q, k = rotate(q, *tables), rotate(k, *tables)
        outs = []
        runs = [part.split([count * size for count, size in shapes], dim=1) for part in (q, k, v)]
        for (count, size), *parts in zip(shapes, *runs):
            by_window = [part.unflatten(1, (count, size)).transpose(0, 1) for part in parts]
            outs.append(merge_heads(F.scaled_dot_product_attention(*by_window)).flatten(0, 1))
        return self.proj(torch.cat(outs))


class _MLP(torch.nn.Module):
    """Gated feed-forward with biases."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def __init__(self, width: int, inner: int, operations: Any, **place: Any) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj"):
            setattr(self, name, operations.Linear(width, inner, **place))
        self.down_proj = operations.Linear(inner, width, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(torch.nn.Module):
    def __init__(self, config: dict[str, Any], operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        width, place = config["width"], {"dtype": dtype, "device": device}
        self.norm1 = RMSNorm(width, _EPS, False, dtype, device)
        self.norm2 = RMSNorm(width, _EPS, False, dtype, device)
        self.attn = _Attention(width, config["heads"], operations, **place)
        self.mlp = _MLP(width, config["inner"], operations, **place)

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), *where)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(torch.nn.Module):
    def __init__(self, width: int, patch: int, operations: Any, **place: Any) -> None:
        super().__init__()
        size = (FRAMES, patch, patch)
        self.proj = operations.Conv3d(3, width, size, stride=size, bias=False, **place)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches).flatten(1)


class _Merger(torch.nn.Module):
    """The patches of a token as one vector of the language model's width."""

    def __init__(self, width: int, out: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        inner, place = width * MERGE**2, {"dtype": dtype, "device": device}
        self.ln_q = RMSNorm(width, _EPS, False, dtype, device)
        self.mlp = torch.nn.Sequential(
            operations.Linear(inner, inner, **place), torch.nn.GELU(), operations.Linear(inner, out, **place)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).unflatten(0, (-1, MERGE**2)).flatten(1))


class VisionTower(torch.nn.Module):
    """See the module."""

    def __init__(self, config: dict[str, Any], out: int, dtype: Any, device: Any, operations: Any) -> None:
        """config: as `VISION_7B`. out: the language model's width."""
        super().__init__()
        self.config = config
        width, place = config["width"], {"dtype": dtype, "device": device}
        self.patch_embed = _PatchEmbed(width, config["patch"], operations, **place)
        self.blocks = torch.nn.ModuleList(_Block(config, operations, **place) for _ in range(config["layers"]))
        self.merger = _Merger(width, out, operations, **place)

    def forward(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Patches [rows * columns, 3, FRAMES, patch, patch] of a picture -> tokens [rows * columns / MERGE^2, out]."""
        device = patches.device
        order, shapes = windows(rows // MERGE, columns // MERGE)
        order = order.to(device)

        def by_window(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)

        head = self.config["width"] // self.config["heads"]
        angles = rotary_angles(patch_places(rows, columns).to(device), head // 2, _THETA)
        tables = rotary_tables(by_window(torch.cat(tuple(angles), dim=-1)))
        x = by_window(self.patch_embed(patches))
        within = [(count, size * MERGE**2) for count, size in shapes]
        for i, block in enumerate(self.blocks):
            whole = i % _LAYERS_OF_WHOLE == _LAYERS_OF_WHOLE - 1
            x = block(x, tables, [(1, len(x))] if whole else within)
        return self.merger(x)[order.argsort()]


def token_places(length: int, pictures: Sequence[dict[str, Any]]) -> torch.Tensor:
    """(time, row, column) of each of `length` tokens, [3, length], for the rotary embedding.

    Words have the same place on all axes. A picture's tokens have one time, and rows and columns from there; what
    follows it goes on as far behind as its longer side is long.
    """
    places = torch.arange(length).repeat(3, 1)
    ahead = 0  # by how much places run before, or behind, the count of tokens
    for picture in pictures:
        start, size = picture["index"], picture["size"]
        rows, columns = (int(n) // MERGE for n in picture["extra"][0][1:])
        first, stop = start + ahead, start + size
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
        places[0, start:stop] = first
        places[1:, start:stop] = first + grid
        ahead += max(rows, columns) - size
        places[:, stop:] = torch.arange(stop, length) + ahead
    return places


class QwenVL(LanguageModel):
    """The language model with its vision tower, where the weights have one."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        config = config_dict.get("vision")
        self.visual = None
        if config is not None:
            self.visual = VisionTower(config, config_dict["hidden_size"], dtype, device, operations)

    def preprocess_embed(self, embed: dict[str, Any], device: Any) -> tuple[torch.Tensor | None, Any]:
        """(tokens [k, C], grid of patches [[1, rows, columns]]) of the first of pictures [n, H, W, 3+] in 0..1.

        embed: {"type": "image", "data": pictures}; for other types (None, None). Raises ValueError when the file has no
        vision tower.
        """
        if embed.get("type") != "image":
            return None, None
        if self.visual is None:
            raise ValueError(
                "this text encoder file has no vision tower (no keys visual.*), so it cannot see pictures; load the whole "
                "Qwen2.5-VL file, such as qwen_2.5_vl_7b_fp8_scaled.safetensors"
            )
        patches, grid = picture_patches(embed["data"][0].to(device), self.visual.config["patch"])
        return self.visual(patches, *grid), torch.tensor([[1, *grid]])

    def positions(self, length: int, embeds_info: Sequence[dict[str, Any]], device: Any) -> torch.Tensor:
        """See `LanguageModel.positions`."""
        pictures = [info for info in embeds_info if info.get("type") == "image"]
        if not pictures:
            return super().positions(length, embeds_info, device)
        return token_places(length, pictures).to(device)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """See `LanguageModel.angles`. With places on three axes each has its share of the frequencies."""
        angles = super().angles(positions)
        if angles.ndim == 2:
            return angles
        shares = [share * angles.shape[-1] // sum(_MROPE_SECTIONS) for share in _MROPE_SECTIONS]
        return torch.cat([part[i] for i, part in enumerate(angles.split(shares, dim=-1))], dim=-1)
