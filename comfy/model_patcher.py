"""A model with everything that may be changed about it without changing it: patches, options, placement.

A `ModelPatcher` is cheap to clone. The network is shared by all clones; the weights it holds at a time are those of one
of them. Original weights stay where they were loaded (usually memory-mapped pages of the file, shared by all ranks of
a host): a network's `host_weights`. Loading makes device copies and patched copies; unloading drops them, so nothing
is ever copied back.
"""

from __future__ import annotations

import collections
import copy
import itertools
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

__all__ = [
    "PatcherInjection",
    "CoreModelPatcher", "LowVramPatch", "ModelPatcher", "create_model_options_clone", "get_key_weight",
    "set_model_options_patch_replace", "set_model_options_post_cfg_function", "set_model_options_pre_cfg_function",
    "string_to_seed", "wipe_lowvram_weight",
]  # fmt: skip

_weights_versions = itertools.count(1)

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])


def string_to_seed(data: str) -> int:
    """A number for a weight's name, the same on every rank (CRC-32, unlike Python's salted hash)."""
    import zlib

    return zlib.crc32(data.encode("utf-8"))


def get_key_weight(model: Any, key: str) -> tuple[torch.Tensor, Any, Any]:
    """(weight, its layer's `set_weight` or None, its `convert_weight` or None) at a dotted path."""
    owner_path, _, name = key.rpartition(".")
    owner = comfy.utils.get_attr(model, owner_path) if owner_path else model
    weight = getattr(owner, name)
    if name != "weight":
        return weight, None, None
    return weight, getattr(owner, "set_weight", None), getattr(owner, "convert_weight", None)


class LowVramPatch:
    """Applies a weight's patches each time the weight is brought to the device."""

    def __init__(self, key: str, patches: dict[str, list[Any]]) -> None:
        self.key = key
        self.patches = patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if weight.element_size() < 4 else weight.dtype
        patched = comfy.lora.calculate_weight(self.patches[self.key], weight.to(dtype), self.key, dtype)
        return patched.to(weight.dtype)


def wipe_lowvram_weight(layer: Any) -> None:
    """Undo what partial loading changed about a layer."""
    if hasattr(layer, "prev_comfy_cast_weights"):
        layer.comfy_cast_weights = layer.prev_comfy_cast_weights
        del layer.prev_comfy_cast_weights
    for name in ("weight_function", "bias_function"):
        if hasattr(layer, name):
            setattr(layer, name, [f for f in getattr(layer, name) if not isinstance(f, LowVramPatch)])


