"""What `WeightStore` knows of one weight, and of the weights of one module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from comfy.ldm.modules.eight_bit import EightBit
from comfy.weight_files import WeightFile

from .held import Held
from .patching import Patch


class Weight:
    """One weight. `patches`: those with which `placed` was made; `pristine`: the unpatched value on the device, if kept;
    `held`: the part that `placed` is, None for all; `wanted`: the patches of the last `place`, and `patch_files` the files
    that they are from; `eight_bit`: its layer's, if `placed` is quantised."""

    __slots__ = ("key", "source", "placed", "pristine", "patches", "held", "wanted", "patch_files", "eight_bit")

    def __init__(self, key: str, source: torch.Tensor) -> None:
        self.key = key
        self.source = source
        self.placed: torch.Tensor | None = None
        self.pristine: torch.Tensor | None = None
        self.patches: tuple[Patch, ...] = ()
        self.held: Held | None = None
        self.wanted: tuple[Patch, ...] = ()
        self.patch_files: set[WeightFile] = set()
        self.eight_bit: EightBit | None = None

    @property
    def current(self) -> torch.Tensor:
        """What the network uses."""
        return self.source if self.placed is None else self.placed

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is held."""
        whole = self.source.shape
        return tuple(whole) if self.held is None else self.held.shape(whole)

    @property
    def absent(self) -> bool:
        """Whether nothing of it is held."""
        return self.held is not None and not self.held.slices

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """What is held of a whole value of this weight."""
        return whole if self.held is None else self.held.take(whole)


class Group(NamedTuple):
    """The weights of one module, which are on a device together or not at all. `size` in bytes of what is held.

    whole: whether all of every weight is held.
    """

    size: int
    path: str
    module: Any
    keys: tuple[str, ...]
    whole: bool = True

    @property
    def can_wait(self) -> bool:
        """Whether the module can compute while its weights are in host memory."""
        return self.whole and hasattr(self.module, "comfy_cast_weights")
