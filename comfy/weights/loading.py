"""Which networks are on a device, and which leave when there is too little room.

A network that was loaded stays until its memory is needed; then the least recently used leaves first, the ones in use
never. `comfy.model_management` offers these functions under ComfyUI's names; they ask it for memory and devices, so that
whoever replaces one of its names there replaces it for all.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

import comfy
from comfy import accounting

if TYPE_CHECKING:
    import comfy.model_management

MIN_WEIGHT_MEMORY_RATIO = 0.4
_SLACK_BYTES = 256 << 20
EVERYTHING = 1e20  # a request for at least this many bytes unloads all models


def _lineage(patcher: Any) -> Iterator[Any]:
    """A patcher, the one it was cloned from, and so on."""
    while patcher is not None:
        yield patcher
        patcher = getattr(patcher, "parent", None)


def _without_network(patcher: Any) -> Any:
    """A copy of a patcher that does not keep the network, with the methods that were replaced on the object."""
    shell = copy.copy(patcher)
    shell.model = shell.parent = None
    for name, value in vars(patcher).items():
        if isinstance(value, MethodType) and value.__self__ is patcher:
            setattr(shell, name, MethodType(value.__func__, shell))
    return shell


class LoadedModel:
    """A network that is on its load device, wholly or partly, and the patcher whose weights it has.

    Patchers are held weakly: a model that no node holds any more is freed. When a clone is freed while the network
    stays, the patcher it was cloned from takes its place.
    """

    def __init__(self, model: Any) -> None:
        self.device = model.load_device
        self.currently_used = True
        self.real_model: Any = None
        self.model_finalizer: Any = None
        self._line: list[weakref.ref[Any]] = []
        self._undo: tuple[weakref.ref[Any], Any] | None = None  # whoever loaded it and has an unpatch_model of its own
        self._adopt(model)

    def _adopt(self, model: Any) -> None:
        self._line = [weakref.ref(patcher) for patcher in _lineage(model)]
        self.device = model.load_device

    @property
    def model(self) -> Any:
        """The patcher, or None once nobody holds it or any it was cloned from."""
        return next((patcher for patcher in (known() for known in self._line) if patcher is not None), None)

    def switch_to(self, model: Any) -> None:
        """Let another patcher of the same network take over; weights stay where they are until it is loaded."""
        before = self.model
        if before is not None and before is not model:
            before.detach(unpatch_all=False)
        self._leave_to(model)
        self._adopt(model)

    def _leave_to(self, model: Any) -> None:
        """Let a patcher of a pack, which may be gone, undo what only its own `unpatch_model` knows of."""
        if self._undo is None or self._undo[0]() is model:
            return
        known, shell = self._undo
        patcher, self._undo = known() or shell, None
        patcher.model = model.model
        differ = model.model.current_weight_patches_uuid != model.patches_uuid
        patcher.unpatch_model(patcher.offload_device, unpatch_weights=differ)

    def end(self) -> None:
        """Nobody holds the patcher: where others hold the network, what a pack's patcher left in it is undone."""
        network = self.real_model() if self.real_model is not None else None
        if network is not None and self._undo is not None:
            (_, shell), self._undo = self._undo, None
            shell.model = network
            shell.unpatch_model(shell.offload_device, unpatch_weights=True)

    def model_memory(self) -> int:
        """Bytes of all weights."""
        return self.model.model_size()

    def model_loaded_memory(self) -> int:
        """Bytes on the load device."""
        return self.model.loaded_size()

    def model_offloaded_memory(self) -> int:
        """Bytes that wait elsewhere."""
        return self.model.model_size() - self.model.loaded_size()

    def model_memory_required(self, device: torch.device) -> int:
        """Bytes that loading to `device` would add."""
        if device == self.model.current_loaded_device():
            return self.model_offloaded_memory()
        return self.model_memory()

    def model_load(self, lowvram_model_memory: int = 0, force_patch_weights: bool = False) -> Any:
        """Bring weights to the load device, at most `lowvram_model_memory` bytes if that is not 0."""
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        extra = lowvram_model_memory - self.model.loaded_size() if lowvram_model_memory > 0 else EVERYTHING
        self.model_use_more_vram(int(extra), force_patch_weights)
        own = getattr(self.model, "has_own", None)
        if own is not None and own("unpatch_model"):
            self._undo = weakref.ref(self.model), _without_network(self.model)
        self.real_model = weakref.ref(self.model.model)
        return self.model.model

    def should_reload_model(self, force_patch_weights: bool = False) -> bool:
        """Whether patched weights must be patched again."""
        return force_patch_weights and self.model.lowvram_patch_counter() > 0

    def model_unload(self, memory_to_free: int | None = None, unpatch_weights: bool = True) -> bool:
        """Free `memory_to_free` bytes if part of the model is enough; else unload it. True when all is unloaded."""
        partly = memory_to_free is not None and memory_to_free < self.model.loaded_size()
        if partly and self.model.partially_unload(self.model.offload_device, memory_to_free) >= memory_to_free:
            return False
        self._leave_to(self.model)
        self.model.detach(unpatch_weights)
        self.real_model = self._undo = None
        return True

    def model_use_more_vram(self, extra_memory: int, force_patch_weights: bool = False) -> int:
        """Load up to `extra_memory` further bytes."""
        return self.model.partially_load(self.device, extra_memory, force_patch_weights=force_patch_weights)

    def is_dead(self) -> bool:
        """Whether nobody holds the patcher any more."""
        return self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedModel) and self.model is other.model

    def __hash__(self) -> int:
        return id(self)


