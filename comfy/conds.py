"""Conditioning values on their way to the network: fitted to a batch, and joined when conditionings run together.

Every class answers the same five questions: `process_cond` (this value for that batch, device and area),
`can_concat` and `concat` (may and do several conditionings share one network call), `size` (for the memory estimate).
The batch axis of tensors is 0; `device` may be any torch device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

import comfy.utils


def is_equal(x: Any, y: Any) -> bool:
    """Equality that also descends into containers of tensors; incomparable values count as different."""
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and torch.equal(x, y)
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(is_equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(map(is_equal, x, y))
    try:
        return bool(x == y)
    except Exception:
        logging.warning("comparing two values of type %s failed; they are taken as different", type(x).__name__)
        return False


class CONDRegular:
    """A tensor per sample, repeated over the batch."""

    def __init__(self, cond: Any) -> None:
        self.cond = cond

    def _copy_with(self, cond: Any) -> Any:
        return type(self)(cond)

    def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
        """The value with `batch_size` rows, on `device`."""
        rows = comfy.utils.repeat_to_batch_size(self.cond, batch_size)
        return self._copy_with(_to_device(rows, kwargs.get("device")))

    def can_concat(self, other: Any) -> bool:
        """Whether both may go through one call: equal shapes."""
        if self.cond.shape != other.cond.shape:
            return False
        if self.cond.device != other.cond.device:
            logging.warning("conditionings on %s and %s cannot run together", self.cond.device, other.cond.device)
            return False
        return True

    def concat(self, others: Sequence[Any]) -> Any:
        """The rows of this value followed by those of `others`."""
        return torch.cat([self.cond, *(other.cond for other in others)])

    def size(self) -> list[int]:
        """The shape, for memory estimates."""
        return list(self.cond.size())


class CONDNoiseShape(CONDRegular):
    """A tensor laid out like the latent, `[B, C, *spatial]`: cut to the conditioning's area."""

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The value inside `area` = (sizes ..., offsets ...), with `batch_size` rows."""
        data = self.cond
        if area is not None:
            axes = len(area) // 2
            for axis in range(axes):
                data = data.narrow(axis + 2, area[axes + axis], area[axis])
        rows = comfy.utils.repeat_to_batch_size(data, batch_size)
        return self._copy_with(_to_device(rows, kwargs.get("device")))


class CONDCrossAttn(CONDRegular):
    """Text tokens `[B, L, C]`: lengths that divide a small common multiple are brought to it by repetition."""

    def can_concat(self, other: Any) -> bool:
        """Whether repetition can bring both to one length without growing either more than fourfold."""
        mine, theirs = self.cond.shape, other.cond.shape
        if mine != theirs:
            if mine[0] != theirs[0] or mine[2] != theirs[2]:
                return False
            if math.lcm(mine[1], theirs[1]) // min(mine[1], theirs[1]) > 4:
                return False
        if self.cond.device != other.cond.device:
            logging.warning("text tensors on %s and %s cannot run together", self.cond.device, other.cond.device)
            return False
        return True

    def concat(self, others: Sequence[Any]) -> Any:
        """All rows at the common length; attention over repeated tokens gives what one copy gives."""
        tensors = [self.cond, *(other.cond for other in others)]
        length = math.lcm(*(tensor.shape[1] for tensor in tensors))
        return torch.cat([tensor.repeat(1, length // tensor.shape[1], 1) for tensor in tensors])


class CONDConstant(CONDRegular):
    """A value that is the same for the whole call; conditionings with unequal values run apart."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
        """The value itself."""
        return self._copy_with(self.cond)

    def can_concat(self, other: Any) -> bool:
        """Whether both hold equal values."""
        return is_equal(self.cond, other.cond)

    def concat(self, others: Sequence[Any]) -> Any:
        """The value, once."""
        return self.cond

    def size(self) -> list[int]:
        """A constant counts as one element."""
        return [1]


class CONDList(CONDRegular):
    """A list of tensors, each repeated over the batch and joined position by position."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
        """The list with `batch_size` rows in every tensor."""
        device = kwargs.get("device")
        rows = [_to_device(comfy.utils.repeat_to_batch_size(tensor, batch_size), device) for tensor in self.cond]
        return self._copy_with(rows)

    def can_concat(self, other: Any) -> bool:
        """Whether both lists agree in length and shapes."""
        return len(self.cond) == len(other.cond) and all(
            mine.shape == theirs.shape for mine, theirs in zip(self.cond, other.cond)
        )

    def concat(self, others: Sequence[Any]) -> Any:
        """A list of the same length with all rows."""
        return [torch.cat([own, *(other.cond[i] for other in others)]) for i, own in enumerate(self.cond)]

    def size(self) -> list[int]:
        """All elements as one `[1, 1, n]` tensor."""
        return [1, 1, sum(math.prod(tensor.size()) for tensor in self.cond)]


def _to_device(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    return tensor if device is None else tensor.to(device)
