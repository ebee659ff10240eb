"""Weights, patches and options that only some conditionings, or some steps, see (`comfy.hooks`).

Conditionings with different hook groups run as separate denoiser calls. Before each, `apply_hooks` gives the network
the weights of its group; `EnumHookMode.MaxSpeed` keeps the weights of every group that was seen.
"""

from __future__ import annotations

from typing import Any

import torch

import comfy.lora
import comfy.utils
from comfy import weight_files
from comfy.weights.patching import get_key_weight, string_to_seed
from comfy.weights.store import store_of


def _blends_model(value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == "model_as_lora"


class HooksMixin:
    """`ModelPatcher`'s hook methods."""

    model: Any
    model_options: dict[str, Any]

    def _init_hooks(self) -> None:
        from comfy.hooks import EnumHookMode

        self.hook_patches: dict[Any, dict[str, list[Any]]] = {}
        self.hook_patches_backup: dict[Any, dict[str, list[Any]]] | None = None
        self.hook_backup: dict[str, torch.Tensor] = {}
        self.cached_hook_patches: dict[Any, dict[str, torch.Tensor]] = {}
        self.current_hooks: Any = None
        self.forced_hooks: Any = None
        self.hook_mode = EnumHookMode.MaxSpeed

    def _clone_hooks(self, other: Any) -> None:
        other.hook_patches = {ref: {k: list(v) for k, v in keyed.items()} for ref, keyed in self.hook_patches.items()}
        other.current_hooks = self.current_hooks
        other.forced_hooks = self.forced_hooks.clone() if self.forced_hooks else self.forced_hooks
        other.hook_mode = self.hook_mode

    def set_hook_mode(self, hook_mode: Any) -> None:
        """MinVram computes a group's weights at each change, MaxSpeed keeps them."""
        self.hook_mode = hook_mode

    def prepare_state(self, timestep: torch.Tensor) -> None:
        """Called before each denoiser call with the current sigma."""
        self._call_callbacks("on_prepare_state", timestep)  # type: ignore[attr-defined]

    def restore_hook_patches(self) -> None:
        """Undo what `register_all_hook_patches` registered."""
        if self.hook_patches_backup is not None:
            self.hook_patches = self.hook_patches_backup
            self.hook_patches_backup = None

    def prepare_hook_patches_current_keyframe(
        self, t: torch.Tensor, hook_group: Any, model_options: dict[str, Any]
    ) -> None:
        """Move keyframes of the hooks on to sigma `t`; groups whose strength changed lose their kept weights."""
        current = t[0]
        reset = False
        for hook in hook_group.hooks:
            changed = hook.hook_keyframe.prepare_current_keyframe(
                curr_t=current, transformer_options=model_options["transformer_options"]
            )
            reset = reset or changed
            if changed:
                for group in [g for g in self.cached_hook_patches if g.contains(hook)]:
                    self.cached_hook_patches.pop(group)
        if reset:
            self.unpatch_hooks()

    def register_all_hook_patches(
        self,
        hooks: Any,
        target_dict: dict[str, Any],
        model_options: dict[str, Any] | None = None,
        registered: Any = None,
    ) -> None:
        """Let every weight hook add its patches to this patcher before sampling."""
        from comfy.hooks import EnumHookType, HookGroup

        registered = HookGroup() if registered is None else registered
        self.restore_hook_patches()
        self.hook_patches_backup = {ref: dict(keyed) for ref, keyed in self.hook_patches.items()}
        for hook in hooks.get_type(EnumHookType.Weight):
            hook.add_hook_patches(self, model_options, target_dict, registered)
        self._call_callbacks(  # type: ignore[attr-defined]
            "on_register_all_hook_patches", hooks, target_dict, model_options, registered
        )

    def add_hook_patches(
        self, hook: Any, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Add weight patches that hold while `hook` does; returns the targets that exist here."""
        existing = self.model.state_dict()
        keyed = self.hook_patches.setdefault(hook.hook_ref, {})
        taken = []
        for target, value in patches.items():
            key = target if isinstance(target, str) else target[0]
            offset = None if isinstance(target, str) else target[1]
            function = target[2] if not isinstance(target, str) and len(target) > 2 else None
            if key in existing:
                taken.append(target)
                keyed.setdefault(key, []).append((strength_patch, value, strength_model, offset, function))
        return taken

    def get_combined_hook_patches(self, hooks: Any) -> dict[str, list[Any]]:
        """All patches of a group with each hook's current strength."""
        combined: dict[str, list[Any]] = {}
        for hook in hooks.hooks if hooks is not None else ():
            for key, patches in self.hook_patches.get(hook.hook_ref, {}).items():
                scaled = [(patch[0] * hook.strength, *patch[1:]) for patch in patches]
                combined.setdefault(key, []).extend(scaled)
        return combined

    def apply_hooks(
        self, hooks: Any, transformer_options: dict[str, Any] | None = None, force_apply: bool = False
    ) -> dict[str, Any]:
        """Give the network the weights of `hooks`; returns the transformer options its hooks add."""
        from comfy.hooks import create_transformer_options_from_hooks

        if self.current_hooks != hooks or force_apply:
            self.patch_hooks(hooks)
        self._call_callbacks("on_apply_hooks", hooks)  # type: ignore[attr-defined]
        return create_transformer_options_from_hooks(self, hooks, transformer_options)

    def patch_hooks(self, hooks: Any) -> None:
        """Compute (or fetch) the weights of a group."""
        from comfy.hooks import EnumHookMode

        with self.use_ejected():  # type: ignore[attr-defined]
            self.unpatch_hooks()
            if hooks is not None:
                kept = self.cached_hook_patches.get(hooks)
                if kept is None:
                    combined = self.get_combined_hook_patches(hooks)
                    weight_files.check(weight_files.files_in(combined))
                    kept = {key: self._hooked_weight(key, patches) for key, patches in combined.items()}
                    if self.hook_mode == EnumHookMode.MaxSpeed:
                        self.cached_hook_patches[hooks] = kept
                for key in kept:
                    self.patch_cached_hook_weights(kept, key, None)
            self.current_hooks = hooks

    def _hooked_weight(self, key: str, patches: list[Any]) -> torch.Tensor:
        from comfy.float import stochastic_rounding

        _, _, convert = get_key_weight(self.model, key)
        store = store_of(self.model)
        weight = store.whole_value(key, self.calculate_weight)  # type: ignore[attr-defined]
        dtype = weight.dtype
        if (record := store.weight(key)).eight_bit is not None:  # it is quantised when it is used
            real, convert = weight, None
            dtype = torch.bfloat16 if record.source.dtype.itemsize == 1 else record.source.dtype
        else:
            real = convert(weight) if convert is not None else weight.to(torch.float32, copy=True)
        # a model that is blended in needs to know what it replaces
        originals = {key: [(real.clone(),)]} if any(_blends_model(patch[1]) for patch in patches) else None
        patched = comfy.lora.calculate_weight(patches, real, key, original_weights=originals)
        if convert is not None:
            owner = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
            patched = patched / owner.scale_weight.to(patched.device, patched.dtype)
        return store.part(key, stochastic_rounding(patched, dtype, seed=string_to_seed(key)))

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        """Let the network use a kept weight."""
        before = store_of(self.model).rewrite(key, cached_weights[key])
        self.hook_backup.setdefault(key, before)

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict[str, Any], key: str, original_weights: Any, memory_counter: Any
    ) -> None:
        """Compute one weight of a group and let the network use it."""
        if key in combined_patches:
            weight = self._hooked_weight(key, combined_patches[key])
            self.patch_cached_hook_weights({key: weight}, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        """Take a group's weights out of the network."""
        for key in list(self.hook_backup):
            if whitelist_keys_set is None or key in whitelist_keys_set:
                store_of(self.model).put_back(key, self.hook_backup.pop(key))
        self.current_hooks = None

    def clear_cached_hook_weights(self) -> None:
        """Forget kept weights of all groups."""
        self.cached_hook_patches.clear()

    def clean_hooks(self) -> None:
        """Back to the weights without hooks."""
        self.unpatch_hooks()
        self.clear_cached_hook_weights()
