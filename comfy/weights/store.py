"""The weights of one network: originals, where each is now, and with which patches it was made.

`place` is idempotent: it compares what is wanted with what is there, weight by weight, and touches only what differs.
Called with what is in place it does nothing. A weight that stays on its device is rewritten in the memory it has, so
that compiled code and captured CUDA graphs stay valid when a LoRA comes, goes or changes its strength; `layout_version`
changes only when memory moves. Originals stay where they were loaded, usually pages of a memory-mapped file that all
processes of a host share, and are never written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import comfy.lora
import comfy.utils
from comfy import accounting, weight_files

from . import quantised
from .fetching import fetch, has_room, pairs_of
from .patching import (
    Calculate,
    Foreign,
    LowVramPatch,
    Patch,
    add_weight_function,
    move_weight_functions,
    real_value,
    same_patches,
    stored_value,
    wipe_lowvram_weight,
)
from .records import Group, Weight
from .staging import Pair, copy_all
from .streaming import WeightStream
from .table import PLAIN_TENSORS, WeightTable, Wrapper


class WeightStore(WeightTable):
    """See the module's docstring.

    `linear_precision` (bf16, auto, fp8, int8; see `quantised`) is what the next `place` goes by.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rewritten = 0  # how often hooks gave weights other values
        self.multiplies_in: str | None = None  # the eight-bit format of its linears, if any
        self.linear_precision = "bf16"
        self._whole = False  # whether weights are in full precision because they are to be saved

    # --- sizes -----------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Bytes of all weights as they are in their file."""
        import comfy.model_management

        now = [weight for weight in self.weights.values() if weight.eight_bit is not None and weight.held is None]
        return comfy.model_management.module_size(self.model) + sum(w.source.nbytes - w.current.nbytes for w in now)

    def saving(self, device: torch.device) -> int:
        """Bytes that weights take less on `device` because linears multiply in eight bits."""
        wanted = self.linear_precision, device
        if self._saving is None or self._saving[0] != wanted:
            self._saving = wanted, quantised.saving(self, device)
        return self._saving[1]

    def as_wanted(self, whole: bool) -> bool:
        """Whether weights are in full precision as, or in eight bits although, they are to be saved (`whole`)."""
        return self._whole == whole or self.device is None or not self.saving(self.device)

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
        foreign: Foreign | None = None,
    ) -> None:
        """Bring the network's weights to `device`, patched.

        budget: bytes of weights that may be on the device, None for all. Modules beyond it keep their weights in host
            memory and patch them at each use, or, with `patch_host`, hold patched weights in host memory.
        wrappers: functions that a weight passes through at each use.
        foreign: somebody's `patch_weight_to_device(key, device or None)`, which sets the network's attribute itself.

        Raises WeightFileChangedError when a file that weights or patches are from has changed since it was loaded.
        """
        self.device, self._whole, self._foreign = device, patch_host, foreign
        self._note_held(self.groups())
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
        self._wrap(groups, wrappers or {}, device)
        if self._resident != resident:
            self._moved()
        self._resident, self._waiting = resident, len(waiting)
        extra = 0 if self.arrangement is None else self.arrangement.extra_bytes
        self.loaded_bytes = extra + sum(group.size for group in groups if group.path in resident)
        self._changed()
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
            if weight.absent:
                continue
            if not self._must_copy(weight, device):
                if weight.placed is not None and weight.placed.device != device:
                    self._drop(weight)
            elif weight.placed is None or weight.placed.device != device:
                self._drop(weight)
                out.append(weight)
        return out

    def _bring(self, weights: list[Weight]) -> None:
        def copies() -> Iterator[Pair]:
            for weight in weights:
                source = weight.source
                if weight.eight_bit is not None:
                    continue
                if type(source) not in PLAIN_TENSORS:  # a tensor class of its own knows how to move
                    self._use(weight, source.to(self.device, copy=True))
                    continue
                with torch.inference_mode(False):  # training saves weights for its derivatives
                    target = torch.empty(weight.shape, dtype=source.dtype, device=self.device)
                self._use(weight, target)
                yield from pairs_of(weight, target)

        quantised.bring(self, [weight for weight in weights if weight.eight_bit is not None])
        fetch(copies())

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
        foreign: Foreign | None,
    ) -> None:
        changed = []
        for group in groups:
            for key in group.keys:
                weight = self.weights[key]
                if not weight.absent and not same_patches(weight.patches, patches.get(key, ())):
                    changed.append(weight)
        self._restore([weight for weight in changed if not patches.get(weight.key)], device)
        for weight in changed:
            wanted = tuple(patches.get(weight.key, ()))
            if not wanted:
                continue
            accounting.count("weights_patched")
            if foreign is not None:
                self._patch_by(foreign, weight, self.device)
            else:
                base = self._pristine_value(weight, device)
                self._write(weight, weight.part(self._patched_value(weight, wanted, base, calculate)))
            weight.patches = wanted

    def _patched_value(
        self, weight: Weight, patches: Sequence[Patch], base: torch.Tensor, calculate: Calculate
    ) -> torch.Tensor:
        """The whole weight, patched, in the form in which its layer stores it; `base` is its unpatched value.

        Where it is stored in eight bits it is the real value, which `_write` quantises.
        """
        real = calculate(patches, real_value(self.model, weight.key, base), weight.key)
        if weight.eight_bit is not None:
            return real
        return stored_value(self.model, weight.key, real, weight.source)

    def _restore(self, weights: list[Weight], device: torch.device) -> None:
        """Unpatched values again, in the memory the weights have."""
        fetched: list[Pair] = []
        kept: list[Pair] = []
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
            plain = type(weight.source) in PLAIN_TENSORS  # other tensor classes may carry patches of their own
            if not plain or placed.shape != weight.shape or placed.dtype != weight.source.dtype:
                self._drop(weight)
                self._bring([weight])
                continue
            if weight.pristine is None:
                fetched += pairs_of(weight, placed)
            else:
                kept.append((weight.pristine, placed))
            weight.pristine, weight.patches = None, ()
        copy_all(kept)
        fetch(fetched)

    def _pristine_value(self, weight: Weight, device: torch.device) -> torch.Tensor:
        """The whole unpatched value on the device, kept for the next change where there is room for it."""
        if not self._must_copy(weight, device):
            return weight.source
        if weight.pristine is not None:
            return weight.pristine
        if weight.held is not None or weight.eight_bit is not None:  # room for whole weights is what is missing
            whole = torch.empty_like(weight.source, device=device, memory_format=torch.contiguous_format)
            fetch([(weight.source, whole)])
            return whole
        assert weight.placed is not None
        if weight.patches:
            with torch.inference_mode(False):
                value = torch.empty_like(weight.source, device=device, memory_format=torch.contiguous_format)
            fetch([(weight.source, value)])
        elif not has_room(device, weight.placed.nbytes):
            return weight.placed  # it is overwritten only when the patched value has been calculated
        else:
            value = weight.placed.detach().clone()
        if has_room(device, 0):
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

    def _patch_by(self, foreign: Foreign, weight: Weight, device: torch.device | None) -> None:
        """Let somebody's own method patch a weight from its original; what it put in place is then ours to undo."""
        if weight.held is not None or weight.eight_bit is not None:
            self._patch_whole_by(foreign, weight)
            return
        if weight.patches:
            if device is not None and self._must_copy(weight, device):
                self._restore([weight], device)
            else:
                self._drop(weight)
        foreign(weight.key, device)
        made = comfy.utils.get_attr(self.model, weight.key)
        if made is not weight.current:
            weight.placed = made
            self._moved()

    def _patch_whole_by(self, foreign: Foreign, weight: Weight) -> None:
        """The same where a part is held, or eight bits are: the method finds the whole original in place, and what it made
        of it is then taken."""
        assert self.device is not None
        placed, held = weight.placed, weight.held
        weight.held = None
        weight.placed = whole = torch.nn.Parameter(
            self._pristine_value(weight, self.device).to(self.device, copy=True), requires_grad=False
        )
        comfy.utils.set_attr(self.model, weight.key, whole)
        try:
            foreign(weight.key, self.device)
            made = comfy.utils.get_attr(self.model, weight.key).detach()
        finally:
            weight.held, weight.placed, weight.pristine = held, placed, None
            comfy.utils.set_attr(self.model, weight.key, weight.current)
        made = real_value(self.model, weight.key, made) if weight.eight_bit is not None else made
        self._write(weight, weight.part(made))

    def patch_one(self, key: str, patches: Sequence[Patch], device: torch.device, calculate: Calculate) -> None:
        """Give one weight its patched value on `device`, whatever the others are."""
        weight = self.weight(key)
        if weight.absent:
            return
        weight_files.check(weight_files.files_in([weight.source, patches]))
        if self._must_copy(weight, device) and (weight.placed is None or weight.placed.device != device):
            self.device = device
            self._drop(weight)
            self._bring([weight])
        made = self._patched_value(weight, patches, self._pristine_value(weight, device), calculate)
        self._write(weight, weight.part(made))
        self._changed()
        weight.patches = tuple(patches)

    def whole_value(self, key: str, calculate: Calculate) -> torch.Tensor:
        """A weight as the network has it now, all of it, also where only a part is held; on the weight's device.

        Of a weight in eight bits it is what was quantised, fp32, in memory of its own.
        """
        weight = self.weight(key)
        if weight.held is None and weight.eight_bit is None:
            return weight.current
        base = self._pristine_value(weight, weight.current.device)
        if not weight.patches:
            return base if weight.eight_bit is None else real_value(self.model, key, base)
        return self._patched_value(weight, weight.patches, base, calculate)

    def release_pristine(self) -> None:
        """Give up the unpatched values that are kept on the device for quick changes."""
        for weight in self.weights.values():
            weight.pristine = None

    def rewrite(self, key: str, value: torch.Tensor) -> torch.Tensor:
        """Give a weight a value for a while (hooks); returns what was there, for `rewrite` to put back."""
        weight = self.weights.get(key) or self.weight(key)
        self.rewritten += 1  # on all ranks alike, also where the weight is on another
        if weight.absent:
            return weight.source
        self._changed()
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
        if weight.absent:
            return
        self._changed()
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
        calculate: Calculate,
        device: torch.device,
        patch_host: bool,
    ) -> None:
        module = group.module
        module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True
        for key in group.keys:
            weight, wanted = self.weight(key), tuple(patches.get(key, ()))
            name = key.rpartition(".")[2]
            if wanted and patch_host:
                if not same_patches(weight.patches, wanted):
                    self._patch_in_host_memory(weight, wanted, calculate, device)
                continue
            self._drop(weight)
            if wanted and name in ("weight", "bias"):
                add_weight_function(module, f"{name}_function", LowVramPatch(key, {key: list(wanted)}))
                self.patched_at_use += 1

    def _patch_in_host_memory(
        self, weight: Weight, wanted: tuple[Patch, ...], calculate: Calculate, device: torch.device
    ) -> None:
        if self._foreign is not None:
            self._patch_by(self._foreign, weight, None)
        else:
            value = self._patched_value(weight, wanted, weight.source.to(device), calculate)
            self._use(weight, value.detach().to(weight.source.device))
        weight.patches = wanted

    def _wrap(self, groups: list[Group], wrappers: Mapping[str, Sequence[Wrapper]], device: torch.device) -> None:
        """Install exactly these functions between stored weights and their layers; those of other owners stay."""
        wanted = []
        for group in groups if wrappers else ():
            for key in group.keys:
                if key in self._held and self._held[key].slices and wrappers.get(key):
                    raise ValueError(
                        f"a function is to change {key} at each use, of which this process holds only a part; set "
                        "parallel.tensor_parallel and memory.shard_weights to false for this workflow"
                    )
                name = f"{key.rpartition('.')[2]}_function"
                if hasattr(group.module, name):
                    wanted += [(group.module, name, function) for function in wrappers.get(key, ())]
        for module, _, _ in self._wrapped:
            move_weight_functions(module, device)
        if wanted == self._wrapped:
            return
        for module, name, function in self._wrapped:
            setattr(module, name, [known for known in getattr(module, name, ()) if known is not function])
        for module, name, function in wanted:
            add_weight_function(module, name, function)
            move_weight_functions(module, device)
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
        self._wrap([], {}, torch.device("cpu"))
        if self.arrangement is not None:
            self.arrangement.release()
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
            # what a pack's own method patches, its layers do not patch at use
            self._wait_in_host_memory(
                group, wanted, comfy.lora.calculate_weight, self.device, self._foreign is not None
            )
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


def store_of(model: Any) -> WeightStore:
    """The store of a network, made on first use."""
    store: WeightStore | None = vars(model).get("weight_store")
    if store is None:
        store = vars(model)["weight_store"] = WeightStore(model)
    return store
