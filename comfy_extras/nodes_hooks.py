"""Hooks: adapters and settings that hold for one conditioning, and for a part of sampling."""

from __future__ import annotations

import logging
from typing import Any

import comfy.hook_conds
import comfy.hooks
import comfy.sd
import comfy.utils
import folder_paths
from comfy.hook_keyframes import HookKeyframe, HookKeyframeGroup, InterpolationMethod
from comfy_nodes.fields import number, whole
from comfy_nodes.model_files import model_file_state, path_state, watches

HOOKS = "advanced/hooks"
CREATE, SCHEDULE, COMBINE = f"{HOOKS}/create", f"{HOOKS}/scheduling", f"{HOOKS}/combine"
SINGLE, PAIR = f"{HOOKS}/cond single", f"{HOOKS}/cond pair"
AREAS = ["default", "mask bounds"]
PROPERTIES = {"mask": ("MASK",), "hooks": ("HOOKS",), "timesteps": ("TIMESTEPS_RANGE",)}


def percent(default: float) -> tuple[Any, ...]:
    return number(default, 0.0, 1.0, 0.001)


def strength_range() -> tuple[Any, ...]:
    return number(1.0, -20.0, 20.0, 0.01)


def conditionings(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ("CONDITIONING",))


class _Node:
    EXPERIMENTAL = True
    RETURN_TYPES: tuple[str, ...] = ("HOOKS",)
    FUNCTION = "run"


# ---- conditionings ---------------------------------------------------------------------------------------------------


class PairConditioningSetProperties(_Node):
    NAMES: tuple[str, ...] = ("positive_NEW", "negative_NEW")

    @classmethod
    def INPUT_TYPES(cls):
        own = {"strength": number(1.0, 0.0, 10.0, 0.01), "set_cond_area": (AREAS,)}
        return {"required": {**conditionings(*cls.NAMES), **own}, "optional": dict(PROPERTIES)}

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES: tuple[str, ...] = ("positive", "negative")
    CATEGORY = PAIR

    def run(
        self,
        strength: float,
        set_cond_area: str,
        mask: Any = None,
        hooks: Any = None,
        timesteps: Any = None,
        **conds: Any,
    ):
        new = [conds[name] for name in self.NAMES]
        return tuple(comfy.hook_conds.set_conds_props(new, strength, set_cond_area, mask, hooks, timesteps))


class ConditioningSetProperties(PairConditioningSetProperties):
    NAMES = ("cond_NEW",)
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = RETURN_TYPES
    CATEGORY = SINGLE


class PairConditioningSetPropertiesAndCombine(PairConditioningSetProperties):
    NAMES = ("positive", "negative", "positive_NEW", "negative_NEW")

    def run(
        self,
        strength: float,
        set_cond_area: str,
        mask: Any = None,
        hooks: Any = None,
        timesteps: Any = None,
        **conds: Any,
    ):
        given = [conds[name] for name in self.NAMES]
        half = len(given) // 2
        return tuple(
            comfy.hook_conds.set_conds_props_and_combine(
                given[:half], given[half:], strength, set_cond_area, mask, hooks, timesteps
            )
        )


class ConditioningSetPropertiesAndCombine(PairConditioningSetPropertiesAndCombine):
    NAMES = ("cond", "cond_NEW")
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = RETURN_TYPES
    CATEGORY = SINGLE


class PairConditioningSetDefaultCombine(_Node):
    NAMES: tuple[str, ...] = ("positive", "negative", "positive_DEFAULT", "negative_DEFAULT")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": conditionings(*cls.NAMES), "optional": {"hooks": ("HOOKS",)}}

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES: tuple[str, ...] = ("positive", "negative")
    CATEGORY = PAIR

    def run(self, hooks: Any = None, **conds: Any):
        given = [conds[name] for name in self.NAMES]
        half = len(given) // 2
        return tuple(comfy.hook_conds.set_default_conds_and_combine(given[:half], given[half:], hooks))


class ConditioningSetDefaultCombine(PairConditioningSetDefaultCombine):
    NAMES = ("cond", "cond_DEFAULT")
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = RETURN_TYPES
    CATEGORY = SINGLE


class PairConditioningCombine(_Node):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": conditionings("positive_A", "negative_A", "positive_B", "negative_B")}

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    CATEGORY = PAIR

    def run(self, positive_A: Any, negative_A: Any, positive_B: Any, negative_B: Any):  # noqa: N803
        return tuple(comfy.hook_conds.combine_with_new_conds([positive_A, negative_A], [positive_B, negative_B]))