_arrange: Callable[[Any, bool], None] | None = None


def arrange_by(arrange: Callable[[Any, bool], None] | None) -> None:
    """Before networks are placed, let `arrange(patcher, whole)` say which parts of their weights this process holds.

    whole: all of them, because the weights are to be saved or trained. None: every process holds whole networks.
    """
    global _arrange
    _arrange = arrange


current_loaded_models: list[LoadedModel] = []
"""The most recently used first."""
_memory_holders: list[Callable[[], None]] = []


def add_memory_holder(release: Callable[[], None]) -> None:
    """Register somebody who keeps GPU memory for speed only and gives it up when `release` is called."""
    _memory_holders.append(release)


def loaded_models(only_currently_used: bool = False) -> list[Any]:
    """The patchers of loaded models."""
    entries = [m for m in current_loaded_models if not m.is_dead()]
    return [m.model for m in entries if m.currently_used or not only_currently_used]


def _release_held(device: torch.device, memory_required: float) -> None:
    """Free what is kept for speed only when `memory_required` bytes are not free otherwise."""
    management = comfy.model_management
    if management.get_free_memory(device) >= memory_required:
        return
    for release in _memory_holders:
        release()
    for entry in current_loaded_models:
        store = getattr(getattr(entry.model, "model", None), "weight_store", None)
        if store is not None:
            store.release_pristine()
    management.soft_empty_cache()


def free_memory(
    memory_required: float, device: torch.device, keep_loaded: Sequence[LoadedModel] = ()
) -> list[LoadedModel]:
    """Unload models from `device`, least recently used first, until `memory_required` bytes are free."""
    management = comfy.model_management
    cleanup_models_gc()
    unloaded: list[LoadedModel] = []
    candidates = [m for m in reversed(current_loaded_models) if m.device == device and m not in keep_loaded]
    if management.is_device_cpu(device) and memory_required < EVERYTHING:
        return unloaded  # weights on the CPU are pages of their files: the system drops them when it must
    _release_held(device, memory_required)
    for entry in candidates:
        if entry.is_dead():
            entry.end()
            current_loaded_models.remove(entry)
            continue
        missing = None
        if not management.DISABLE_SMART_MEMORY:
            missing = memory_required - management.get_free_memory(device)
            if missing <= 0:
                break
        entry.currently_used = False
        if entry.model_unload(None if missing is None or memory_required >= EVERYTHING else int(missing)):
            current_loaded_models.remove(entry)
            unloaded.append(entry)
    if unloaded:
        management.soft_empty_cache()
    return unloaded


def load_models_gpu(
    models: Sequence[Any],
    memory_required: float = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: float | None = None,
    force_full_load: bool = False,
) -> None:
    """Bring models to their load devices, leaving `memory_required` bytes for computation.

    Models that are there already, with the patches wanted, cost nothing. What does not fit stays in host memory and is
    brought to the device layer by layer. Models of other prompts are unloaded first when memory is short.
    """
    with accounting.phase("load"):
        _load_models(models, memory_required, force_patch_weights, minimum_memory_required, force_full_load)


