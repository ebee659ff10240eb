"""Adapters (LoRA and relatives): low-rank changes of weights."""

from .base import WeightAdapterBase, decompose, pad_to_shape
from .kinds import GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from .training import adapter_maps

adapters: list[type[WeightAdapterBase]] = [LoRAAdapter, LoHaAdapter, LoKrAdapter, GLoRAAdapter, OFTAdapter]

__all__ = [
    "GLoRAAdapter", "LoHaAdapter", "LoKrAdapter", "LoRAAdapter", "OFTAdapter", "WeightAdapterBase", "adapter_maps",
    "adapters", "decompose", "pad_to_shape",
]  # fmt: skip
