"""The weights of one network as records: their originals, what is held of each, the files they are from.

`store.WeightStore` places them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

import comfy.utils
from comfy import weight_files
from comfy.ldm.modules.eight_bit import eight_bit_bytes

from .held import Held
from .patching import Foreign, Patch, same_patches
from .records import Group, Weight
from .streaming import WeightStream

_versions = itertools.count(1)
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

Wrapper = Callable[..., Any]


class Arrangement(Protocol):
    """How somebody arranged that a network computes with parts of its weights."""

    @property
    def extra_bytes(self) -> int:
        """Bytes on the device beside the weights held."""

    def changed(self) -> None:
        """Weights have, or may have, other values."""

    def release(self) -> None:
        """The network leaves its device."""

    def undo(self) -> None:
        """Let the network compute with whole weights again."""


class WeightTable:
    """See the module's docstring. `always_copy` treats the CPU as a device of its own, for tests."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights: dict[str, Weight] = {}
        self.layout_version = next(_versions)
        self.loaded_bytes = 0
        self.device: torch.device | None = None
        self.patched_at_use = 0
        self.always_copy = False
        self.loaded_from: set[weight_files.WeightFile] = set()
        self.arrangement: Arrangement | None = None
        self._held_bytes: int | None = None
        self._saving: tuple[Any, int] | None = None
        """(precision and device, bytes that weights in eight bits save there), where known."""
        self._held: dict[str, Held] = {}  # of these weights only a part is wanted
        self._files: set[weight_files.WeightFile] = set()  # those that the network as it is placed depends on
        self._resident: set[str] = set()  # paths of modules whose weights are on the device
        self._wrapped: list[tuple[Any, str, Wrapper]] = []
        self._foreign: Foreign | None = None  # a pack's method that patches weights, see `WeightStore.place`
        self._stream: WeightStream | None = None
        self._waiting = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightTable:
        other = copy.copy(self)
        memo[id(self)] = other
        other.model = copy.deepcopy(self.model, memo)
        other.weights = copy.deepcopy(self.weights, memo)
        other.arrangement = copy.deepcopy(self.arrangement, memo)
        other._wrapped, other._stream, other._foreign = [], None, None
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
                keys = tuple(f"{path}.{name}" if path else name for name in names)
                size = sum(self._bytes_on_device(key, module, name) for key, name in zip(keys, names))
                found.append(Group(size, path, module, keys, self._held.keys().isdisjoint(keys)))
        return sorted(found, key=lambda group: (-group.size, group.path))

    def weight(self, key: str) -> Weight:
        """The record of a weight. A tensor that other code assigned becomes the new original."""
        current = comfy.utils.get_attr(self.model, key)
        known = self.weights.get(key)
        if known is None or (current is not known.source and current is not known.placed):
            known = self.weights[key] = Weight(key, current)
            self._held_bytes = None
            self._moved()
        return known

    def source(self, key: str) -> torch.Tensor:
        """The original of a weight."""
        return self.weight(key).source

    def hold(self, held: Mapping[str, Held]) -> None:
        """From the next `place` on, hold only these parts of the weights named, and all others wholly.

        A weight of which nothing is held stays in the file it is from. Raises ValueError for a part that a weight does not
        have, or a part of a tensor of a class of its own, whose layout in memory is not known.
        """
        for key, part in held.items():
            source = self.weight(key).source
            part.shape(source.shape)
            if part.slices and type(source) not in PLAIN_TENSORS:
                raise ValueError(
                    f"{key} is stored as {type(source).__name__}, of which no part can be held; load this network whole "
                    "(parallel.tensor_parallel and memory.shard_weights: false), or use a file in bf16 or fp8"
                )
        self._held, self._held_bytes, self._saving = dict(held), None, None

    @property
    def holds_parts(self) -> bool:
        """Whether only parts of some weights are wanted."""
        return bool(self._held)

    def held_bytes(self) -> int:
        """Bytes that are wanted on the device, in the form in which weights are in their file."""
        if self._held_bytes is None:
            self._held_bytes = sum(
                self._bytes_held(key, comfy.utils.get_attr(self.model, key))
                for group in self.groups()
                for key in group.keys
            )
        return self._held_bytes + (0 if self.arrangement is None else self.arrangement.extra_bytes)

    def _note_held(self, groups: Sequence[Group]) -> None:
        """Copies of other parts than those wanted now are dropped."""
        for group in groups:
            for key in group.keys:
                weight = self.weight(key)
                if weight.held != self._held.get(key):
                    self._drop(weight)
                    weight.held = self._held.get(key)

    def wanted_shape(self, key: str) -> tuple[int, ...]:
        """The shape of what is wanted of a weight."""
        whole, part = self.source(key).shape, self._held.get(key)
        return tuple(whole) if part is None else part.shape(whole)

    def part(self, key: str, whole: torch.Tensor) -> torch.Tensor:
        """What is held of a whole value of a weight."""
        return self.weight(key).part(whole)

    def _bytes_held(self, key: str, current: torch.Tensor) -> int:
        part = self._held.get(key)
        if part is not None:
            return part.bytes_of(self.weight(key).source)
        known = self.weights.get(key)
        as_in_file = known is None or (known.held is None and known.eight_bit is None)
        return (current if known is None or as_in_file else known.source).nbytes

    def _bytes_on_device(self, key: str, module: Any, name: str) -> int:
        if name == "weight" and getattr(module, "eight_bit", None) is not None:
            return eight_bit_bytes(self.wanted_shape(key))
        return self._bytes_held(key, getattr(module, name))

    @property
    def partly_loaded(self) -> bool:
        """Whether some modules bring their weights over at each use."""
        return self._waiting > 0

    def _changed(self) -> None:
        if self.arrangement is not None:
            self.arrangement.changed()

    def _moved(self) -> None:
        """Memory moved. Versions are never used twice in a process, so that no captured graph mistakes a network."""
        self.layout_version = next(_versions)

    def _must_copy(self, weight: Weight, device: torch.device) -> bool:
        copied = weight.held is not None or weight.eight_bit is not None
        return copied or weight.source.device != device or self.always_copy

    def _use(self, weight: Weight, value: torch.Tensor | None) -> None:
        """Let the network use `value` (None: the original)."""
        wrap = isinstance(weight.source, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter)
        weight.placed = torch.nn.Parameter(value, requires_grad=False) if wrap and value is not None else value
        comfy.utils.set_attr(self.model, weight.key, weight.current)
        self._moved()

    def _drop(self, weight: Weight) -> None:
        """Back to the original; copies on the device are freed."""
        if weight.placed is not None:
            self._use(weight, None)
        weight.pristine, weight.patches = None, ()
        if weight.eight_bit is not None:
            weight.eight_bit.scale = None

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