class SetClipHooks(_Node):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "clip": ("CLIP",),
                "apply_to_conds": ("BOOLEAN", {"default": True}),
                "schedule_clip": ("BOOLEAN", {"default": False}),
            },
            "optional": {"hooks": ("HOOKS",)},
        }

    RETURN_TYPES = ("CLIP",)
    CATEGORY = f"{HOOKS}/clip"

    def run(self, clip: Any, apply_to_conds: bool, schedule_clip: bool, hooks: Any = None):
        """Encode with the hooks' adapters; over their keyframes if `schedule_clip`, else at full strength."""
        if hooks is None:
            return (clip,)
        clip = clip.clone()
        if apply_to_conds:
            clip.apply_hooks_to_conds = hooks
        clip.use_clip_schedule = schedule_clip
        clip.patcher.forced_hooks = hooks.clone()
        if not schedule_clip:
            clip.patcher.forced_hooks.set_keyframes_on_hooks(None)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
        clip.patcher.register_all_hook_patches(hooks, target)
        return (clip,)

    apply_hooks = run


class ConditioningTimestepsRange(_Node):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"start_percent": percent(0.0), "end_percent": percent(1.0)}}

    RETURN_TYPES = ("TIMESTEPS_RANGE", "TIMESTEPS_RANGE", "TIMESTEPS_RANGE")
    RETURN_NAMES = ("TIMESTEPS_RANGE", "BEFORE_RANGE", "AFTER_RANGE")
    CATEGORY = HOOKS

    def run(self, start_percent: float, end_percent: float):
        return ((start_percent, end_percent), (0.0, start_percent), (end_percent, 1.0))


# ---- making hooks ----------------------------------------------------------------------------------------------------


def joined(new: Any, before: Any):
    return (new if before is None else before.clone_and_combine(new),)


def _hook_states(cls: Any, **inputs: Any) -> list[Any]:
    return [model_file_state(cls.KIND, inputs.get(cls.NAME))]


@watches(_hook_states)
class CreateHookLora(_Node):
    KIND, NAME = "loras", "lora_name"
    WITH_CLIP = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {cls.NAME: (folder_paths.get_filename_list(cls.KIND),), "strength_model": strength_range()}
        if cls.WITH_CLIP:
            required["strength_clip"] = strength_range()
        return {"required": required, "optional": {"prev_hooks": ("HOOKS",)}}

    CATEGORY = CREATE

    def __init__(self) -> None:
        self.loaded: tuple[str, Any, Any] | None = None

    def weights(self, path: str) -> Any:
        """The file's weights, kept for the next run."""
        state = path_state(path)
        if self.loaded is None or self.loaded[:2] != (path, state):
            self.loaded = (path, state, self.load(path))
        return self.loaded[2]

    def load(self, path: str) -> Any:
        return comfy.utils.load_torch_file(path, safe_load=True)

    def hook(self, content: Any, strength_model: float, strength_clip: float) -> Any:
        return comfy.hooks.create_hook_lora(content, strength_model, strength_clip)

    def run(self, strength_model: float, strength_clip: float = 0.0, prev_hooks: Any = None, **named: str):
        if strength_model == 0 and strength_clip == 0:
            return (comfy.hooks.HookGroup() if prev_hooks is None else prev_hooks,)
        path = folder_paths.get_full_path_or_raise(self.KIND, named[self.NAME])
        return joined(self.hook(self.weights(path), strength_model, strength_clip), prev_hooks)


class CreateHookLoraModelOnly(CreateHookLora):
    WITH_CLIP = False


class CreateHookModelAsLora(CreateHookLora):
    KIND, NAME = "checkpoints", "ckpt_name"

    def load(self, path: str) -> Any:
        """Weights of model and text encoder, to be blended in."""
        model, clip = comfy.sd.load_checkpoint_guess_config(
            path,
            output_vae=False,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
        )[:2]
        patches = comfy.hooks.get_patch_weights_from_model
        return patches(model), patches(None if clip is None else clip.patcher)

    def hook(self, content: Any, strength_model: float, strength_clip: float) -> Any:
        return comfy.hooks.create_hook_model_as_lora(*content, strength_model, strength_clip)


class CreateHookModelAsLoraModelOnly(CreateHookModelAsLora):
    WITH_CLIP = False


# ---- keyframes -------------------------------------------------------------------------------------------------------


class SetHookKeyframes(_Node):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"hooks": ("HOOKS",)}, "optional": {"hook_kf": ("HOOK_KEYFRAMES",)}}

    CATEGORY = SCHEDULE

    def run(self, hooks: Any, hook_kf: Any = None):
        if hook_kf is not None:
            hooks = hooks.clone()
            hooks.set_keyframes_on_hooks(hook_kf)
        return (hooks,)


