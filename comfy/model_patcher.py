"""A model with everything that may be changed about it without changing it: patches, options, placement.

A `ModelPatcher` is cheap to clone. The network is shared by all clones; the weights it holds at a time are those of one
of them. Where weights are and with which patches they were made is known to the network's `WeightStore`
(`comfy.weights.store`), and so is which attributes are replaced: changing from one clone to another changes only what
differs between them.
"""

from __future__ import annotations

import collections
import copy
import uuid
from collections.abc import Callable
from typing import Any

import torch

import comfy.lora
import comfy.model_management
import comfy.utils
from comfy.float import stochastic_rounding
from comfy.model_patcher_extensions import ExtensionsMixin
from comfy.model_patcher_hooks import HooksMixin
from comfy.model_patcher_options import (
    OptionsMixin,
    create_model_options_clone,
    set_model_options_patch_replace,
    set_model_options_post_cfg_function,
    set_model_options_pre_cfg_function,
)
from comfy.patcher_extension import PatcherInjection
from comfy.weights.patching import LowVramPatch, get_key_weight, real_value, string_to_seed, wipe_lowvram_weight
from comfy.weights.store import WeightStore, store_of

__all__ = [
    "PatcherInjection",
    "CoreModelPatcher", "LowVramPatch", "ModelPatcher", "create_model_options_clone", "get_key_weight",
    "set_model_options_patch_replace", "set_model_options_post_cfg_function", "set_model_options_pre_cfg_function",
    "string_to_seed", "wipe_lowvram_weight",
]  # fmt: skip

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])


def _prepare_network(model: Any) -> None:
    """Give a network the attributes in which its current state is kept, under ComfyUI's names."""
    defaults: dict[str, Any] = {
        "weight_backups": {},
        "object_originals": {},
        "model_loaded_weight_memory": 0,
        "lowvram_patch_counter": 0,
        "model_lowvram": False,
        "current_weight_patches_uuid": None,
    }
    for name, value in defaults.items():
        if not hasattr(model, name):
            setattr(model, name, value)
    if not hasattr(model, "device"):
        model.device = next((p.device for p in getattr(model, "parameters", list)()), torch.device("cpu"))


