"""Hooks: changes to a model that hold for some conditionings, or for some of the steps, only.

A hook says what changes (weights, attributes, transformer options, ...). `HookGroup`s are kept with conditionings under
the key "hooks"; conditionings with different groups run as separate model calls. Keyframes scale a hook's strength
over the progress of sampling. `comfy.hook_conds` has the functions that attach hooks to conditionings.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import torch

from comfy.hook_conds import (
    combine_conditioning,
    combine_with_new_conds,
    conditioning_set_values_with_hooks,
    set_conds_props,
    set_conds_props_and_combine,
    set_default_conds_and_combine,
    set_hooks_for_conditioning,
    set_mask_for_conditioning,
    set_timesteps_for_conditioning,
)
from comfy.hook_keyframes import HookKeyframe, HookKeyframeGroup, InterpolationMethod

__all__ = [
    "AdditionalModelsHook", "EnumHookMode", "EnumHookScope", "EnumHookType", "EnumWeightTarget", "Hook", "HookGroup",
    "HookKeyframe", "HookKeyframeGroup", "InjectionsHook", "InterpolationMethod", "ObjectPatchHook",
    "TransformerOptionsHook", "WeightHook", "WrapperHook", "combine_conditioning", "combine_with_new_conds",
    "conditioning_set_values_with_hooks", "create_hook_lora", "create_hook_model_as_lora", "create_target_dict",
    "create_transformer_options_from_hooks", "get_patch_weights_from_model", "load_hook_lora_for_models",
    "set_conds_props", "set_conds_props_and_combine", "set_default_conds_and_combine", "set_hooks_for_conditioning",
    "set_mask_for_conditioning", "set_timesteps_for_conditioning",
]  # fmt: skip


class EnumHookMode(enum.Enum):
    """Compute a group's weights at each change, or keep those of every group."""

    MinVram = "minvram"
    MaxSpeed = "maxspeed"


class EnumHookType(enum.Enum):
    """What a hook changes."""

    Weight = "weight"
    ObjectPatch = "object_patch"
    AdditionalModels = "add_models"
    TransformerOptions = "transformer_options"
    Injections = "add_injections"


class EnumWeightTarget(enum.Enum):
    """Whose weights are patched."""

    Model = "model"
    Clip = "clip"


class EnumHookScope(enum.Enum):
    """Whether a hook's options reach all conditionings or only those that carry it."""

    AllConditioning = "all_conditioning"
    HookedOnly = "hooked_only"


class _HookRef:
    """Identity that clones of a hook share."""


def create_target_dict(target: EnumWeightTarget, **kwargs: Any) -> dict[str, Any]:
    """What hooks are registered for."""
    return {"target": target, **kwargs}


def default_should_register(
    hook: Hook, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
) -> bool:
    """Every hook is registered, unless it says otherwise."""
    return True


class Hook:
    """One change. `strength` is its own strength times the current keyframe's."""

    def __init__(
        self,
        hook_type: EnumHookType | None = None,
        hook_ref: Any = None,
        hook_id: str | None = None,
        hook_keyframe: HookKeyframeGroup | None = None,
        hook_scope: EnumHookScope = EnumHookScope.AllConditioning,
    ) -> None:
        self.hook_type = hook_type
        self.hook_ref = _HookRef() if hook_ref is None else hook_ref
        self.hook_id = hook_id
        self.hook_keyframe = HookKeyframeGroup() if hook_keyframe is None else hook_keyframe
        self.hook_scope = hook_scope
        self.custom_should_register: Callable[..., bool] = default_should_register

    @property
    def strength(self) -> float:
        """Current strength from keyframes, 1 without any."""
        return self.hook_keyframe.strength

    def initialize_timesteps(self, model: Any) -> None:
        """Turn the keyframes' progress into sigmas of this model."""
        self.hook_keyframe.initialize_timesteps(model)

    def reset(self) -> None:
        """Go back to the first keyframe."""
        self.hook_keyframe.reset()

    def clone(self) -> Any:
        """A hook of the same identity whose settings can be changed."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other

    def should_register(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Whether sampling takes this hook into account."""
        return self.custom_should_register(self, model, model_options, target_dict, registered)

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Register with a patcher; returns whether anything was."""
        raise NotImplementedError(f"{type(self).__name__} cannot be registered on its own")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hook) and type(self) is type(other) and self.hook_ref is other.hook_ref

    def __hash__(self) -> int:
        return hash(self.hook_ref)


class WeightHook(Hook):
    """Patches of weights: an adapter (`weights` is its state dict) or ready patches per target."""

    def __init__(self, strength_model: float = 1.0, strength_clip: float = 1.0) -> None:
        super().__init__(EnumHookType.Weight)
        self._strength_model = strength_model
        self._strength_clip = strength_clip
        self.weights: dict[Any, Any] | None = None
        self.weights_clip: dict[Any, Any] | None = None
        self.need_weight_init = True

    @property
    def strength_model(self) -> float:
        """Strength on the diffusion model."""
        return self._strength_model * self.strength

    @property
    def strength_clip(self) -> float:
        """Strength on the text encoders."""
        return self._strength_clip * self.strength

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Give the patcher this hook's weight patches."""
        import comfy.lora

        if not self.should_register(model, model_options, target_dict, registered):
            return False
        for_clip = target_dict.get("target") == EnumWeightTarget.Clip
        strength = self._strength_clip if for_clip else self._strength_model
        if self.need_weight_init:
            find_keys = comfy.lora.model_lora_keys_clip if for_clip else comfy.lora.model_lora_keys_unet
            patches = comfy.lora.load_lora(self.weights or {}, find_keys(model.model, {}), log_missing=False)
        else:
            patches = (self.weights_clip if for_clip else self.weights) or {}
        model.add_hook_patches(hook=self, patches=patches, strength_patch=strength)
        registered.add(self)
        return True


