"""Adapters that are being trained: their factors at the start, and a weight changed by factors that have gradients."""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import WeightAdapterBase
from .kinds import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter

adapter_maps: dict[str, type[WeightAdapterBase]] = {
    "LoRA": LoRAAdapter, "LoHa": LoHaAdapter, "LoKr": LoKrAdapter, "OFT": OFTAdapter,
}  # fmt: skip

Factors = dict[str, torch.Tensor]


def divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is neither above `limit` nor above its square root."""
    return max(n for n in range(1, max(1, min(limit, math.isqrt(size))) + 1) if size % n == 0)


def new_factors(algorithm: str, shape: tuple[int, ...], rank: int, generator: torch.Generator) -> Factors:
    """Factors of an adapter that changes nothing yet, for a weight of `shape` [out, in, ...], by their names' ends.

    One factor is zero and the other random, uniform up to 1 / sqrt(columns) or normal, as the methods' papers have it.
    Raises ValueError for an unknown algorithm.
    """
    rows, cols = shape[0], math.prod(shape[1:])

    def uniform(*size: int) -> torch.Tensor:
        return (torch.rand(size, generator=generator) * 2 - 1) / math.sqrt(size[-1])

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=generator) * scale

    if algorithm == "LoRA":
        down = uniform(rank, cols).reshape(rank, *shape[1:])
        up = torch.zeros(rows, rank, *[1] * (len(shape) - 2))
        factors = {".lora_up.weight": up, ".lora_down.weight": down}
    elif algorithm == "LoHa":
        factors = {
            ".hada_w1_a": normal(rows, rank, scale=0.1), ".hada_w1_b": normal(rank, cols),
            ".hada_w2_a": torch.zeros(rows, rank), ".hada_w2_b": normal(rank, cols),
        }  # fmt: skip
    elif algorithm == "LoKr":
        height, width = divisor(rows, rank), divisor(cols, rank)
        factors = {".lokr_w1": torch.zeros(height, width), ".lokr_w2": uniform(rows // height, cols // width)}
    elif algorithm == "OFT":
        size = divisor(rows, rank)
        factors = {".oft_blocks": torch.zeros(rows // size, size, size)}
    else:
        raise ValueError(f"no training algorithm {algorithm!r}; known: {', '.join(adapter_maps)}")
    return factors | {".alpha": torch.tensor(1.0)}


class TrainableAdapter:
    """A function of a weight whose result depends on trainable factors.

    `factors` are named by the ends of their keys in a file. All but `.alpha` and a new shape are trained, in the dtype and
    on the device given.
    """

    def __init__(self, kind: type[WeightAdapterBase], stem: str, factors: Factors, dtype: Any, device: Any) -> None:
        self.stem = stem
        self.tensors: Factors = {}
        for end, value in factors.items():
            fixed = end in (".alpha", ".reshape_weight")
            value = value.detach().clone() if fixed else value.detach().to(device, dtype, copy=True).requires_grad_()
            self.tensors[stem + end] = value
        alpha, dora = self.tensors.get(f"{stem}.alpha"), self.tensors.get(f"{stem}.dora_scale")
        self._adapter: Any = kind.load(stem, self.tensors, None if alpha is None else float(alpha), dora, set())

    def parameters(self) -> list[torch.Tensor]:
        """What an optimizer changes."""
        return [value for value in self.tensors.values() if value.requires_grad]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return self._adapter.calculate_weight(weight, self.stem, 1.0)


class TrainableDifference:
    """A function of a weight (or bias) that adds a trainable tensor to it, for weights with one axis."""

    def __init__(self, key: str, start: torch.Tensor, dtype: Any, device: Any) -> None:
        self.tensors = {key: start.detach().to(device, dtype, copy=True).requires_grad_()}
        (self._difference,) = self.tensors.values()

    def parameters(self) -> list[torch.Tensor]:
        """What an optimizer changes."""
        return [self._difference]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self._difference.to(weight)