class _Keyframes(_Node):
    RETURN_TYPES = ("HOOK_KEYFRAMES",)
    RETURN_NAMES = ("HOOK_KF",)
    CATEGORY = SCHEDULE
    BEFORE = {"prev_hook_kf": ("HOOK_KEYFRAMES",)}

    @staticmethod
    def grown(before: Any, strengths: Any, percents: Any, show: bool = False):
        """A copy of `before` with more keyframes; only the first new one is sure to get a step."""
        group = HookKeyframeGroup() if before is None else before.clone()
        for position, (strength, start) in enumerate(zip(strengths, percents)):
            group.add(HookKeyframe(float(strength), float(start), guarantee_steps=int(position == 0)))
            if show:
                logging.info("Hook Keyframe - start_percent:%s = %s", float(start), float(strength))
        return (group,)


class CreateHookKeyframe(_Keyframes):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"strength_mult": strength_range(), "start_percent": percent(0.0)},
            "optional": cls.BEFORE,
        }

    def run(self, strength_mult: float, start_percent: float, prev_hook_kf: Any = None):
        return self.grown(prev_hook_kf, [strength_mult], [start_percent])


class CreateHookKeyframesInterpolated(_Keyframes):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "strength_start": number(1.0, 0.0, 10.0, 0.001),
                "strength_end": number(1.0, 0.0, 10.0, 0.001),
                "interpolation": (InterpolationMethod._LIST,),
                "start_percent": percent(0.0),
                "end_percent": percent(1.0),
                "keyframes_count": whole(5, 2, 100, 1),
                "print_keyframes": ("BOOLEAN", {"default": False}),
            },
            "optional": cls.BEFORE,
        }

    def run(
        self,
        strength_start: float,
        strength_end: float,
        interpolation: str,
        start_percent: float,
        end_percent: float,
        keyframes_count: int,
        print_keyframes: bool = False,
        prev_hook_kf: Any = None,
    ):
        curve = InterpolationMethod.get_weights
        strengths = curve(strength_start, strength_end, keyframes_count, interpolation)
        percents = curve(start_percent, end_percent, keyframes_count, InterpolationMethod.LINEAR)
        return self.grown(prev_hook_kf, strengths, percents, print_keyframes)


class CreateHookKeyframesFromFloats(_Keyframes):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "floats_strength": ("FLOATS", {"default": -1, "min": -1, "step": 0.001, "forceInput": True}),
                "start_percent": percent(0.0),
                "end_percent": percent(1.0),
                "print_keyframes": ("BOOLEAN", {"default": False}),
            },
            "optional": cls.BEFORE,
        }

    def run(
        self,
        floats_strength: Any,
        start_percent: float,
        end_percent: float,
        print_keyframes: bool = False,
        prev_hook_kf: Any = None,
    ):
        strengths = [floats_strength] if isinstance(floats_strength, int | float) else list(floats_strength)
        percents = InterpolationMethod.get_weights(start_percent, end_percent, len(strengths), "linear")
        return self.grown(prev_hook_kf, strengths, percents, print_keyframes)


# ---- combining -------------------------------------------------------------------------------------------------------


def combiner(count: int) -> type[Any]:
    """A node that joins up to `count` groups."""
    names = [f"hooks_{letter}" for letter in "ABCDEFGH"[:count]]

    class CombineHooks(_Node):
        CATEGORY = COMBINE

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}, "optional": dict.fromkeys(names, ("HOOKS",))}

        def run(self, **groups: Any):
            return (comfy.hooks.HookGroup.combine_all_hooks([groups.get(name) for name in names]),)

    CombineHooks.__name__ = CombineHooks.__qualname__ = f"CombineHooks{count}"
    return CombineHooks


_TITLES: dict[type[Any], str] = {
    CreateHookLora: "Create Hook LoRA",
    CreateHookLoraModelOnly: "Create Hook LoRA (MO)",
    CreateHookModelAsLora: "Create Hook Model as LoRA",
    CreateHookModelAsLoraModelOnly: "Create Hook Model as LoRA (MO)",
    SetHookKeyframes: "Set Hook Keyframes",
    CreateHookKeyframe: "Create Hook Keyframe",
    CreateHookKeyframesInterpolated: "Create Hook Keyframes Interp.",
    CreateHookKeyframesFromFloats: "Create Hook Keyframes From Floats",
    **{combiner(count): f"Combine Hooks [{count}]" for count in (2, 4, 8)},
    ConditioningSetProperties: "Cond Set Props",
    ConditioningSetPropertiesAndCombine: "Cond Set Props Combine",
    PairConditioningSetProperties: "Cond Pair Set Props",
    PairConditioningSetPropertiesAndCombine: "Cond Pair Set Props Combine",
    ConditioningSetDefaultCombine: "Cond Set Default Combine",
    PairConditioningSetDefaultCombine: "Cond Pair Set Default Combine",
    PairConditioningCombine: "Cond Pair Combine",
    SetClipHooks: "Set CLIP Hooks",
    ConditioningTimestepsRange: "Timesteps Range",
}
NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in _TITLES}
NODE_DISPLAY_NAME_MAPPINGS = {cls.__name__: title for cls, title in _TITLES.items()}