class ObjectPatchHook(Hook):
    """Attributes replaced while the hook holds."""

    def __init__(
        self,
        object_patches: dict[str, Any] | None = None,
        hook_scope: EnumHookScope = EnumHookScope.AllConditioning,
    ) -> None:
        super().__init__(EnumHookType.ObjectPatch, hook_scope=hook_scope)
        self.object_patches = object_patches


class AdditionalModelsHook(Hook):
    """Models that are loaded together with the main one."""

    def __init__(self, models: list[Any] | None = None, key: str | None = None) -> None:
        super().__init__(EnumHookType.AdditionalModels)
        self.models = list(models or ())
        self.key = key

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Register; the models are loaded by `comfy.sampler_helpers`."""
        if not self.should_register(model, model_options, target_dict, registered):
            return False
        registered.add(self)
        return True


class TransformerOptionsHook(Hook):
    """Entries of `transformer_options`, wrappers and callbacks among them."""

    def __init__(
        self,
        transformers_dict: dict[str, Any] | None = None,
        hook_scope: EnumHookScope = EnumHookScope.AllConditioning,
    ) -> None:
        super().__init__(EnumHookType.TransformerOptions, hook_scope=hook_scope)
        self.transformers_dict = transformers_dict
        self._skip_adding = False

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Merge into `model_options`, or (HookedOnly) keep for the calls of the conditionings that carry the hook."""
        from comfy.patcher_extension import merge_nested_dicts

        if not self.should_register(model, model_options, target_dict, registered):
            return False
        self._skip_adding = self.hook_scope == EnumHookScope.AllConditioning
        place = "transformer_options" if self._skip_adding else "to_load_options"
        model_options[place] = merge_nested_dicts(model_options.get(place, {}), self.transformers_dict or {})
        registered.add(self)
        return True

    def on_apply_hooks(self, model: Any, transformer_options: dict[str, Any]) -> dict[str, Any]:
        """The options of one call, with this hook's entries."""
        from comfy.patcher_extension import merge_nested_dicts

        if self._skip_adding:
            return transformer_options
        return merge_nested_dicts(transformer_options, self.transformers_dict or {})


WrapperHook = TransformerOptionsHook  # the older name


class InjectionsHook(Hook):
    """`PatcherInjection`s of an attachment, applied while the hook holds."""

    def __init__(self, key: str | None = None, injections: list[Any] | None = None) -> None:
        super().__init__(EnumHookType.Injections)
        self.key = key
        self.injections = injections

    def add_hook_patches(
        self, model: Any, model_options: dict[str, Any], target_dict: dict[str, Any], registered: HookGroup
    ) -> bool:
        """Injections per conditioning do not exist, here as in ComfyUI."""
        raise NotImplementedError("InjectionsHook cannot be used on conditionings; use ModelPatcher.set_injections")


