"""Functions that attach hooks, masks and ranges to conditionings and combine conditionings.

`comfy.hooks` re-exports them. A conditioning is a list of [tensor, dict]; lists and dicts are copied, not changed.
"""

from __future__ import annotations

from typing import Any

import torch

Conditioning = list[Any]


def conditioning_set_values_with_hooks(
    conditioning: Conditioning,
    values: dict[str, Any] | None = None,
    append_hooks: bool = True,
    cache: dict[Any, Any] | None = None,
) -> Conditioning:
    """Each entry with `values` set; "hooks" join those already there when `append_hooks`.

    `cache` keeps joined groups, so that entries with equal hooks keep sharing one object.
    """
    cache = {} if cache is None else cache
    out = []
    for tensor, fields in conditioning:
        changed = dict(fields)
        for key, value in (values or {}).items():
            own = changed.get("hooks")
            if key == "hooks" and append_hooks and own is not None and value is not None:
                pair = (own, value)
                if pair not in cache:
                    cache[pair] = own.clone_and_combine(value)
                value = cache[pair]
            changed[key] = value
        out.append([tensor, changed])
    return out


def set_hooks_for_conditioning(
    cond: Conditioning, hooks: Any, append_hooks: bool = True, cache: dict[Any, Any] | None = None
) -> Conditioning:
    """Attach a group; None changes nothing."""
    if hooks is None:
        return cond
    return conditioning_set_values_with_hooks(cond, {"hooks": hooks}, append_hooks=append_hooks, cache=cache)


def set_timesteps_for_conditioning(cond: Conditioning, timestep_range: Any) -> Conditioning:
    """Limit to a part of the progress, (start, end); None changes nothing."""
    if timestep_range is None:
        return cond
    return conditioning_set_values_with_hooks(
        cond, {"start_percent": timestep_range[0], "end_percent": timestep_range[1]}
    )


def set_mask_for_conditioning(
    cond: Conditioning, mask: torch.Tensor | None, set_cond_area: str, strength: float
) -> Conditioning:
    """Limit to a mask [H, W] or [B, H, W]; None changes nothing. `set_cond_area`: "default" or "mask bounds"."""
    if mask is None:
        return cond
    values = {
        "mask": mask.unsqueeze(0) if mask.ndim < 3 else mask,
        "set_area_to_bounds": set_cond_area != "default",
        "mask_strength": strength,
    }
    return conditioning_set_values_with_hooks(cond, values)


def combine_conditioning(conds: list[Conditioning]) -> Conditioning:
    """All entries in one conditioning."""
    return [entry for cond in conds for entry in cond]


def combine_with_new_conds(conds: list[Conditioning], new_conds: list[Conditioning]) -> list[Conditioning]:
    """Pairwise: positive with positive, negative with negative."""
    return [combine_conditioning([cond, new]) for cond, new in zip(conds, new_conds)]


def set_conds_props(
    conds: list[Conditioning],
    strength: float,
    set_cond_area: str,
    mask: torch.Tensor | None = None,
    hooks: Any = None,
    timesteps_range: Any = None,
    append_hooks: bool = True,
) -> list[Conditioning]:
    """Hooks, mask and range for several conditionings."""
    cache: dict[Any, Any] = {}
    out = []
    for cond in conds:
        cond = set_hooks_for_conditioning(cond, hooks, append_hooks=append_hooks, cache=cache)
        cond = set_mask_for_conditioning(cond, mask, set_cond_area, strength)
        out.append(set_timesteps_for_conditioning(cond, timesteps_range))
    return out


def set_conds_props_and_combine(
    conds: list[Conditioning],
    new_conds: list[Conditioning],
    strength: float = 1.0,
    set_cond_area: str = "default",
    mask: torch.Tensor | None = None,
    hooks: Any = None,
    timesteps_range: Any = None,
    append_hooks: bool = True,
) -> list[Conditioning]:
    """`set_conds_props` on the new conditionings, then joined pairwise to the old ones."""
    changed = set_conds_props(new_conds, strength, set_cond_area, mask, hooks, timesteps_range, append_hooks)
    return combine_with_new_conds(conds, changed)


def set_default_conds_and_combine(
    conds: list[Conditioning],
    new_conds: list[Conditioning],
    hooks: Any = None,
    timesteps_range: Any = None,
    append_hooks: bool = True,
) -> list[Conditioning]:
    """The new conditionings hold wherever none of the old ones does."""
    cache: dict[Any, Any] = {}
    out = []
    for cond, new in zip(conds, new_conds):
        new = set_hooks_for_conditioning(new, hooks, append_hooks=append_hooks, cache=cache)
        new = conditioning_set_values_with_hooks(new, {"default": True})
        out.append(combine_conditioning([cond, set_timesteps_for_conditioning(new, timesteps_range)]))
    return out
