"""What happens to conditionings once before sampling: areas and masks at latent size, ranges as sigmas, model inputs.

`comfy.samplers` re-exports these names. A conditioning is a dict; `cross_attn`, `model_conds`, `area`, `mask`,
`strength`, `start_percent`, `control`, ... Lists are changed in place, dicts are copied before they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import comfy.utils

Conditioning = dict[str, Any]


def get_mask_aabb(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounding boxes (x0, y0, x1, y1), inclusive, [B, 4], of masks [B, H, W], and which masks are empty [B]."""
    boxes = torch.zeros((masks.shape[0], 4), device=masks.device, dtype=torch.int)
    empty = torch.ones(masks.shape[0], device=masks.device, dtype=torch.bool)
    for i, mask in enumerate(masks):
        rows, columns = torch.where(mask)
        if rows.numel():
            empty[i] = False
            boxes[i] = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])
    return boxes, empty


def _area_in_cells(area: tuple[Any, ...], dims: Any) -> tuple[int, ...]:
    """("percentage", sizes ..., offsets ...) as latent cells."""
    shares = area[1:]
    count = len(shares) // 2
    sizes = tuple(max(1, round(share * dim)) for share, dim in zip(shares[:count], dims))
    offsets = tuple(round(share * dim) for share, dim in zip(shares[count:], dims))
    return sizes + offsets


