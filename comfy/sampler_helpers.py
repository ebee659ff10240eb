"""What a guider needs around sampling: conditionings from nodes, models to load, hooks to register."""

from __future__ import annotations

import collections
import uuid
from collections.abc import Callable
from typing import Any

import torch

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.utils
from comfy.patcher_extension import WrapperExecutor, WrappersMP


def prepare_mask(noise_mask: torch.Tensor, shape: Any, device: Any) -> torch.Tensor:
    """The inpaint mask at latent size, repeated to `shape` [B, C, ...]."""
    return comfy.utils.reshape_mask(noise_mask, shape).to(device)


def get_models_from_cond(cond: list[dict[str, Any]], model_type: str) -> list[Any]:
    """The models that conditionings carry under a name ("control", "gligen", ...)."""
    return [c[model_type] for c in cond if model_type in c]


def get_hooks_from_cond(cond: list[dict[str, Any]], full_hooks: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup:
    """Add the hooks of conditionings and of their control networks to `full_hooks`."""
    for c in cond:
        for hook in c["hooks"].hooks if c.get("hooks") is not None else ():
            full_hooks.add(hook)
        control = c.get("control")
        while control is not None:
            extra = getattr(control, "extra_hooks", None)
            for hook in extra.hooks if extra is not None else ():
                full_hooks.add(hook)
            control = getattr(control, "previous_controlnet", None)
    return full_hooks


def convert_cond(cond: list[Any]) -> list[dict[str, Any]]:
    """Conditionings as nodes pass them, [[tensor, dict], ...], as dicts with `cross_attn`, `model_conds` and `uuid`."""
    out = []
    for tensor, fields in cond:
        converted = dict(fields)
        if tensor is not None:
            converted["cross_attn"] = tensor
        converted["model_conds"] = converted.get("model_conds", {})
        converted["uuid"] = uuid.uuid4()
        out.append(converted)
    return out


def get_additional_models(conds: dict[str, list[dict[str, Any]]], dtype: torch.dtype | None) -> tuple[list[Any], float]:
    """(models that conditionings need besides the main one, bytes their inference takes)."""
    controls: list[Any] = []
    models: list[Any] = []
    for cond in conds.values():
        controls += [c for c in get_models_from_cond(cond, "control") if not any(c is known for known in controls)]
        models += [gligen[1] for gligen in get_models_from_cond(cond, "gligen")]
        models += [extra for extras in get_models_from_cond(cond, "additional_models") for extra in extras]
    memory = 0
    for control in controls:
        models += control.get_models()
        memory += control.inference_memory_requirements(dtype)
    hooks = comfy.hooks.HookGroup()
    for cond in conds.values():
        get_hooks_from_cond(cond, hooks)
    for hook in hooks.get_type(comfy.hooks.EnumHookType.AdditionalModels):
        models += hook.models
    return models, memory


def get_additional_models_from_model_options(model_options: dict[str, Any] | None = None) -> list[Any]:
    """Models that registered hooks bring."""
    registered = (model_options or {}).get("registered_hooks")
    if registered is None:
        return []
    return [m for hook in registered.get_type(comfy.hooks.EnumHookType.AdditionalModels) for m in hook.models]


def cleanup_additional_models(models: list[Any]) -> None:
    """Let additional models release what they hold."""
    for model in models:
        if hasattr(model, "cleanup"):
            model.cleanup()


def estimate_memory(model: Any, noise_shape: Any, conds: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """(bytes to run positive and negative together, bytes to run one at a time)."""
    together: dict[str, list[Any]] = collections.defaultdict(list)
    alone: dict[str, list[Any]] = collections.defaultdict(list)
    for cond in conds.values():
        largest: dict[str, Any] = {}
        for c in cond:
            for name, value in c.get("model_conds", {}).items():
                size = value.size()
                if name not in largest or _elements(size) > _elements(largest[name]):
                    largest[name] = size
        for name, size in largest.items():
            together[name].append(size)
            if not alone[name] or _elements(size) > _elements(alone[name][0]):
                alone[name] = [size]
    batch, *rest = noise_shape
    required = model.model.memory_required([batch * 2, *rest], cond_shapes=together)
    minimum = model.model.memory_required([batch, *rest], cond_shapes=alone)
    return required, minimum


def _elements(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def prepare_sampling(
    model: Any, noise_shape: Any, conds: dict[str, Any], model_options: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any], list[Any]]:
    """Load everything that sampling needs: (the network's model object, conds, loaded additional models)."""
    wrappers = comfy.patcher_extension.get_all_wrappers(
        WrappersMP.PREPARE_SAMPLING, model_options or {}, is_model_options=True
    )
    executor = WrapperExecutor.new_executor(_prepare_sampling, wrappers)
    return executor.execute(model, noise_shape, conds, model_options=model_options)


def _prepare_sampling(
    model: Any, noise_shape: Any, conds: dict[str, Any], model_options: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any], list[Any]]:
    models, inference_memory = get_additional_models(conds, model.model_dtype())
    for extra in (*get_additional_models_from_model_options(model_options), *model.get_nested_additional_models()):
        if not any(extra is known for known in models):
            models.append(extra)
    required, minimum = estimate_memory(model, noise_shape, conds)
    comfy.model_management.load_models_gpu(
        [model, *models],
        memory_required=required + inference_memory,
        minimum_memory_required=minimum + inference_memory,
    )
    return model.model, conds, models


def cleanup_models(conds: dict[str, list[dict[str, Any]]], models: list[Any]) -> None:
    """Release additional models and control networks after sampling."""
    cleanup_additional_models(models)
    controls: list[Any] = []
    for cond in conds.values():
        controls += get_models_from_cond(cond, "control")
    cleanup_additional_models(list({id(control): control for control in controls}.values()))


def prepare_model_patcher(
    model: Any, conds: dict[str, list[dict[str, Any]]], model_options: dict[str, Any]
) -> dict[str, Any]:
    """Bring the patcher's wrappers and callbacks into `model_options` and register the hooks of all conditionings."""
    hooks = comfy.hooks.HookGroup()
    for cond in conds.values():
        get_hooks_from_cond(cond, hooks)
    options = model_options.setdefault("transformer_options", {})
    for name in ("wrappers", "callbacks"):
        own = getattr(model, name)
        options[name] = comfy.patcher_extension.merge_nested_dicts(options.get(name, {}), own)
    registered = comfy.hooks.HookGroup()
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    for kind in (comfy.hooks.EnumHookType.TransformerOptions, comfy.hooks.EnumHookType.AdditionalModels):
        for hook in hooks.get_type(kind):
            hook.add_hook_patches(model, model_options, target, registered)
    model.register_all_hook_patches(hooks, target, model_options, registered)
    if len(registered) > 0:
        model_options["registered_hooks"] = registered
    to_load = model_options.setdefault("to_load_options", {})
    for name in ("wrappers", "callbacks"):
        to_load[name] = comfy.patcher_extension.merge_nested_dicts(to_load.get(name, {}), options[name])
    return to_load


def cast_to_load_options(model_options: dict[str, Any], device: Any = None, dtype: torch.dtype | None = None) -> None:
    """Move what wrappers, callbacks and hooks brought along to a device; objects with a `to` method take part."""

    def move(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                move(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                move(item)
        elif not isinstance(value, torch.Tensor) and callable(getattr(value, "to", None)):
            value.to(device=device, dtype=dtype)
        else:
            owner = getattr(value, "__self__", None)
            if owner is not None and callable(getattr(owner, "to", None)):
                owner.to(device=device, dtype=dtype)

    move(model_options.get("to_load_options", {}))


def preprocess_conds_hooks(conds: dict[str, list[dict[str, Any]]]) -> None:
    """Let equal hook groups be one object, so that their conditionings can share calls and weights."""
    known: dict[Any, comfy.hooks.HookGroup] = {}

    def shared(group: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup:
        return known.setdefault(group, group)

    _replace_hooks(conds, shared)


def _replace_hooks(
    conds: dict[str, list[dict[str, Any]]],
    replace: Callable[[comfy.hooks.HookGroup], comfy.hooks.HookGroup | None],
) -> None:
    for cond in conds.values():
        for c in cond:
            if c.get("hooks") is not None:
                group = replace(c["hooks"])
                if group is None:
                    c.pop("hooks")
                else:
                    c["hooks"] = group


def get_total_hook_groups_in_conds(conds: dict[str, list[dict[str, Any]]]) -> int:
    """How many different sets of hooks the conditionings use, the empty one included."""
    return len({c.get("hooks") for cond in conds.values() for c in cond})


def filter_registered_hooks_on_conds(conds: dict[str, list[dict[str, Any]]], model_options: dict[str, Any]) -> None:
    """Leave only hooks that were registered, or that need no registration."""
    registered = model_options.get("registered_hooks")
    if registered is None:
        return
    known: dict[Any, comfy.hooks.HookGroup | None] = {}

    def kept(group: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup | None:
        if group not in known:
            common = group.new_with_common_hooks(registered)
            known[group] = common if len(common) else None
        return known[group]

    _replace_hooks(conds, kept)
