"""Adapters (LoRA and relatives): low-rank changes of weights."""

from .base import WeightAdapterBase, decompose, pad_to_shape
from .kinds import GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter

adapters: list[type[WeightAdapterBase]] = [LoRAAdapter, LoHaAdapter, LoKrAdapter, GLoRAAdapter]

__all__ = [
    "GLoRAAdapter", "LoHaAdapter", "LoKrAdapter", "LoRAAdapter", "WeightAdapterBase", "adapters", "decompose",
    "pad_to_shape",
]  # fmt: skip