def _load_models(
    models: Sequence[Any],
    memory_required: float,
    force_patch_weights: bool,
    minimum_memory_required: float | None,
    force_full_load: bool,
) -> None:
    management = comfy.model_management
    cleanup_models_gc()
    least, reserved = management.minimum_inference_memory(), management.extra_reserved_memory()
    needed = max(least, memory_required + reserved)
    minimum = needed if minimum_memory_required is None else max(least, minimum_memory_required + reserved)
    wanted: list[Any] = []
    for model in models:
        for patcher in (model, *getattr(model, "model_patches_models", list)()):
            if not any(patcher is w for w in wanted):
                wanted.append(patcher)
    if _arrange is not None:
        for patcher in wanted:
            _arrange(patcher, force_patch_weights or force_full_load)
    entries = [_entry_for(patcher) for patcher in wanted]
    by_device: dict[torch.device, int] = {}
    for entry in entries:
        by_device[entry.device] = by_device.get(entry.device, 0) + entry.model_memory_required(entry.device)
    for device, size in by_device.items():
        if not management.is_device_cpu(device):
            free_memory(size * 1.1 + needed, device, keep_loaded=entries)
    for entry in entries:
        _load_entry(entry, needed, minimum, force_patch_weights, force_full_load)
        if entry in current_loaded_models:
            current_loaded_models.remove(entry)
        current_loaded_models.insert(0, entry)


def _entry_for(patcher: Any) -> LoadedModel:
    """The entry of a patcher's network, which then is the patcher's; a new one if the network is not loaded."""
    for entry in current_loaded_models:
        known = entry.model
        if known is patcher or (known is not None and known.is_clone(patcher)):
            entry.switch_to(patcher)
            entry.currently_used = True
            return entry
    return LoadedModel(patcher)


def _load_entry(
    entry: LoadedModel, needed: float, minimum: float, force_patch_weights: bool, force_full_load: bool
) -> None:
    management = comfy.model_management
    device, budget = entry.device, 0
    if not management.is_device_cpu(device) and not force_full_load:
        state = management.vram_state
        to_load = entry.model_memory_required(device)
        free = management.get_free_memory(device)
        if state == management.VRAMState.NO_VRAM:
            budget = 1
        elif state != management.VRAMState.HIGH_VRAM and (
            to_load > free - needed or state == management.VRAMState.LOW_VRAM
        ):
            there = entry.model_memory() - to_load
            limit = free
            if state == management.VRAMState.LOW_VRAM:
                limit = management.get_total_memory(device) * MIN_WEIGHT_MEMORY_RATIO - there
            budget = max(1, there + int(min(limit, free - minimum)))
            if there and abs(budget - there) < _SLACK_BYTES:
                budget = there  # what is loaded stays: free memory varies from call to call
            logging.info(
                "%s: %.0f of %.0f MiB of weights fit on %s; the rest stays in host memory",
                type(entry.model.model).__name__,
                budget / 2**20,
                entry.model_memory() / 2**20,
                device,
            )
    entry.model_load(budget, force_patch_weights=force_patch_weights)


def check_weight_files(models: Sequence[Any]) -> None:
    """Raises WeightFileChangedError when a file of one of these models changed while it computed."""
    for model in models:
        store = getattr(getattr(model, "model", None), "weight_store", None)
        if store is not None:
            store.check_files()


def load_model_gpu(model: Any) -> None:
    """`load_models_gpu` for one model."""
    comfy.model_management.load_models_gpu([model])


def cleanup_models_gc() -> None:
    """Drop entries whose model is gone."""
    if any(entry.is_dead() for entry in current_loaded_models):
        cleanup_models()
        gc.collect()


def cleanup_models() -> None:
    """Remove dead entries from the list."""
    for entry in [m for m in current_loaded_models if m.is_dead()]:
        entry.end()
        current_loaded_models.remove(entry)


def unload_all_models() -> None:
    """Unload everything everywhere."""
    cleanup_models()
    for entry in list(current_loaded_models):
        entry.model_unload()
        current_loaded_models.remove(entry)
    comfy.model_management.soft_empty_cache(True)


def unload_model_clones(model: Any, unload_weights_only: bool = True, force_unload: bool = True) -> None:
    """Unload every patcher of the same network."""
    for entry in [m for m in current_loaded_models if not m.is_dead() and m.model.is_clone(model)]:
        entry.model_unload()
        current_loaded_models.remove(entry)