class HookGroup:
    """Hooks that hold together. Two groups are equal when the same hooks hold with equal settings."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []

    def __len__(self) -> int:
        return len(self.hooks)

    def _identity(self) -> frozenset[Any]:
        return frozenset(
            (id(hook.hook_ref), id(hook.hook_keyframe), getattr(hook, "_strength_model", None),
             getattr(hook, "_strength_clip", None))
            for hook in self.hooks
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookGroup) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def add(self, hook: Any) -> None:
        """Add a hook once."""
        if not self.contains(hook):
            self.hooks.append(hook)

    def remove(self, hook: Any) -> None:
        """Take a hook out."""
        self.hooks = [other for other in self.hooks if other != hook]

    def get_type(self, hook_type: EnumHookType) -> list[Any]:
        """The hooks of a type."""
        return [hook for hook in self.hooks if hook.hook_type == hook_type]

    def contains(self, hook: Any) -> bool:
        """Whether a hook, or a clone of it, is in the group."""
        return hook in self.hooks

    def is_subset_of(self, other: HookGroup) -> bool:
        """Whether all hooks are in `other` too."""
        return all(other.contains(hook) for hook in self.hooks)

    def new_with_common_hooks(self, other: HookGroup) -> HookGroup:
        """The hooks that both groups have, as they are in this one."""
        return _group(hook for hook in self.hooks if other.contains(hook))

    def clone(self) -> HookGroup:
        """A group of cloned hooks."""
        return _group(hook.clone() for hook in self.hooks)

    def clone_and_combine(self, other: HookGroup | None) -> HookGroup:
        """A group of the hooks of both."""
        combined = self.clone()
        for hook in other.clone().hooks if other is not None else ():
            combined.add(hook)
        return combined

    def set_keyframes_on_hooks(self, hook_kf: HookKeyframeGroup | None) -> None:
        """Give all hooks the same keyframes."""
        keyframes = HookKeyframeGroup() if hook_kf is None else hook_kf.clone()
        for hook in self.hooks:
            hook.hook_keyframe = keyframes

    def get_hooks_for_clip_schedule(self) -> list[tuple[tuple[float, float], list[tuple[Any, Any]]]]:
        """Parts of the progress in which text-encoder weights differ: [((start, end), [(hook, keyframe)])]."""
        scheduled = [hook for hook in self.get_type(EnumHookType.Weight) if not hook.hook_keyframe.is_empty()]
        constant = [hook for hook in self.get_type(EnumHookType.Weight) if hook.hook_keyframe.is_empty()]
        cuts = {0.0, 1.0}
        for hook in scheduled:
            cuts.update(keyframe.start_percent for keyframe in hook.hook_keyframe.keyframes)
        borders = sorted(cut for cut in cuts if 0.0 <= cut <= 1.0)
        parts = []
        for start, end in zip(borders, borders[1:]):
            active = [(hook, hook.hook_keyframe.keyframe_at(start)) for hook in scheduled]
            parts.append(((start, end), [*[(hook, None) for hook in constant], *active]))
        return parts

    def reset(self) -> None:
        """Reset all hooks."""
        for hook in self.hooks:
            hook.reset()

    @staticmethod
    def combine_all_hooks(hooks_list: list[HookGroup | None], require_count: int = 0) -> HookGroup | None:
        """All groups as one; None when fewer than `require_count` of them exist, the group itself for one."""
        groups = [group for group in hooks_list if group is not None]
        if not groups or len(groups) < require_count:
            return None
        combined = groups[0]
        for group in groups[1:]:
            combined = combined.clone_and_combine(group)
        return combined


def _group(hooks: Iterable[Any]) -> HookGroup:
    group = HookGroup()
    for hook in hooks:
        group.add(hook)
    return group


def create_transformer_options_from_hooks(
    model: Any, hooks: HookGroup | None, transformer_options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`transformer_options` with what the group's hooks add for one call."""
    options = {} if transformer_options is None else transformer_options
    for hook in hooks.get_type(EnumHookType.TransformerOptions) if hooks is not None else ():
        options = hook.on_apply_hooks(model, options)
    return options


def create_hook_lora(lora: dict[str, torch.Tensor], strength_model: float, strength_clip: float) -> HookGroup:
    """A group with one adapter."""
    hook = WeightHook(strength_model=strength_model, strength_clip=strength_clip)
    hook.weights = lora
    return _group([hook])


def create_hook_model_as_lora(
    weights_model: Any, weights_clip: Any, strength_model: float, strength_clip: float
) -> HookGroup:
    """A group that blends in the weights of another model."""
    hook = WeightHook(strength_model=strength_model, strength_clip=strength_clip)
    hook.need_weight_init = False
    hook.weights = weights_model
    hook.weights_clip = weights_clip
    return _group([hook])


def get_patch_weights_from_model(model: Any, discard_model_sampling: bool = True) -> dict[str, Any] | None:
    """The weights of a patcher as patches that replace a model's."""
    if model is None:
        return None
    patches = {
        key: ("model_as_lora", (weight[0][0] if isinstance(weight[0], tuple) else weight[0],))
        for key, weight in model.get_key_patches().items()
    }
    if discard_model_sampling:
        patches = {key: value for key, value in patches.items() if not key.startswith("model_sampling")}
    return patches


def load_hook_lora_for_models(
    model: Any, clip: Any, lora: dict[str, torch.Tensor], strength_model: float, strength_clip: float
) -> tuple[Any, Any, HookGroup]:
    """Clones of model and CLIP with the adapter registered as a hook, and its group; either object may be None."""
    import comfy.lora

    keys: dict[str, Any] = {}
    if model is not None:
        keys = comfy.lora.model_lora_keys_unet(model.model, keys)
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    patches = comfy.lora.load_lora(lora, keys)
    group = create_hook_lora(lora=lora, strength_model=strength_model, strength_clip=strength_clip)
    hook = group.hooks[0]
    new_model = new_clip = None
    if model is not None:
        new_model = model.clone()
        new_model.add_hook_patches(hook=hook, patches=patches, strength_patch=strength_model)
    if clip is not None:
        new_clip = clip.clone()
        new_clip.patcher.add_hook_patches(hook=hook, patches=patches, strength_patch=strength_clip)
    return new_model, new_clip, group
