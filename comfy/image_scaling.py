"""Resampling of images and latents, whole or in tiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


def _neighbours(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left index, right index and blend ratio of `new` bilinear samples on `old` points, each [new]."""

    def resample(values: torch.Tensor) -> torch.Tensor:
        line = values.reshape(1, 1, 1, -1)
        return F.interpolate(line, size=(1, new), mode="bilinear").reshape(-1)

    positions = torch.arange(old, dtype=torch.float32, device=device)
    left = resample(positions)
    right = resample((positions + 1).clamp(max=old - 1))
    ratio = left - left.floor()
    return left.long(), right.long(), ratio


def _slerp(start: torch.Tensor, end: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of vectors along the last axis: [..., C], [..., C], ratio [..., 1]."""
    length_a = start.norm(dim=-1, keepdim=True)
    length_b = end.norm(dim=-1, keepdim=True)
    unit_a = torch.nan_to_num(start / length_a, nan=0.0, posinf=0.0, neginf=0.0)
    unit_b = torch.nan_to_num(end / length_b, nan=0.0, posinf=0.0, neginf=0.0)
    cosine = (unit_a * unit_b).sum(-1, keepdim=True)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    mixed = (torch.sin((1.0 - ratio) * angle) * unit_a + torch.sin(ratio * angle) * unit_b) / sine
    mixed = mixed * (length_a * (1.0 - ratio) + length_b * ratio)
    # Parallel vectors have no arc to follow, opposite ones no unique arc.
    mixed = torch.where(cosine > 1 - 1e-5, start, mixed)
    return torch.where(cosine < 1e-5 - 1, start * (1.0 - ratio) + end * ratio, mixed)


def bislerp(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Bilinear resampling that interpolates the channel vectors on the sphere: [B, C, H, W] -> [B, C, height, width]."""
    values = samples.float().movedim(1, -1)  # [B, H, W, C]
    for axis, size in ((2, width), (1, height)):
        left, right, ratio = _neighbours(values.shape[axis], size, samples.device)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        values = _slerp(values.index_select(axis, left), values.index_select(axis, right), ratio.reshape(shape))
    return values.movedim(-1, 1).to(samples.dtype)


def lanczos(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Pillow's Lanczos resampling through 8-bit pictures: [B, C, H, W] in 0..1 -> [B, C, height, width]."""
    import numpy as np
    from PIL import Image

    def one(picture: torch.Tensor) -> torch.Tensor:
        pixels = (255.0 * picture.movedim(0, -1).cpu().float().numpy()).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        resized = np.array(image.resize((width, height), resample=Image.Resampling.LANCZOS)).astype(np.float32) / 255.0
        tensor = torch.from_numpy(resized)
        return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.movedim(-1, 0)

    return torch.stack([one(picture) for picture in samples]).to(samples.device, samples.dtype)


def common_upscale(samples: torch.Tensor, width: int, height: int, upscale_method: str, crop: str) -> torch.Tensor:
    """Resize [B, C, H, W] (or [B, C, T, H, W], frame by frame) to `width` x `height`.

    `crop="center"` first cuts the picture to the target's aspect ratio. `upscale_method` is bislerp, lanczos or a
    mode of `torch.nn.functional.interpolate`.
    """
    frames = None
    if samples.ndim > 4:
        frames = (samples.shape[0], *samples.shape[2:-2])
        samples = samples.movedim(1, -3).reshape(-1, samples.shape[1], *samples.shape[-2:])
    if crop == "center":
        old_width, old_height = samples.shape[3], samples.shape[2]
        x = y = 0
        if old_width / old_height > width / height:
            x = round((old_width - old_width * ((width / height) / (old_width / old_height))) / 2)
        elif old_width / old_height < width / height:
            y = round((old_height - old_height * ((old_width / old_height) / (width / height))) / 2)
        samples = samples[:, :, y : old_height - y, x : old_width - x]
    if upscale_method == "bislerp":
        out = bislerp(samples, width, height)
    elif upscale_method == "lanczos":
        out = lanczos(samples, width, height)
    else:
        out = F.interpolate(samples, size=(height, width), mode=upscale_method)
    if frames is not None:
        out = out.reshape(*frames, out.shape[1], height, width).movedim(-3, 1)
    return out


def get_tiled_scale_steps(width: int, height: int, tile_x: int, tile_y: int, overlap: int) -> int:
    """How many tiles `tiled_scale` visits."""
    rows = 1 if height <= tile_y else math.ceil((height - overlap) / (tile_y - overlap))
    cols = 1 if width <= tile_x else math.ceil((width - overlap) / (tile_x - overlap))
    return rows * cols


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    return list(range(0, size - overlap, tile - overlap)) if size > tile else [0]


def _feathered(mask: torch.Tensor, axis: int, width: int) -> None:
    """Fade `mask` linearly over `width` cells at both ends of `axis`, in place."""
    size = mask.shape[axis]
    for t in range(min(width, size)):
        weight = (t + 1) / width
        mask.narrow(axis, t, 1).mul_(weight)
        mask.narrow(axis, size - 1 - t, 1).mul_(weight)


def _per_axis(value: Any, axes: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * axes


def _add_tile(
    total: torch.Tensor, weight: torch.Tensor, tile: torch.Tensor, place: Sequence[int], feathers: Sequence[int]
) -> None:
    """Add a tile [1, C, *sizes] to `total` at `place`, faded by `feathers` cells per axis, and its mask to `weight`."""
    mask = torch.ones_like(tile)
    for axis, feather in enumerate(feathers, start=2):
        if feather < mask.shape[axis]:
            _feathered(mask, axis, feather)
    for axis, start in enumerate(place, start=2):
        total = total.narrow(axis, start, mask.shape[axis])
        weight = weight.narrow(axis, start, mask.shape[axis])
    total.add_(tile * mask)
    weight.add_(mask)


@torch.inference_mode()
def tiled_scale_multidim(
    samples: torch.Tensor,
    function: Callable[[torch.Tensor], torch.Tensor],
    tile: Sequence[int] = (64, 64),
    overlap: int | Sequence[int] = 8,
    upscale_amount: Any = 4,
    out_channels: int = 3,
    output_device: torch.device | str = "cpu",
    downscale: bool = False,
    index_formulas: Any = None,
    pbar: Any = None,
    each: Callable[..., Iterable[torch.Tensor]] = map,
) -> torch.Tensor:
    """Apply `function` tile by tile along the last `len(tile)` axes and blend overlaps linearly.

    `samples` is [B, C, *sizes]; the result [B, out_channels, *scaled sizes]. `upscale_amount` (a factor or a function
    of a length) and `overlap` may be given per axis; `downscale` divides instead of multiplying.
    `index_formulas` maps the start of a tile to its place in the output where that differs from `upscale_amount`.
    `each(function, tiles)` gives the results in order, as `map` does.
    """
    axes = len(tile)
    amounts, overlaps = _per_axis(upscale_amount, axes), _per_axis(overlap, axes)
    formulas = amounts if index_formulas is None else _per_axis(index_formulas, axes)

    def scaled(rule: Any, value: int) -> float:
        if callable(rule):
            return rule(value)
        return value / rule if downscale else value * rule

    sizes = samples.shape[2:]
    out_sizes = [round(scaled(amounts[d], sizes[d])) for d in range(axes)]
    feathers = [round(scaled(amounts[d], overlaps[d])) for d in range(axes)]
    results = []
    for sample in samples.split(1):
        if all(sizes[d] <= tile[d] for d in range(axes)):
            results.append(function(sample).to(output_device))
            if pbar is not None:
                pbar.update(1)
            continue
        total = torch.zeros([1, out_channels, *out_sizes], device=output_device)
        weight = torch.zeros_like(total)
        parts, places = [], []
        for corner in itertools.product(*(_tile_starts(sizes[d], tile[d], overlaps[d]) for d in range(axes))):
            part, place = sample, []
            for d in range(axes):
                start = max(0, min(sizes[d] - overlaps[d], corner[d]))
                part = part.narrow(d + 2, start, min(tile[d], sizes[d] - start))
                place.append(round(scaled(formulas[d], start)))
            parts.append(part)
            places.append(place)
        for place, made in zip(places, each(function, parts)):
            _add_tile(total, weight, made.to(output_device), place, feathers)
            if pbar is not None:
                pbar.update(1)
        results.append(total / weight)
    return torch.cat(results)


def tiled_scale(
    samples: torch.Tensor,
    function: Callable[[torch.Tensor], torch.Tensor],
    tile_x: int = 64,
    tile_y: int = 64,
    overlap: int = 8,
    upscale_amount: float = 4,
    out_channels: int = 3,
    output_device: torch.device | str = "cpu",
    pbar: Any = None,
    each: Callable[..., Iterable[torch.Tensor]] = map,
) -> torch.Tensor:
    """`tiled_scale_multidim` for pictures: [B, C, H, W] -> [B, out_channels, H * amount, W * amount]."""
    return tiled_scale_multidim(
        samples, function, (tile_y, tile_x), overlap, upscale_amount, out_channels, output_device, pbar=pbar, each=each
    )


def reshape_mask(input_mask: torch.Tensor, output_shape: Sequence[int]) -> torch.Tensor:
    """Resize a mask to the spatial sizes, channels and batch of a latent shape [B, C, ..., H, W]."""
    axes = len(output_shape) - 2
    if axes == 1:
        mode = "linear"
    elif axes == 2:
        mode = "bilinear"
    else:
        mode = "trilinear"
    mask = input_mask
    if axes == 3 and mask.ndim < 5:  # still pictures: one mask for all frames
        mask = mask.reshape(1, 1, -1, mask.shape[-2], mask.shape[-1])
    elif axes == 2:
        mask = mask.reshape(-1, 1, mask.shape[-2], mask.shape[-1])
    elif axes == 1 and mask.ndim < 3:
        mask = mask.reshape(1, 1, -1)
    mask = F.interpolate(mask, size=tuple(output_shape[2:]), mode=mode)
    if mask.shape[1] < output_shape[1]:
        mask = mask.repeat((1, output_shape[1]) + (1,) * axes)[:, : output_shape[1]]
    return repeat_to_batch_size(mask, output_shape[0])


def repeat_to_batch_size(tensor: torch.Tensor, batch_size: int, dim: int = 0) -> torch.Tensor:
    """Cut or repeat `tensor` along `dim` to `batch_size` entries."""
    size = tensor.shape[dim]
    if size > batch_size:
        return tensor.narrow(dim, 0, batch_size)
    if size < batch_size:
        repeats = [1] * tensor.ndim
        repeats[dim] = math.ceil(batch_size / size)
        return tensor.repeat(repeats).narrow(dim, 0, batch_size)
    return tensor


def resize_to_batch_size(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Spread or thin the entries of the first axis evenly over `batch_size` places."""
    size = tensor.shape[0]
    if size == batch_size:
        return tensor
    if batch_size <= 1:
        return tensor[:batch_size]
    if batch_size < size:
        step = (size - 1) / (batch_size - 1)
        picks = [min(round(i * step), size - 1) for i in range(batch_size)]
    else:
        scale = size / batch_size
        picks = [min(math.floor((i + 0.5) * scale), size - 1) for i in range(batch_size)]
    return tensor[picks]
