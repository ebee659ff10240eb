"""What a model family declares about itself, in one value."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StateDict = dict[str, Any]
Sizes = Mapping[str, tuple[int, int]]
"""(length, unit) by name: an axis of `length` that is split in whole units (a head, a channel)."""


@dataclass(frozen=True)
class Split:
    """How a linear [out, in] is cut over ranks (Shoeybi et al. 2019, Megatron-LM).

    column: each rank computes some outputs. row: each rank uses some inputs, and the outputs are summed over ranks (the
    bias is added once). gathered: each rank computes some outputs and gets those of the others (layers of per-sample
    tensors, whose weights are large and outputs small). whole: every rank keeps all of it. parts: the names of the sizes,
    in order, that are fused along the axis that is cut; each part is distributed separately.
    tokens: the streams whose tokens the linear gets (column) or returns (row), joined in that order; None for all streams
    of the block's state, () where every rank has all tokens (a prompt that is not a stream; text encoders).
    """

    kind: Literal["column", "row", "gathered", "whole"]
    parts: tuple[str, ...] = ()
    tokens: tuple[str, ...] | None = None

    def ranges(self, sizes: Sizes, index: int, count: int) -> list[tuple[int, int]]:
        """[start, stop) along the cut axis of rank `index` of `count`, one for each part; for `whole` there are none."""
        out, offset = [], 0
        for name in self.parts:
            length, unit = sizes[name]
            units = length // unit
            start, stop = units * index // count, units * (index + 1) // count
            out.append((offset + start * unit, offset + stop * unit))
            offset += length
        return out


@dataclass(frozen=True)
class Family:
    """A record.

    name: of the family. network: `module:class` of its network, imported when first needed.
    detect: `(state dict, key prefix, metadata) -> configuration` of the network, or None when the file is of another
    family. configurations, models, latent_formats: classes by the public names under which `comfy.supported_models`,
    `comfy.model_base` and `comfy.latent_formats` have them; configurations are tried in order on a detected
    configuration, and say text encoders, sampling defaults, memory factor and dtypes; models say which conditionings go
    in. from_diffusers: a state dict with diffusers' keys under the family's, or None when it is not of this family.
    lora_keys: `network -> {adapter key prefix: weight, or (weight, part), or (weight, None, transform)}` beyond the
    weights' own names. clip_type: the name in `CLIPType` of its text encoders, for folders in diffusers' layout.
    splits: how each linear of a block is cut, by its name in the network with `*` for numbers.
    sizes: `network -> Sizes` for the splits. sizes_from_tensors: whether the blocks take their numbers of heads from the
    tensors that their linears return, and mark rotary tables as `inside`: so they run with the heads that a rank has.
    full_precision: names of linears among those of `splits` that never compute in eight bits, with `*` for numbers.
    """

    name: str
    network: str
    detect: Callable[[StateDict, str, dict[str, str] | None], dict[str, Any] | None]
    configurations: Mapping[str, type[Any]]
    models: Mapping[str, type[Any]]
    latent_formats: Mapping[str, type[Any]] = field(default_factory=dict)
    from_diffusers: Callable[[StateDict], StateDict | None] | None = None
    lora_keys: Callable[[Any], dict[str, Any]] | None = None
    clip_type: str = "STABLE_DIFFUSION"
    splits: Mapping[str, Split] = field(default_factory=dict)
    sizes: Callable[[Any], Sizes] | None = None
    sizes_from_tensors: bool = False
    full_precision: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A class is known by its public name: in messages, in tables, when pickled, and to packs that ask for it.
        public = {
            "supported_models": self.configurations,
            "model_base": self.models,
            "latent_formats": self.latent_formats,
        }
        for module, kinds in public.items():
            for name, kind in kinds.items():
                kind.__name__ = kind.__qualname__ = name
                kind.__module__ = f"comfy.{module}"

    def network_class(self) -> type[Any]:
        """The class of the family's network."""
        return network_class(self.network)

    def split_of(self, name: str) -> Split:
        """How the linear `name` of the network is cut. Raises KeyError when that is not declared."""
        for pattern, split in self.splits.items():
            if fnmatch.fnmatchcase(name, pattern):
                return split
        raise KeyError(f"{self.name} does not declare how its linear {name} is split; add it to the record's splits")


def network_class(path: str) -> type[Any]:
    """The class at `module:class`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
