"""What patches make of a weight, and how to tell whether two lists of patches make the same of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import comfy.lora
import comfy.utils
from comfy.float import stochastic_rounding

Patch = tuple[Any, ...]
Calculate = Callable[..., torch.Tensor]
"""`(patches, weight, key) -> weight`; `comfy.lora.calculate_weight`, or a patcher's own method."""
Foreign = Callable[[str, "torch.device | None"], Any]


def string_to_seed(data: str) -> int:
    """A number for a weight's name, the same on every rank (CRC-32, unlike Python's salted hash)."""
    import zlib

    return zlib.crc32(data.encode("utf-8"))


def same_patches(one: Sequence[Patch], other: Sequence[Patch]) -> bool:
    """Whether two lists of patches are the same: equal strengths and offsets, the same adapter objects."""
    return len(one) == len(other) and all(
        a is b or (a[0] == b[0] and a[1] is b[1] and a[2] == b[2] and a[3] == b[3] and a[4] is b[4])
        for a, b in zip(one, other)
    )


def get_key_weight(model: Any, key: str) -> tuple[torch.Tensor, Any, Any]:
    """(weight, its layer's `set_weight` or None, its `convert_weight` or None) at a dotted path."""
    owner_path, _, name = key.rpartition(".")
    owner = comfy.utils.get_attr(model, owner_path) if owner_path else model
    weight = getattr(owner, name)
    if name != "weight":
        return weight, None, None
    return weight, getattr(owner, "set_weight", None), getattr(owner, "convert_weight", None)


def real_value(model: Any, key: str, stored: torch.Tensor) -> torch.Tensor:
    """A weight as numbers to calculate with, in memory of its own: fp32, or as its layer converts it."""
    _, _, convert = get_key_weight(model, key)
    if convert is not None:
        return convert(stored.clone(), inplace=True)
    return stored.to(torch.float32, copy=True)


def stored_value(model: Any, key: str, real: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A calculated weight in the form in which its layer stores it; `like` is a stored weight of that key.

    Layers with a `set_weight` of their own (scaled fp8, packs' formats) make the form themselves.
    """
    weight, set_weight, _ = get_key_weight(model, key)
    seed = string_to_seed(key)
    if set_weight is None:
        return stochastic_rounding(real, like.dtype, seed=seed)
    set_weight(real, inplace_update=False, seed=seed)
    made = comfy.utils.get_attr(model, key)
    comfy.utils.set_attr(model, key, weight)
    return made


class LowVramPatch:
    """Applies a weight's patches each time the weight is brought to the device."""

    def __init__(self, key: str, patches: dict[str, list[Any]]) -> None:
        self.key = key
        self.patches = patches

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if weight.element_size() < 4 else weight.dtype
        patched = comfy.lora.calculate_weight(self.patches[self.key], weight.to(dtype), self.key, dtype)
        return patched.to(weight.dtype)


def add_weight_function(layer: Any, name: str, function: Callable[..., torch.Tensor]) -> None:
    """Let a layer pass its weight (`weight_function`) or bias (`bias_function`) through one more function at each use."""
    setattr(layer, name, [*getattr(layer, name), function])


def move_weight_functions(layer: Any, device: torch.device | None) -> int:
    """Move what is between a layer's stored weights and the layer to a device, where it can (`move_to`); bytes moved."""
    functions = [*getattr(layer, "weight_function", ()), *getattr(layer, "bias_function", ())]
    movable = [function for function in functions if hasattr(function, "move_to")]
    return 0 if device is None else sum(function.move_to(device=device) for function in movable)


def wipe_lowvram_weight(layer: Any) -> None:
    """Undo what partial loading changed about a layer."""
    if hasattr(layer, "prev_comfy_cast_weights"):
        layer.comfy_cast_weights = layer.prev_comfy_cast_weights
        del layer.prev_comfy_cast_weights
    for name in ("weight_function", "bias_function"):
        if hasattr(layer, name):
            setattr(layer, name, [f for f in getattr(layer, name) if not isinstance(f, LowVramPatch)])
    if hasattr(layer, "streamed_weights"):
        del layer.streamed_weights