class ModelPatcher(OptionsMixin, ExtensionsMixin, HooksMixin):
    """A network (`model`), where it computes and waits, and the changes this clone makes to it."""

    def __init__(
        self,
        model: Any,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        self.size = size
        self.model = model
        _prepare_network(model)
        self.load_device = torch.device(load_device)
        self.offload_device = torch.device(offload_device)
        self.weight_inplace_update = weight_inplace_update
        self.force_cast_weights = False
        # The class whose `evaluate_batches` and `denoiser_memory_budget` count, and its settings. Clones of every class
        # keep them: packs make clones of classes of their own.
        self.evaluator: type[ModelPatcher] | None = None
        self.taco_parallel: Any = None
        self.patches: dict[str, list[Any]] = {}
        self.object_patches: dict[str, Any] = {}
        self.weight_wrapper_patches: dict[str, list[Any]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches_uuid = uuid.uuid4()
        self.parent: ModelPatcher | None = None
        self._init_extensions()
        self._init_hooks()

    @property
    def weight_store(self) -> WeightStore:
        """Where the network's weights are."""
        return store_of(self.model)

    @property
    def backup(self) -> dict[str, Backup]:
        """Originals of the weights that are patched now."""
        return self.model.weight_backups

    @property
    def object_patches_backup(self) -> dict[str, Any]:
        """Originals of the attributes that are replaced now, by whichever clone."""
        return self.model.object_originals

    # --- identity and size -----------------------------------------------------------------------------------------

    def model_size(self) -> int:
        """Bytes on the device of all weights, or of those parts of them that this process is to hold."""
        saving = self.weight_store.saving(self.load_device)
        if self.weight_store.holds_parts:
            return self.weight_store.held_bytes() - saving
        if self.size <= 0:
            self.size = self.weight_store.size()
        return self.size - saving

    def get_ram_usage(self) -> int:
        """Bytes of host memory the weights take at most."""
        return self.model_size()

    def loaded_size(self) -> int:
        """Bytes of weights on the load device."""
        return self.weight_store.loaded_bytes

    def lowvram_patch_counter(self) -> int:
        """How many weights are patched at each use."""
        return self.weight_store.patched_at_use

    def clone(self) -> ModelPatcher:
        """Another patcher of the same network, with copies of all settings."""
        other = self.__class__(
            self.model, self.load_device, self.offload_device, self.size,
            weight_inplace_update=self.weight_inplace_update,
        )  # fmt: skip
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.patches_uuid = self.patches_uuid
        other.object_patches = dict(self.object_patches)
        other.weight_wrapper_patches = {key: list(w) for key, w in self.weight_wrapper_patches.items()}
        other.model_options = create_model_options_clone(self.model_options)
        other.force_cast_weights = self.force_cast_weights
        other.evaluator, other.taco_parallel = self.evaluator, self.taco_parallel
        other.parent = self
        self._clone_extensions(other)
        self._clone_hooks(other)
        self._call_callbacks("on_clone", other)
        return other

    def is_clone(self, other: Any) -> bool:
        """Whether `other` patches the same network."""
        return hasattr(other, "model") and self.model is other.model

    def clone_has_same_weights(self, clone: ModelPatcher) -> bool:
        """Whether a clone asks for exactly the same weights."""
        if (
            not self.is_clone(clone)
            or self.current_hooks != clone.current_hooks
            or self.forced_hooks
            or clone.forced_hooks
        ):
            return False
        return self.patches_uuid == clone.patches_uuid and self.weight_wrapper_patches == clone.weight_wrapper_patches

    def memory_required(self, input_shape: Any) -> float:
        """Bytes of activations for an input of this shape."""
        return self.model.memory_required(input_shape=input_shape)

    def model_dtype(self) -> torch.dtype | None:
        """The network's own idea of its dtype, if it has one."""
        return self.model.get_dtype() if hasattr(self.model, "get_dtype") else None

    def current_loaded_device(self) -> torch.device:
        """Where the weights are now."""
        return self.model.device

    def is_dynamic(self) -> bool:
        """Newer ComfyUI's question whether weights are paged in on demand; they are not."""
        return False

    # --- patches ---------------------------------------------------------------------------------------------------

    def add_object_patch(self, name: str, obj: Any) -> None:
        """Replace the attribute at a dotted path while the model is loaded."""
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        """The attribute at a dotted path as this clone would have it."""
        if name in self.object_patches:
            return self.object_patches[name]
        if name in self.object_patches_backup:
            return self.object_patches_backup[name]
        for patched in self.object_patches:
            if name.startswith(patched + "."):
                return comfy.utils.get_attr(self.object_patches[patched], name[len(patched) + 1 :])
        return comfy.utils.get_attr(self.model, name)

    def add_weight_wrapper(self, name: str, function: Callable[..., Any]) -> None:
        """Pass a weight through `function(weight)` each time it is used."""
        self.weight_wrapper_patches[name] = [*self.weight_wrapper_patches.get(name, []), function]
        self.patches_uuid = uuid.uuid4()

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        """Add weight patches `{key or (key, offset[, function]): value}`; returns the targets that exist here."""
        existing = self.model.state_dict()
        taken = []
        for target, value in patches.items():
            offset = function = None
            key = target
            if not isinstance(target, str):
                key, offset = target[0], target[1]
                function = target[2] if len(target) > 2 else None
            if key in existing:
                taken.append(target)
                entry = (strength_patch, value, strength_model, offset, function)
                self.patches.setdefault(key, []).append(entry)
        self.patches_uuid = uuid.uuid4()
        return taken

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        """`{key: [(original weight, convert), *patches]}` for merging models."""
        out = {}
        for key in self.model_state_dict():
            if filter_prefix is not None and not key.startswith(filter_prefix):
                continue
            _, _, convert = get_key_weight(self.model, key)
            weight = self.weight_store.source(key)
            convert = convert or (lambda tensor, **_: tensor)
            out[key] = [(weight, convert), *self.patches.get(key, [])]
        return out

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """The network's weights, below a prefix if one is given."""
        weights = self.model.state_dict()
        if filter_prefix is None:
            return weights
        return {key: value for key, value in weights.items() if key.startswith(filter_prefix)}

    def model_patches_to(self, device: Any) -> None:
        """Move patches that hold tensors (attention patches, wrappers) to a device or dtype."""
        options = self.model_options["transformer_options"]
        for name, functions in options.get("patches", {}).items():
            for i, function in enumerate(functions):
                if hasattr(function, "to"):
                    options["patches"][name][i] = function.to(device)
        for kind in options.get("patches_replace", {}).values():
            for place, function in kind.items():
                if hasattr(function, "to"):
                    kind[place] = function.to(device)
        wrapper = self.model_options.get("model_function_wrapper")
        if wrapper is not None and hasattr(wrapper, "to"):
            self.model_options["model_function_wrapper"] = wrapper.to(device)

    def model_patches_models(self) -> list[Any]:
        """Models that patches bring along and that must be loaded too."""
        options = self.model_options["transformer_options"]
        functions = [f for fs in options.get("patches", {}).values() for f in fs]
        functions += [f for kind in options.get("patches_replace", {}).values() for f in kind.values()]
        functions.append(self.model_options.get("model_function_wrapper"))
        return [model for f in functions if hasattr(f, "models") for model in f.models()]

    def calculate_weight(
        self, patches: list[Any], weight: torch.Tensor, key: str, intermediate_dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weight with patches applied; custom nodes override or replace this."""
        return comfy.lora.calculate_weight(patches, weight, key, intermediate_dtype=intermediate_dtype)

    # --- weights and attributes in place ---------------------------------------------------------------------------

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
    ) -> Any:
        """Compute a weight's patched value on `device_to` and let the network use it, or return it."""
        if key not in self.patches:
            return None
        source = self.weight_store.source(key)
        device = torch.device(device_to) if device_to is not None else source.device
        if not return_weight:
            self.weight_store.patch_one(key, self.patches[key], device, self.calculate_weight)
            self._note_backups()
            return None
        real = self.calculate_weight(self.patches[key], real_value(self.model, key, source.to(device)), key)
        if get_key_weight(self.model, key)[1] is not None:
            return real
        return stochastic_rounding(real, source.dtype, seed=string_to_seed(key))

    def _patches_by_itself(self) -> Callable[[str], Any] | None:
        """The `patch_weight_to_device` of a subclass or instance that has one of its own, for the store to call."""
        own = "patch_weight_to_device" in vars(self)
        if not own and type(self).patch_weight_to_device is ModelPatcher.patch_weight_to_device:
            return None
        return lambda key: self.patch_weight_to_device(key, self.weight_store.device)

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Bring patched weights to `device_to`, up to `lowvram_model_memory` bytes unless that is 0.

        Modules beyond the budget that can cast their weights at use keep them in host memory, unpatched; with
        `force_patch_weights` they are patched there, so that `state_dict` has patched weights only. Does nothing about
        weights that are in place.
        """
        self.unpatch_hooks()
        device = torch.device(device_to) if device_to is not None else self.model.device
        self.weight_store.place(
            device,
            self.patches,
            self.calculate_weight,
            budget=lowvram_model_memory if lowvram_model_memory > 0 and not full_load else None,
            wrappers=self.weight_wrapper_patches,
            patch_host=force_patch_weights,
            foreign=self._patches_by_itself(),
        )
        self.model.device = device
        self.model.current_weight_patches_uuid = self.patches_uuid
        self._note_state()
        self._call_callbacks("on_load_after", device_to, lowvram_model_memory, force_patch_weights, full_load)
        if self.forced_hooks is not None:
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def _note_state(self) -> None:
        """Tell under ComfyUI's names what the store knows."""
        self.model.model_lowvram = self.weight_store.partly_loaded
        self.model.lowvram_patch_counter = self.weight_store.patched_at_use
        self.model.model_loaded_weight_memory = self.weight_store.loaded_bytes
        self._note_backups()

    def _note_backups(self) -> None:
        self.backup.clear()
        self.backup.update({key: Backup(source, False) for key, source in self.weight_store.patched_keys().items()})

    def _set_objects(self, wanted: dict[str, Any]) -> None:
        """Replace exactly the attributes at these dotted paths; others that a clone replaced are as they were."""
        originals = self.object_patches_backup
        for name in [name for name in reversed(originals) if name not in wanted]:
            comfy.utils.set_attr(self.model, name, originals.pop(name))
        for name, value in wanted.items():
            if comfy.utils.get_attr(self.model, name) is not value:
                previous = comfy.utils.set_attr(self.model, name, value)
                originals.setdefault(name, previous)

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> Any:
        """Replace attributes as this clone wants and, with `load_weights`, load patched weights. Returns the network."""
        with self.use_ejected():
            self._set_objects(self.object_patches)
            if load_weights:
                # by name: packs' `load` passes some of these on and sets others
                self.load(
                    device_to, lowvram_model_memory=lowvram_model_memory, force_patch_weights=force_patch_weights,
                    full_load=lowvram_model_memory == 0,
                )  # fmt: skip
        self.inject_model()
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Undo `patch_model`: originals back in place, device copies dropped."""
        self.eject_model()
        if unpatch_weights:
            self.unpatch_hooks()
            self.weight_store.unload()
            self.model.current_weight_patches_uuid = None
            self.model.device = torch.device(device_to) if device_to is not None else self.offload_device
            self._note_state()
        self._set_objects({})

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int:
        """Let the largest modules go back to host memory until `memory_to_free` bytes are free; returns how many."""
        with self.use_ejected():
            self.unpatch_hooks()
            freed = self.weight_store.free(memory_to_free)
            self._note_state()
        return freed

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Load up to `extra_memory` further bytes; returns how many were loaded."""
        before = self.loaded_size()
        same = self.model.current_weight_patches_uuid == self.patches_uuid
        if before >= self.model_size() and same and self.weight_store.as_wanted(force_patch_weights):
            return 0
        self.patch_model(device_to, max(1, before + int(extra_memory)), force_patch_weights=force_patch_weights)
        return self.loaded_size() - before

    def detach(self, unpatch_all: bool = True) -> Any:
        """Take the model off its device."""
        self.eject_model()
        self.model_patches_to(self.offload_device)
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        self._call_callbacks("on_detach_after", unpatch_all)
        return self.model

    # --- evaluation ------------------------------------------------------------------------------------------------

    def evaluate_batches(self, model: Any, batches: list[Any], model_options: dict[str, Any]) -> list[torch.Tensor]:
        """Evaluate the batches of one denoiser call; parallel patchers spread them over ranks."""
        from comfy.denoiser_batch import evaluate_serially

        if self.evaluator is not None:
            return self.evaluator.evaluate_batches(self, model, batches, model_options)
        return evaluate_serially(model, batches, model_options)

    def denoiser_memory_budget(self, device: torch.device) -> int:
        """Bytes available to the batches of one denoiser call."""
        if self.evaluator is not None:
            return self.evaluator.denoiser_memory_budget(self, device)
        return comfy.model_management.get_free_memory(device)

    def pre_run(self) -> None:
        """Called once before sampling."""
        self.model.current_patcher = self
        self._call_callbacks("on_pre_run")

    def cleanup(self) -> None:
        """Called once after sampling."""
        self.clean_hooks()
        if hasattr(self.model, "current_patcher"):
            self.model.current_patcher = None
        self._call_callbacks("on_cleanup")

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPatcher:
        other = copy.copy(self)
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name not in ("model", "parent"):
                setattr(other, name, copy.deepcopy(value, memo))
        other.model = copy.deepcopy(self.model, memo)
        return other


CoreModelPatcher = ModelPatcher