def _bounds_of_mask(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """(h, w, y, x) around the mask's nonzero cells, at least 8 cells a side."""
    boxes, empty = get_mask_aabb(mask.abs().amax(dim=0, keepdim=True))
    if empty[0]:
        return (8, 8, 0, 0)
    x0, y0, x1, y1 = boxes[0].tolist()
    return (max(8, y1 - y0 + 1), max(8, x1 - x0 + 1), y0, x0)


def resolve_areas_and_cond_masks_multidim(conditions: list[Conditioning], dims: Any, device: Any) -> None:
    """Bring areas and masks to latent cells for a latent with spatial size `dims`. Changes the list."""
    for i, cond in enumerate(conditions):
        changed = dict(cond)
        if "area" in cond and cond["area"][0] == "percentage":
            changed["area"] = _area_in_cells(cond["area"], dims)
        if "mask" in cond:
            mask = cond["mask"].to(device=device)
            if mask.ndim == len(dims):
                mask = mask.unsqueeze(0)
            if tuple(mask.shape[1:]) != tuple(dims):
                if mask.ndim < 4:
                    mask = mask.unsqueeze(1)
                    mask = comfy.utils.common_upscale(mask, dims[-1], dims[-2], "bilinear", "none").squeeze(1)
                else:
                    mask = comfy.utils.common_upscale(mask, dims[-1], dims[-2], "bilinear", "none")
                    # One mask for all frames of a video.
                    mask = mask.expand(-1, dims[0], -1, -1) if mask.shape[1] == 1 else mask
            if cond.get("set_area_to_bounds", False):
                changed["area"] = _bounds_of_mask(mask)
            changed["mask"] = mask
        conditions[i] = changed


def resolve_areas_and_cond_masks(conditions: list[Conditioning], h: int, w: int, device: Any) -> None:
    """`resolve_areas_and_cond_masks_multidim` for pictures; the older name."""
    resolve_areas_and_cond_masks_multidim(conditions, [h, w], device)


def _area_inside(area: Any, other: Any) -> bool:
    """Whether `area` lies within `other` along every axis."""
    from comfy.cond_batching import add_area_dims

    axes = max(len(area), len(other)) // 2
    area, other = add_area_dims(area, axes), add_area_dims(other, axes)
    return all(
        area[axes + d] >= other[axes + d] and area[axes + d] + area[d] <= other[axes + d] + other[d]
        for d in range(axes)
    )


def create_cond_with_same_area_if_none(conds: list[Conditioning], c: Conditioning) -> None:
    """Give `conds` a conditioning with the area of `c`, made from the smallest one that covers it.

    Without it, the other side of the guidance would be undefined inside the area.
    """
    if "area" not in c:
        return
    size = len(c["area"]) // 2
    smallest = None
    for candidate in conds:
        if "area" not in candidate:
            if smallest is None:
                smallest = candidate
            continue
        if not _area_inside(c["area"], candidate["area"]):
            continue
        if (
            smallest is None
            or "area" not in smallest
            or _volume(smallest["area"], size) > _volume(candidate["area"], size)
        ):
            smallest = candidate
    if smallest is None or ("area" in smallest and smallest["area"] == c["area"]):
        return
    conds.append({**c, "model_conds": dict(smallest["model_conds"])})


def _volume(area: Any, axes: int) -> int:
    volume = 1
    for size in area[:axes]:
        volume *= size
    return volume


def calculate_start_end_timesteps(model: Any, conds: list[Conditioning]) -> None:
    """Ranges of progress as sigmas: `start_percent` -> `timestep_start`, `end_percent` -> `timestep_end`."""
    to_sigma = model.model_sampling.percent_to_sigma
    for i, cond in enumerate(conds):
        # A prompt encoded for a part of the schedule (clip_*) holds where both ranges do.
        starts = [cond[key] for key in ("start_percent", "clip_start_percent") if key in cond]
        ends = [cond[key] for key in ("end_percent", "clip_end_percent") if key in cond]
        sigmas = {}
        if starts:
            sigmas["timestep_start"] = to_sigma(max(starts))
        if ends:
            sigmas["timestep_end"] = to_sigma(min(ends))
        conds[i] = {**cond, **sigmas}


def pre_run_control(model: Any, conds: list[Conditioning]) -> None:
    """Let control networks prepare for this model."""
    for cond in conds:
        if "control" in cond:
            cond["control"].pre_run(model, model.model_sampling.percent_to_sigma)


def apply_empty_x_to_equal_area(
    conds: list[Conditioning],
    uncond: list[Conditioning],
    name: str,
    uncond_fill_func: Callable[[list[Any], int], Any],
) -> None:
    """Give the negative side what the positive side has under `name`, where neither has an area.

    `uncond_fill_func(values, i)` makes the value for the i-th one. Nothing happens if the negative side has its own.
    """
    values = [cond[name] for cond in conds if "area" not in cond and cond.get(name) is not None]
    free = [t for t, cond in enumerate(uncond) if "area" not in cond]
    if any(uncond[t].get(name) is not None for t in free):
        return
    if not free:
        return
    for i in range(len(values)):
        t = free[i % len(free)]
        filled = {**uncond[t], name: uncond_fill_func(values, i)}
        if uncond[t].get(name) is not None:
            uncond.append(filled)
        else:
            uncond[t] = filled


def encode_model_conds(
    model_function: Callable[..., dict[str, Any]],
    conds: list[Conditioning],
    noise: torch.Tensor,
    device: Any,
    prompt_type: str,
    **kwargs: Any,
) -> list[Conditioning]:
    """Let the model turn each conditioning's fields into its inputs, `model_conds`.

    `model_function` gets all fields by keyword, plus device, noise, width and height in pixels, and `kwargs`.
    """
    for i, cond in enumerate(conds):
        params = {**kwargs, **cond, "device": device, "noise": noise}
        if noise.ndim >= 4:
            params.setdefault("width", noise.shape[3] * 8)
        else:
            params.setdefault("width", None)
        params.setdefault("height", noise.shape[2] * 8)
        params.setdefault("prompt_type", prompt_type)
        conds[i] = {**cond, "model_conds": {**cond["model_conds"], **model_function(**params)}}
    return conds


def process_conds(
    model: Any,
    noise: torch.Tensor,
    conds: dict[str, list[Conditioning]],
    device: Any,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    seed: int | None = None,
) -> dict[str, list[Conditioning]]:
    """All conditionings ready for sampling a latent shaped like `noise` [B, C, *spatial].

    Changes and returns `conds`.
    """
    import comfy.samplers

    for name in conds:
        conds[name] = list(conds[name])
        resolve_areas_and_cond_masks_multidim(conds[name], noise.shape[2:], device)
        calculate_start_end_timesteps(model, conds[name])
    if hasattr(model, "extra_conds"):
        for name in conds:
            conds[name] = encode_model_conds(
                model.extra_conds, conds[name], noise, device, name,
                latent_image=latent_image, denoise_mask=denoise_mask, seed=seed,
            )  # fmt: skip
    for name in conds:
        for cond in list(conds[name]):
            for other in conds:
                if other != name:
                    create_cond_with_same_area_if_none(conds[other], cond)
    for name in conds:
        for cond in conds[name]:
            for hook in cond["hooks"].hooks if "hooks" in cond else ():
                hook.initialize_timesteps(model)
    for name in conds:
        comfy.samplers.pre_run_control(model, conds[name])
    _share_with_negative(conds)
    return conds


def _share_with_negative(conds: dict[str, list[Conditioning]]) -> None:
    """Control and GLIGEN of the positive side apply to the negative side too."""
    positive = conds.get("positive")
    if positive is None:
        return
    shared = [cond for cond in positive if cond.get("control_apply_to_uncond", False)]
    for name in conds:
        if name != "positive":
            apply_empty_x_to_equal_area(shared, conds[name], "control", lambda values, i: values[i])
            apply_empty_x_to_equal_area(positive, conds[name], "gligen", lambda values, i: values[i])