def _prepare_network(model: Any) -> None:
    """Give a network the attributes in which its current state is kept."""
    defaults: dict[str, Any] = {
        "host_weights": {},
        "weight_backups": {},
        "model_loaded_weight_memory": 0,
        "lowvram_patch_counter": 0,
        "model_lowvram": False,
        "current_weight_patches_uuid": None,
        "weights_version": next(_weights_versions),
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
        self.patches: dict[str, list[Any]] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.weight_wrapper_patches: dict[str, list[Any]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches_uuid = uuid.uuid4()
        self.parent: ModelPatcher | None = None
        self._init_extensions()
        self._init_hooks()

    @property
    def backup(self) -> dict[str, Backup]:
        """Originals of the weights that are patched now."""
        return self.model.weight_backups

    # --- identity and size -----------------------------------------------------------------------------------------

    def model_size(self) -> int:
        """Bytes of all weights."""
        if self.size <= 0:
            self.size = comfy.model_management.module_size(self.model)
        return self.size

    def get_ram_usage(self) -> int:
        """Bytes of host memory the weights take at most."""
        return self.model_size()

    def loaded_size(self) -> int:
        """Bytes of weights on the load device."""
        return self.model.model_loaded_weight_memory

    def lowvram_patch_counter(self) -> int:
        """How many weights are patched at each use."""
        return self.model.lowvram_patch_counter

    def clone(self) -> ModelPatcher:
        """Another patcher of the same network, with copies of all settings."""
        other = self.__class__(
            self.model, self.load_device, self.offload_device, self.model_size(),
            weight_inplace_update=self.weight_inplace_update,
        )  # fmt: skip
        other.patches = {key: list(patches) for key, patches in self.patches.items()}
        other.patches_uuid = self.patches_uuid
        other.object_patches = dict(self.object_patches)
        other.object_patches_backup = self.object_patches_backup
        other.weight_wrapper_patches = {key: list(w) for key, w in self.weight_wrapper_patches.items()}
        other.model_options = create_model_options_clone(self.model_options)
        other.force_cast_weights = self.force_cast_weights
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
            weight, _, convert = get_key_weight(self.model, key)
            if key in self.backup:
                weight = self.backup[key].weight
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
        if hasattr(wrapper, "to"):
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

    # --- weights: host, device, patched ----------------------------------------------------------------------------

    def _host_weight(self, key: str) -> torch.Tensor:
        """The original of a weight. A weight somebody replaced in place of ours becomes the new original."""
        homes = self.model.host_weights
        current = comfy.utils.get_attr(self.model, key)
        known = homes.get(key)
        if known is None or (current is not known[0] and current is not known[1]):
            homes[key] = (current, current)
            return current
        return known[0]

    def _weights_moved(self) -> None:
        """Note that weights are no longer where they were; versions are never used twice in a process, so that whoever
        remembers one (a captured graph) cannot mistake another network for its own."""
        self.model.weights_version = next(_weights_versions)

    def _place_weight(self, key: str, value: torch.Tensor) -> None:
        """Let the network use `value` for a weight, remembering the original."""
        self._weights_moved()
        original = self._host_weight(key)
        if not isinstance(value, torch.nn.Parameter) and isinstance(original, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        comfy.utils.set_attr(self.model, key, value)
        self.model.host_weights[key] = (original, value)

    def _restore_weight(self, key: str) -> None:
        known = self.model.host_weights.get(key)
        self._weights_moved()
        if known is not None and comfy.utils.get_attr(self.model, key) is known[1]:
            comfy.utils.set_attr(self.model, key, known[0])
            self.model.host_weights[key] = (known[0], known[0])
        self.backup.pop(key, None)

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False, return_weight: bool = False
    ) -> Any:
        """Compute a weight's patched value on `device_to` and let the network use it."""
        if key not in self.patches:
            return None
        original = self._host_weight(key)
        _, set_weight, convert = get_key_weight(self.model, key)
        device = device_to or original.device
        self.backup.setdefault(key, Backup(original, False))
        moved = original.to(device, copy=True)
        real = convert(moved, inplace=True) if convert is not None else moved.to(torch.float32)
        patched = self.calculate_weight(self.patches[key], real, key)
        if set_weight is not None:
            if return_weight:
                return patched
            set_weight(patched, inplace_update=False, seed=string_to_seed(key))
            placed = comfy.utils.get_attr(self.model, key)
            comfy.utils.set_attr(self.model, key, original)
            self._place_weight(key, placed)
            return None
        rounded = stochastic_rounding(patched, original.dtype, seed=string_to_seed(key))
        if return_weight:
            return rounded
        self._place_weight(key, rounded)
        return None

    def _load_list(self) -> list[tuple[int, str, torch.nn.Module, list[str]]]:
        """(bytes, module path, module, its weight names) of every module that has weights, largest first."""
        out = []
        for path, module in self.model.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            names += [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if names:
                size = sum(getattr(module, n).nelement() * getattr(module, n).element_size() for n in names)
                out.append((size, path, module, names))
        return sorted(out, key=lambda entry: (-entry[0], entry[1]))

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Bring patched weights to `device_to`, up to `lowvram_model_memory` bytes unless that is 0.

        Modules beyond the budget that can cast their weights at use keep them in host memory.
        """
        self.unpatch_hooks()
        device = torch.device(device_to) if device_to is not None else self.model.device
        loaded = lowvram_count = patched_at_use = 0
        limited = lowvram_model_memory > 0 and not full_load
        for size, path, module, names in self._load_list():
            keys = [f"{path}.{name}" if path else name for name in names]
            stays = limited and loaded + size > lowvram_model_memory and hasattr(module, "comfy_cast_weights")
            wipe_lowvram_weight(module)
            if stays:
                lowvram_count += 1
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
                patched_at_use += self._patch_at_use(module, keys)
                continue
            for key in keys:
                if key in self.patches:
                    self.patch_weight_to_device(key, device)
                else:
                    original = self._host_weight(key)
                    if original.device != device:
                        self._place_weight(key, original.to(device))
            self._wrap_weights(module, keys)
            loaded += size
        self.model.device = device
        self.model.model_lowvram = lowvram_count > 0
        self.model.lowvram_patch_counter = patched_at_use
        self.model.model_loaded_weight_memory = loaded
        self.model.current_weight_patches_uuid = self.patches_uuid
        self._call_callbacks("on_load_after", device_to, lowvram_model_memory, force_patch_weights, full_load)
        self.apply_hooks(self.forced_hooks, force_apply=True)

    def _patch_at_use(self, module: Any, keys: list[str]) -> int:
        """Register patches that are applied when a host weight is brought over; returns how many."""
        count = 0
        for key in keys:
            name = key.rpartition(".")[2]
            if key in self.patches and name in ("weight", "bias"):
                getattr(module, f"{name}_function").append(LowVramPatch(key, self.patches))
                count += 1
        self._wrap_weights(module, keys)
        return count

    def _wrap_weights(self, module: Any, keys: list[str]) -> None:
        for key in keys:
            name = key.rpartition(".")[2]
            for function in self.weight_wrapper_patches.get(key, ()):
                functions = getattr(module, f"{name}_function", None)
                if functions is not None and function not in functions:
                    functions.append(function)

    def _unload_weights(self) -> None:
        for _, path, module, names in self._load_list():
            wipe_lowvram_weight(module)
            for name in names:
                key = f"{path}.{name}" if path else name
                self._restore_weight(key)
                for function in self.weight_wrapper_patches.get(key, ()):
                    functions = getattr(module, f"{name}_function", [])
                    if function in functions:
                        functions.remove(function)
        self.model.model_lowvram = False
        self.model.lowvram_patch_counter = 0
        self.model.model_loaded_weight_memory = 0
        self.model.current_weight_patches_uuid = None
        self.model.device = self.offload_device

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> Any:
        """Apply object patches and, with `load_weights`, load patched weights. Returns the network."""
        with self.use_ejected():
            for name, obj in self.object_patches.items():
                previous = comfy.utils.set_attr(self.model, name, obj)
                self.object_patches_backup.setdefault(name, previous)
            if load_weights:
                if self._other_weights_loaded():
                    self._unload_weights()
                self.load(device_to, lowvram_model_memory, force_patch_weights, full_load=lowvram_model_memory == 0)
        self.inject_model()
        return self.model

    def _other_weights_loaded(self) -> bool:
        current = self.model.current_weight_patches_uuid
        return current is not None and (current != self.patches_uuid or bool(self.weight_wrapper_patches))

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Undo `patch_model`: originals back in place, device copies dropped."""
        self.eject_model()
        if unpatch_weights:
            self.unpatch_hooks()
            self._unload_weights()
            if device_to is not None:
                self.model.device = torch.device(device_to)
        for name in list(self.object_patches_backup):
            comfy.utils.set_attr(self.model, name, self.object_patches_backup.pop(name))

    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int:
        """Let the largest modules go back to host memory until `memory_to_free` bytes are free; returns how many."""
        with self.use_ejected():
            freed = 0
            hooks_unpatched = False
            for size, path, module, names in self._load_list():
                if freed >= memory_to_free:
                    break
                keys = [f"{path}.{name}" if path else name for name in names]
                on_device = any(
                    comfy.utils.get_attr(self.model, key).device != self._host_weight(key).device for key in keys
                )
                if not on_device or not hasattr(module, "comfy_cast_weights"):
                    continue
                if not hooks_unpatched:
                    self.unpatch_hooks()
                    hooks_unpatched = True
                for key in keys:
                    self._restore_weight(key)
                if not hasattr(module, "prev_comfy_cast_weights"):
                    module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
                self.model.lowvram_patch_counter += self._patch_at_use(module, keys)
                freed += size
            if freed:
                self.model.model_lowvram = True
                self.model.model_loaded_weight_memory -= freed
            return freed

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Load up to `extra_memory` further bytes; returns how many were loaded."""
        before = self.model.model_loaded_weight_memory
        if before >= self.model_size() and self.model.current_weight_patches_uuid == self.patches_uuid:
            return 0
        self.patch_model(device_to, lowvram_model_memory=before + extra_memory)
        return self.model.model_loaded_weight_memory - before

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

        return evaluate_serially(model, batches, model_options)

    def denoiser_memory_budget(self, device: torch.device) -> int:
        """Bytes available to the batches of one denoiser call."""
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
