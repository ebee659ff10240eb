"""The weights of one network: originals, where each is now, and with which patches it was made.

`place` is idempotent: it compares what is wanted with what is there, weight by weight, and touches only what differs.
Called with what is in place it does nothing. A weight that stays on its device is rewritten in the memory it has, so
that compiled code and captured CUDA graphs stay valid when a LoRA comes, goes or changes its strength; `layout_version`
changes only when memory moves. Originals stay where they were loaded, usually pages of a memory-mapped file that all
processes of a host share, and are never written to.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import comfy.utils
from comfy import accounting, weight_files

from . import quantised
from .patching import (
    Calculate,
    LowVramPatch,
    Patch,
    real_value,
    same_patches,
    stored_value,
    wipe_lowvram_weight,
)
from .records import Group, Weight
from .staging import Pair, copy_all
from .streaming import WeightStream

_versions = itertools.count(1)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


Wrapper = Callable[..., Any]


class WeightStore:
    """See the module's docstring. `always_copy` treats the CPU as a device of its own, for tests.

    `linear_precision` (bf16, auto, fp8, int8; see `quantised`) is what the next `place` goes by.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights: dict[str, Weight] = {}
        self.layout_version = next(_versions)
        self.loaded_bytes = 0
        self.device: torch.device | None = None
        self.patched_at_use = 0
        self.always_copy = False
        self.rewritten = 0  # how often hooks gave weights other values
        self.multiplies_in: str | None = None  # the eight-bit format of its linears, if any
        self.linear_precision = "bf16"
        self._saving: tuple[Any, int] = (None, 0)  # (precision and device, bytes that weights in eight bits save there)
        self.loaded_from: set[weight_files.WeightFile] = set()
        self._files: set[weight_files.WeightFile] = set()  # those that the network as it is placed depends on
        self._resident: set[str] = set()  # paths of modules whose weights are on the device
        self._wrapped: list[tuple[Any, str, Wrapper]] = []
        self._stream: WeightStream | None = None
        self._waiting = 0
        self._whole = False  # whether weights are in full precision because they are to be saved

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightStore:
        other = copy.copy(self)
        memo[id(self)] = other
        other.model = copy.deepcopy(self.model, memo)
        other.weights = copy.deepcopy(self.weights, memo)
        other._wrapped, other._stream = [], None
        other.loaded_from, other._files = set(), set()  # its weights are copies
        other.layout_version = next(_versions)
        return other

    # --- what there is ---------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Every module that has weights, largest first; the order is the same on every rank."""
        found = []
        for path, module in self.model.named_modules():
            names = [name for name, _ in module.named_parameters(recurse=False)]
            names += [name for name, buffer in module.named_buffers(recurse=False) if buffer is not None]
            if names:
                size = sum(quantised.bytes_of(module, name) for name in names)
                keys = tuple(f"{path}.{name}" if path else name for name in names)
                found.append(Group(size, path, module, keys))
        return sorted(found, key=lambda group: (-group.size, group.path))

    def weight(self, key: str) -> Weight:
        """The record of a weight. A tensor that other code assigned becomes the new original."""
        current = comfy.utils.get_attr(self.model, key)
        known = self.weights.get(key)
        if known is None or (current is not known.source and current is not known.placed):
            known = self.weights[key] = Weight(key, current)
            self._moved()
        return known

    def source(self, key: str) -> torch.Tensor:
        """The original of a weight."""
        return self.weight(key).source

    @property
    def partly_loaded(self) -> bool:
        """Whether some modules bring their weights over at each use."""
        return self._waiting > 0

    def size(self) -> int:
        """Bytes of all weights as they are in their file."""
        import comfy.model_management

        now = [weight for weight in self.weights.values() if weight.eight_bit is not None]
        return comfy.model_management.module_size(self.model) + sum(w.source.nbytes - w.current.nbytes for w in now)

    def saving(self, device: torch.device) -> int:
        """Bytes that weights take less on `device` because linears multiply in eight bits."""
        known, saved = self._saving
        if known != (self.linear_precision, device):
            wanted = quantised.formats(self.model, self.linear_precision, device, self.source)
            saved = quantised.saving(wanted, self.source)
            self._saving = (self.linear_precision, device), saved
        return saved

    def as_wanted(self, whole: bool) -> bool:
        """Whether weights are in full precision as, or in eight bits although, they are to be saved (`whole`)."""
        return self._whole == whole or self.device is None or not self.saving(self.device)

    def _moved(self) -> None:
        """Memory moved. Versions are never used twice in a process, so that no captured graph mistakes a network."""
        self.layout_version = next(_versions)

    def _must_copy(self, weight: Weight, device: torch.device) -> bool:
        return weight.eight_bit is not None or weight.source.device != device or self.always_copy

    def _use(self, weight: Weight, value: torch.Tensor | None) -> None:
        """Let the network use `value` (None: the original)."""
        wrap = isinstance(weight.source, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter)
        weight.placed = torch.nn.Parameter(value, requires_grad=False) if wrap and value is not None else value
        comfy.utils.set_attr(self.model, weight.key, weight.current)
        self._moved()

    # --- files -----------------------------------------------------------------------------------------------------

    def _files_of(self, patches: Mapping[str, Sequence[Patch]]) -> set[weight_files.WeightFile]:
        """The files that the network's weights, all of which are recorded, and these patches are from."""
        found: list[weight_files.WeightFile | None] = [*self.loaded_from]
        for key, weight in self.weights.items():
            wanted = patches.get(key, ())
            found.append(weight_files.file_of(weight.source))
            if not same_patches(weight.wanted, wanted):
                weight.wanted, weight.patch_files = tuple(wanted), weight_files.files_in(wanted)
            found += weight.patch_files
        known = {id(file): file for file in found if file is not None}  # far fewer objects than weights
        return set(known.values())

    def check_files(self) -> None:
        """Raises WeightFileChangedError when a file that the network depends on is not what was loaded.

        `place` calls it before and after it reads; whoever computes with the network, afterwards.
        """
        weight_files.check(self._files)

    # --- placing ---------------------------------------------------------------------------------------------------

    def place(
        self,
        device: torch.device,
        patches: Mapping[str, Sequence[Patch]],
        calculate: Calculate,
        *,
        budget: int | None = None,
        wrappers: Mapping[str, Sequence[Wrapper]] | None = None,
        patch_host: bool = False,
        foreign: Callable[[str], Any] | None = None,
    ) -> None:
        """Bring the network's weights to `device`, patched.

        budget: bytes of weights that may be on the device, None for all. Modules beyond it keep their weights in host
            memory and patch them at each use, or, with `patch_host`, hold patched weights in host memory.
        wrappers: functions that a weight passes through at each use.
        foreign: somebody else's `patch_weight_to_device(key)`, which sets the network's attribute itself.

        Raises WeightFileChangedError when a file that weights or patches are from has changed since it was loaded.
        """
        self.device, self._whole = device, patch_host
        quantised.prepare(self, device, patch_host)
        groups = self.groups()
        resident = self._choose(groups, device, budget)
        waiting = [group for group in groups if group.path not in resident]
        for group in waiting:
            self._evict(group)
        arriving = []
        for group in groups:
            wipe_lowvram_weight(group.module)
            if group.path in resident:
                arriving += self._arrivals(group, device)
        self._files = self._files_of(patches)
        self.check_files()
        self._bring(arriving)
        self._patch_resident([g for g in groups if g.path in resident], patches, device, calculate, foreign)
        self.patched_at_use = 0
        for group in waiting:
            self._wait_in_host_memory(group, patches, calculate, device, patch_host)
        self._wrap(groups, wrappers or {})
        if self._resident != resident:
            self._moved()
        self._resident, self._waiting = resident, len(waiting)
        self.loaded_bytes = sum(group.size for group in groups if group.path in resident)
        self._set_stream(waiting, device)
        self.check_files()  # what was read while a file was written to cannot be trusted

    def _choose(self, groups: list[Group], device: torch.device, budget: int | None) -> set[str]:
        """Paths of the modules to have on the device: those that cannot wait, then those there already, then by size."""
        if budget is None:
            return {group.path for group in groups}
        chosen = {group.path for group in groups if not group.can_wait}
        left = budget - sum(group.size for group in groups if group.path in chosen)
        for group in sorted(groups, key=lambda g: g.path not in self._resident):
            if group.path not in chosen and group.size <= left:
                chosen.add(group.path)
                left -= group.size
        return chosen

    def _arrivals(self, group: Group, device: torch.device) -> list[Weight]:
        """The weights of a module that are not on the device yet."""
        out = []
        for key in group.keys:
            weight = self.weight(key)
            if not self._must_copy(weight, device):
                if weight.placed is not None and weight.placed.device != device:
                    self._drop(weight)
            elif weight.placed is None or weight.placed.device != device:
                self._drop(weight)
                out.append(weight)
        return out

    def _bring(self, weights: list[Weight]) -> None:
        pairs = []
        quantised.bring(self, [weight for weight in weights if weight.eight_bit is not None], _fetch)
        for weight in weights:
            source = weight.source
            if weight.eight_bit is not None:
                continue
            if type(source) in _PLAIN_TENSORS:
                with torch.inference_mode(False):  # training saves weights for its derivatives
                    target = torch.empty_like(source, device=self.device, memory_format=torch.contiguous_format)
                pairs.append((source, target))
            else:  # a tensor class of its own knows how to move
                target = source.to(self.device, copy=True)
            self._use(weight, target)
        _fetch(pairs)

    def _drop(self, weight: Weight) -> None:
        """Back to the original; copies on the device are freed."""
        if weight.placed is not None:
            self._use(weight, None)
        weight.pristine, weight.patches = None, ()
        if weight.eight_bit is not None:
            weight.eight_bit.scale = None

    def _evict(self, group: Group) -> None:
        for key in group.keys:
            weight = self.weight(key)
            on_device = weight.placed is not None and self.device is not None and weight.placed.device == self.device
            if on_device or weight.pristine is not None:
                self._drop(weight)

    # --- patching --------------------------------------------------------------------------------------------------

    def _patch_resident(
        self,
        groups: list[Group],
        patches: Mapping[str, Sequence[Patch]],
        device: torch.device,
        calculate: Calculate,
        foreign: Callable[[str], Any] | None,
    ) -> None:
        changed = []
        for group in groups:
            for key in group.keys:
                weight = self.weights[key]
                if not same_patches(weight.patches, patches.get(key, ())):
                    changed.append(weight)
        self._restore([weight for weight in changed if not patches.get(weight.key)], device)
        for weight in changed:
            wanted = tuple(patches.get(weight.key, ()))
            if not wanted:
                continue
            accounting.count("weights_patched")
            if foreign is not None:
                self._patch_by(foreign, weight)
            else:
                base = self._pristine_value(weight, device)
                real = calculate(wanted, real_value(self.model, weight.key, base), weight.key)
                self._write(weight, self._stored(weight, real))
            weight.patches = wanted

    def _stored(self, weight: Weight, real: torch.Tensor) -> torch.Tensor:
        """What `_write` takes, from a calculated value: that itself where it is quantised by `_write`."""
        return real if weight.eight_bit is not None else stored_value(self.model, weight.key, real, weight.source)

    def _restore(self, weights: list[Weight], device: torch.device) -> None:
        """Unpatched values again, in the memory the weights have."""
        fetched, kept = [], []
        for weight in weights:
            if not self._must_copy(weight, device):
                self._drop(weight)
                continue
            placed = weight.placed
            assert placed is not None
            if weight.eight_bit is not None:
                self._bring([weight])
                weight.patches = ()
                continue
            plain = type(weight.source) in _PLAIN_TENSORS  # other tensor classes may carry patches of their own
            if not plain or placed.shape != weight.source.shape or placed.dtype != weight.source.dtype:
                self._drop(weight)
                self._bring([weight])
                continue
            if weight.pristine is None:
                fetched.append((weight.source, placed))
            else:
                kept.append((weight.pristine, placed))
            weight.pristine, weight.patches = None, ()
        copy_all(kept)
        _fetch(fetched)

    def _pristine_value(self, weight: Weight, device: torch.device) -> torch.Tensor:
        """The unpatched value on the device, kept for the next change where there is room for it."""
        if not self._must_copy(weight, device):
            return weight.source
        if weight.eight_bit is not None:  # in full precision it would take twice the memory that it has
            whole = quantised.original(self, weight)
            _fetch([(weight.source, whole)])
            return whole
        if weight.pristine is not None:
            return weight.pristine
        assert weight.placed is not None
        if weight.patches:
            with torch.inference_mode(False):
                value = torch.empty_like(weight.source, device=device, memory_format=torch.contiguous_format)
            _fetch([(weight.source, value)])
        elif not _has_room(device, weight.placed.nbytes):
            return weight.placed  # it is overwritten only when the patched value has been calculated
        else:
            value = weight.placed.detach().clone()
        if _has_room(device, 0):
            weight.pristine = value
        return value

    def _write(self, weight: Weight, value: torch.Tensor) -> None:
        """Give a weight a new value, in the memory it has if that fits; one in eight bits gets its real value."""
        placed = weight.placed
        if weight.eight_bit is not None:
            value = quantised.quantised(weight, value)
        if placed is not None and placed.shape == value.shape and placed.dtype == value.dtype:
            with torch.inference_mode():
                placed.copy_(value)
        else:
            self._use(weight, value.detach())

    def _patch_by(self, foreign: Callable[[str], Any], weight: Weight) -> None:
        """Let somebody's own method patch a weight from its original; what it put in place is then ours to undo."""
        if weight.patches:
            if self.device is not None and self._must_copy(weight, self.device):
                self._restore([weight], self.device)
            else:
                self._drop(weight)
        foreign(weight.key)
        made = comfy.utils.get_attr(self.model, weight.key)
        if made is not weight.current:
            weight.placed = made
            self._moved()

    def patch_one(self, key: str, patches: Sequence[Patch], device: torch.device, calculate: Calculate) -> None:
        """Give one weight its patched value on `device`, whatever the others are."""
        weight = self.weight(key)
        weight_files.check(weight_files.files_in([weight.source, patches]))
        if self._must_copy(weight, device) and (weight.placed is None or weight.placed.device != device):
            self.device = device
            self._drop(weight)
            self._bring([weight])
        real = calculate(patches, real_value(self.model, key, self._pristine_value(weight, device)), key)
        self._write(weight, self._stored(weight, real))
        weight.patches = tuple(patches)

    def release_pristine(self) -> None:
        """Give up the unpatched values that are kept on the device for quick changes."""
        for weight in self.weights.values():
            weight.pristine = None

    def rewrite(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """Give a weight a value for a while (hooks); returns what was there, for `rewrite` to put back."""
        weight = self.weights.get(key) or self.weight(key)
        self.rewritten += 1
        if weight.placed is not None and weight.placed.shape == value.shape and weight.placed.dtype == value.dtype:
            before = weight.placed.detach().clone()
            self._write(weight, value)
            return before
        before = comfy.utils.set_attr_param(self.model, key, value)
        self._moved()
        return before

    def put_back(self, key: str, before: torch.Tensor) -> None:
        """Undo `rewrite`."""
        self.rewritten += 1
        weight = self.weights[key]
        if before is weight.source or before is weight.placed:
            comfy.utils.set_attr(self.model, key, before)
            self._moved()
        else:
            self._write(weight, before)

    # --- waiting in host memory ------------------------------------------------------------------------------------

    def _wait_in_host_memory(
        self,
        group: Group,
        patches: Mapping[str, Sequence[Patch]],
        calculate: Calculate | None,
        device: torch.device,
        patch_host: bool,
    ) -> None:
        module = group.module
        module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True
        for key in group.keys:
            weight, wanted = self.weight(key), tuple(patches.get(key, ()))
            name = key.rpartition(".")[2]
            if wanted and patch_host and calculate is not None:
                if not same_patches(weight.patches, wanted):
                    real = calculate(wanted, real_value(self.model, key, weight.source.to(device)), key)
                    value = stored_value(self.model, key, real, weight.source)
                    self._use(weight, value.detach().to(weight.source.device))
                    weight.patches = wanted
                continue
            self._drop(weight)
            if wanted and name in ("weight", "bias"):
                getattr(module, f"{name}_function").append(LowVramPatch(key, {key: list(wanted)}))
                self.patched_at_use += 1

    def _wrap(self, groups: list[Group], wrappers: Mapping[str, Sequence[Wrapper]]) -> None:
        """Install exactly these functions between stored weights and their layers; those of other owners stay."""
        wanted = []
        for group in groups if wrappers else ():
            for key in group.keys:
                name = f"{key.rpartition('.')[2]}_function"
                if hasattr(group.module, name):
                    wanted += [(group.module, name, function) for function in wrappers.get(key, ())]
        if wanted == self._wrapped:
            return
        for module, name, function in self._wrapped:
            if function in getattr(module, name, ()):
                getattr(module, name).remove(function)
        for module, name, function in wanted:
            getattr(module, name).append(function)
        self._wrapped = wanted
        self._moved()

    def _set_stream(self, waiting: list[Group], device: torch.device) -> None:
        """Let weights that wait come over before they are asked for, where the device can."""
        modules = tuple(group.module for group in waiting)
        if not waiting or device.type != "cuda":
            self._stream = None
        elif self._stream is not None and self._stream.modules == modules:
            self._stream.attach()
        else:
            self._stream = WeightStream(device, modules, self._stream)

    # --- leaving ---------------------------------------------------------------------------------------------------

    def unload(self) -> None:
        """Originals everywhere; all copies are dropped."""
        for group in self.groups():
            wipe_lowvram_weight(group.module)
            for key in group.keys:
                self._drop(self.weight(key))
        quantised.plain_again(self)
        self._wrap([], {})
        self._resident, self._waiting, self._stream = set(), 0, None
        self.loaded_bytes = self.patched_at_use = 0

    def free(self, amount: int) -> int:
        """Let the largest modules that can wait leave the device until `amount` bytes are free; returns how many are."""
        if self.device is None or amount <= 0:
            return 0
        groups, freed = self.groups(), 0
        leaving: list[Group] = []
        for group in groups:
            if freed >= amount:
                break
            on_device = any(self._must_copy(self.weight(key), self.device) for key in group.keys)
            if group.path in self._resident and group.can_wait and on_device:
                leaving.append(group)
                freed += group.size
        for group in leaving:
            wanted = {key: self.weights[key].patches for key in group.keys if self.weights[key].patches}
            self._evict(group)
            self._wait_in_host_memory(group, wanted, None, self.device, False)
            self._resident.discard(group.path)
        if leaving:
            self._moved()
            self._waiting += len(leaving)
            self.loaded_bytes -= freed
            waiting = [group for group in groups if group.path not in self._resident]
            self._set_stream(waiting, self.device)
        return freed

    def patched_keys(self) -> dict[str, torch.Tensor]:
        """Originals of the weights that are patched now, by key."""
        return {weight.key: weight.source for weight in self.weights.values() if weight.patches}


def _fetch(pairs: Sequence[Pair]) -> None:
    """Copy originals to the device."""
    accounting.count("weight_bytes", sum(source.nbytes for source, _ in pairs))
    copy_all(pairs)


def _has_room(device: torch.device, size: int) -> bool:
    """Whether `size` bytes can be spent on speed: a fifth of the device stays free for computing."""
    if device.type != "cuda":
        return True
    import comfy.model_management as management

    return management.get_free_memory(device) - size > management.get_total_memory(device) // 5


def store_of(model: Any) -> WeightStore:
    """The store of a network, made on first use."""
    store: WeightStore | None = vars(model).get("weight_store")
    if store is None:
        store = vars(model)["weight_store"] = WeightStore(model)
    return store
