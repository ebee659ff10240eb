"""From conditionings to denoiser calls: which apply to this step and where, and which can share a call.

`comfy.samplers` re-exports these names.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch

import comfy.model_management
import comfy.patcher_extension
from comfy.conds import CONDConstant
from comfy.denoiser_batch import DenoiserBatch, evaluate_serially

# Where no conditioning is active: a divisor that turns the sum of nothing into 0.
_EMPTY_COUNT = 1e-37
# Latent cells over which an area fades into its surroundings.
_FADE = 8


class CondObj(NamedTuple):
    """A conditioning fitted to the current latent: its part of x, its weight there and its network arguments."""

    input_x: torch.Tensor
    mult: torch.Tensor
    conditioning: dict[str, Any]
    area: list[int] | None
    control: Any
    patches: dict[str, Any] | None
    uuid: Any
    hooks: Any


def add_area_dims(area: Any, num_dims: int) -> Any:
    """(h, w, y, x) for latents with more spatial axes: the leading ones are taken whole."""
    while len(area) // 2 < num_dims:
        sizes, offsets = area[: len(area) // 2], area[len(area) // 2 :]
        area = [2147483648, *sizes, 0, *offsets]
    return area


def _narrow(tensor: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """The part of [B, C, *spatial] inside `area` = [sizes ..., offsets ...]."""
    if area is not None:
        axes = len(area) // 2
        for axis in range(axes):
            tensor = tensor.narrow(axis + 2, area[axes + axis], area[axis])
    return tensor


def _fade_edges(mult: torch.Tensor, area: list[int], full: torch.Size) -> None:
    """Let the weight of an area fade towards its edges, except along the picture's border."""
    axes = len(area) // 2
    for axis in range(axes):
        reach = min(_FADE, mult.shape[2 + axis] // 4)
        size, offset = area[axis], area[axes + axis]
        for t in range(reach):
            if offset != 0:
                mult.narrow(axis + 2, t, 1).mul_((t + 1) / reach)
            if size + offset < full[axis + 2]:
                mult.narrow(axis + 2, size - 1 - t, 1).mul_((t + 1) / reach)


def _mask_weight(conds: dict[str, Any], input_x: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """The weight from a conditioning's mask, shaped like `input_x`."""
    mask = conds["mask"]
    if area is None and mask.shape[1:] != input_x.shape[2:]:
        raise ValueError(f"a conditioning mask of {tuple(mask.shape[1:])} on a latent of {tuple(input_x.shape[2:])}")
    mask = _narrow(mask[: input_x.shape[0]].unsqueeze(1), area) * conds.get("mask_strength", 1.0)
    rows = input_x.shape[0] // mask.shape[0]
    return mask.repeat((rows, input_x.shape[1]) + (1,) * (mask.ndim - 2))


def get_area_and_mult(conds: dict[str, Any], x_in: torch.Tensor, timestep_in: torch.Tensor) -> CondObj | None:
    """The conditioning fitted to x [B, C, *spatial] at sigma `timestep_in` [B], or None outside its range."""
    if "timestep_start" in conds and timestep_in[0] > conds["timestep_start"]:
        return None
    if "timestep_end" in conds and timestep_in[0] < conds["timestep_end"]:
        return None
    area = None
    input_x = x_in
    if "area" in conds:
        axes = x_in.ndim - 2
        area = list(add_area_dims(conds["area"], axes))
        for axis in range(axes):
            area[axis] = min(x_in.shape[axis + 2] - area[axes + axis], area[axis])
        input_x = _narrow(x_in, area)
    if "mask" in conds:
        mult = _mask_weight(conds, input_x, area)
    else:
        mult = torch.ones_like(input_x)
    mult = mult * conds.get("strength", 1.0)
    if "mask" not in conds and area is not None:
        _fade_edges(mult, area, x_in.shape)
    conditioning = {
        name: value.process_cond(batch_size=x_in.shape[0], device=x_in.device, area=area)
        for name, value in conds["model_conds"].items()
    }
    patches = _gligen_patches(conds, input_x)
    return CondObj(
        input_x, mult, conditioning, area, conds.get("control"), patches, conds.get("uuid"), conds.get("hooks")
    )


def _gligen_patches(conds: dict[str, Any], input_x: torch.Tensor) -> dict[str, Any] | None:
    if "gligen" not in conds:
        return None
    kind, patcher, *position = conds["gligen"]
    if kind == "position":
        patch = patcher.model.set_position(input_x.shape, position[0], input_x.device)
    else:
        patch = patcher.model.set_empty(input_x.shape, input_x.device)
    return {"middle_patch": [patch]}


def cond_equal_size(c1: dict[str, Any], c2: dict[str, Any]) -> bool:
    """Whether two sets of network arguments can be joined row-wise."""
    if c1 is c2:
        return True
    return c1.keys() == c2.keys() and all(c1[name].can_concat(c2[name]) for name in c1)


def can_concat_cond(c1: CondObj, c2: CondObj) -> bool:
    """Whether two conditionings can share a network call."""
    if c1.input_x.shape != c2.input_x.shape or c1.control is not c2.control:
        return False
    if (c1.patches is None) != (c2.patches is None) or (c1.patches is not None and c1.patches is not c2.patches):
        return False
    return cond_equal_size(c1.conditioning, c2.conditioning)


def cond_cat(c_list: list[dict[str, Any]]) -> dict[str, Any]:
    """Network arguments of several conditionings as one set of keyword arguments."""
    return {name: value.concat([other[name] for other in c_list[1:]]) for name, value in c_list[0].items()}


def _fit_default_conds(
    runs: dict[Any, list[tuple[CondObj, int]]],
    default_conds: list[list[dict[str, Any]]],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
) -> list[tuple[CondObj, int]]:
    """Default conditionings, weighted by what the other conditionings leave uncovered."""
    fitted = []
    for i, defaults in enumerate(default_conds):
        if not defaults:
            continue
        left = torch.ones_like(x_in)
        for to_run in runs.values():
            for cond, owner in to_run:
                if owner == i:
                    _narrow(left, cond.area).sub_(cond.mult)
        left.clamp_(min=0)
        if left.max() == 0:
            continue
        for default in defaults:
            behind = get_area_and_mult(default, x_in, timestep)
            if behind is not None:
                fitted.append((behind._replace(mult=_narrow(left, behind.area)), i))
    return fitted


def _runs_by_hooks(
    model: Any,
    conds: list[list[dict[str, Any]] | None],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> dict[Any, list[tuple[CondObj, int]]]:
    """Active conditionings with the place of their list, by hook group (the groups need different weights)."""
    runs: dict[Any, list[tuple[CondObj, int]]] = {}

    def enlist(cond: CondObj, i: int) -> None:
        if cond.hooks is not None:
            model.current_patcher.prepare_hook_patches_current_keyframe(timestep, cond.hooks, model_options)
        runs.setdefault(cond.hooks, []).append((cond, i))

    default_conds: list[list[dict[str, Any]]] = []
    for i, cond_list in enumerate(conds):
        default_conds.append([])
        for cond in cond_list or ():
            if "default" in cond:
                default_conds[i].append(cond)
                continue
            fitted = get_area_and_mult(cond, x_in, timestep)
            if fitted is not None:
                enlist(fitted, i)
    for fitted, i in _fit_default_conds(runs, default_conds, x_in, timestep):
        enlist(fitted, i)
    return runs


def _fits(model: Any, group: list[tuple[CondObj, int]], budget: float) -> bool:
    """Whether the conditionings of `group` fit into the memory budget as one call."""
    first = group[0][0].input_x.shape
    shapes: dict[str, list[Any]] = collections.defaultdict(list)
    for cond, _ in group:
        for name, value in cond.conditioning.items():
            shapes[name].append(value.size())
    return model.memory_required([len(group) * first[0], *first[1:]], cond_shapes=shapes) * 1.5 < budget


def _take_group(model: Any, waiting: list[tuple[CondObj, int]], budget: float) -> list[tuple[CondObj, int]]:
    """Remove and return the conditionings of the next call: those that go with the first, as many as fit.

    Later conditionings come first in the group, so positive and negative run as `[1, 0]`: custom nodes know it so.
    """
    first = waiting[0][0]
    joinable = [entry for entry in waiting if can_concat_cond(entry[0], first)][::-1]
    group = joinable[:1]
    for parts in range(1, len(joinable) + 1):
        attempt = joinable[: len(joinable) // parts]
        if _fits(model, attempt, budget):
            group = attempt
            break
    for entry in group:
        waiting[:] = [other for other in waiting if other is not entry]
    return group


def _build_batch(
    model: Any,
    group: list[tuple[CondObj, int]],
    timestep: torch.Tensor,
    hook_options: dict[str, Any],
    model_options: dict[str, Any],
) -> DenoiserBatch:
    """The arguments of one denoiser call."""
    conds = [cond for cond, _ in group]
    cond_or_uncond = [i for _, i in group]
    batch_size = conds[0].input_x.shape[0]
    x = torch.cat([cond.input_x for cond in conds])
    sigma = torch.cat([timestep] * len(conds))
    constants = {name for name, value in conds[0].conditioning.items() if isinstance(value, CONDConstant)}
    c = cond_cat([cond.conditioning for cond in conds])
    merge = comfy.patcher_extension.merge_nested_dicts
    transformer_options = merge(hook_options, model_options.get("transformer_options", {}))
    if conds[0].patches is not None:
        transformer_options["patches"] = merge(transformer_options.get("patches", {}), conds[0].patches)
    transformer_options["cond_or_uncond"] = cond_or_uncond[:]
    transformer_options["uuids"] = [cond.uuid for cond in conds]
    transformer_options["sigmas"] = timestep
    c["transformer_options"] = transformer_options
    control = conds[0].control
    if hasattr(control, "prepare_hints"):
        control.prepare_hints(x)
    return DenoiserBatch(x, sigma, c, cond_or_uncond, batch_size, frozenset(constants), control)


def _memory_budget(model: Any, device: torch.device) -> float:
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None and hasattr(patcher, "denoiser_memory_budget"):
        return patcher.denoiser_memory_budget(device)
    return comfy.model_management.get_free_memory(device)


def calc_cond_batch_unwrapped(
    model: Any,
    conds: list[list[dict[str, Any]] | None],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """Denoised predictions [B, C, *spatial], one per entry of `conds`; zero where none of its conditionings is active.

    Batches of one hook group are evaluated together, since the group's weights are in the network meanwhile.
    """
    out_conds = [torch.zeros_like(x_in) for _ in conds]
    out_counts = [torch.full_like(x_in, _EMPTY_COUNT) for _ in conds]
    runs = _runs_by_hooks(model, conds, x_in, timestep, model_options)
    patcher = getattr(model, "current_patcher", None)
    if patcher is not None:
        patcher.prepare_state(timestep)
    budget = _memory_budget(model, x_in.device)
    evaluate = getattr(patcher, "evaluate_batches", evaluate_serially)
    for hooks, waiting in runs.items():
        hook_options = patcher.apply_hooks(hooks=hooks) if patcher is not None else {}
        groups, batches = [], []
        while waiting:
            group = _take_group(model, waiting, budget)
            groups.append(group)
            batches.append(_build_batch(model, group, timestep, hook_options, model_options))
        for group, output in zip(groups, evaluate(model, batches, model_options)):
            for (cond, i), prediction in zip(group, output.chunk(len(group))):
                _narrow(out_conds[i], cond.area).add_(prediction * cond.mult)
                _narrow(out_counts[i], cond.area).add_(cond.mult)
    return [total.div_(count) for total, count in zip(out_conds, out_counts)]


def calc_cond_batch(
    model: Any,
    conds: list[list[dict[str, Any]] | None],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """`calc_cond_batch_unwrapped` inside the wrappers of CALC_COND_BATCH and, if it wants to, the context handler."""
    wrappers = comfy.patcher_extension.get_all_wrappers(
        comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, model_options, is_model_options=True
    )

    def wrapped(*args: Any) -> list[torch.Tensor]:
        executor = comfy.patcher_extension.WrapperExecutor.new_executor(calc_cond_batch_unwrapped, wrappers)
        return executor.execute(*args)

    handler = model_options.get("context_handler")
    if handler is not None and handler.should_use_context(model, conds, x_in, timestep, model_options):
        return handler.execute(wrapped, model, conds, x_in, timestep, model_options)
    return wrapped(model, conds, x_in, timestep, model_options)
