"""Latents of several kinds as one value, as newer ComfyUI has them (a video's pictures and its sound)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch


class NestedTensor:
    """Tensors of different shapes; arithmetic works on each. `shape`, `dtype` and `device` are those of the first.

    tensors: an iterable of tensors, or one tensor. Raises ValueError for arithmetic with another number of tensors.
    """

    is_nested = True

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)

    def _each(self, function: Callable[..., torch.Tensor], other: Any = None) -> NestedTensor:
        if not isinstance(other, NestedTensor):
            return NestedTensor(function(tensor, other) for tensor in self.tensors)
        if len(other.tensors) != len(self.tensors):
            raise ValueError(
                f"nested tensors of {len(self.tensors)} and {len(other.tensors)} parts do not fit together"
            )
        return NestedTensor(map(function, self.tensors, other.tensors))

    def __add__(self, other: Any) -> NestedTensor:
        return self._each(operator.add, other)

    def __sub__(self, other: Any) -> NestedTensor:
        return self._each(operator.sub, other)

    def __mul__(self, other: Any) -> NestedTensor:
        return self._each(operator.mul, other)

    def __truediv__(self, other: Any) -> NestedTensor:
        return self._each(operator.truediv, other)

    def __getitem__(self, index: Any) -> NestedTensor:
        return self._each(operator.getitem, index)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def unbind(self) -> list[torch.Tensor]:
        """The tensors."""
        return list(self.tensors)

    def to(self, *args: Any, **kwargs: Any) -> NestedTensor:
        """Each tensor on another device or in another dtype."""
        return NestedTensor(tensor.to(*args, **kwargs) for tensor in self.tensors)

    def clone(self) -> NestedTensor:
        """Copies."""
        return NestedTensor(tensor.clone() for tensor in self.tensors)

    def size(self, *dim: int) -> Any:
        """`torch.Tensor.size` of the first."""
        return self.tensors[0].size(*dim)

    @property
    def shape(self) -> torch.Size:
        return self.tensors[0].shape

    @property
    def ndim(self) -> int:
        return self.tensors[0].ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def pack_latents(latents: Iterable[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Size]]:
    """Latents [B, ...] as one, [B, 1, elements of all], and their shapes."""
    parts = list(latents)
    return torch.cat([part.reshape(part.shape[0], 1, -1) for part in parts], dim=-1), [part.shape for part in parts]


def unpack_latents(combined_latent: torch.Tensor, latent_shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The inverse of `pack_latents`, also for another batch size. One shape means that nothing was packed."""
    if len(latent_shapes) < 2:
        return [combined_latent]
    parts = combined_latent.split([math.prod(shape[1:]) for shape in latent_shapes], dim=-1)
    return [part.reshape(part.shape[0], *shape[1:]) for part, shape in zip(parts, latent_shapes)]
