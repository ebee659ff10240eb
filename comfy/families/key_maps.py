"""Diffusers' names of a family's weights: for adapters that use them, and for loading files that have them.

A map is `{diffusers key: target}`; a target is one of our keys, `(key, (axis, start, length))` for a part of a fused
weight, or `(key, None, transform)` for one whose rows are stored in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

Target = str | tuple[Any, ...]
Targets = dict[str, Target]
ORDINARY_SPELLINGS = ("transformer.", "lycoris_", "lora_transformer_")


def linears(
    names: Mapping[str, str], theirs: str = "", ours: str = "", kinds: Iterable[str] = ("weight", "bias")
) -> Targets:
    """Targets of whole layers: `{their name: our name}` below the prefixes `theirs` and `ours`."""
    return {f"{theirs}{a}.{kind}": f"{ours}{b}.{kind}" for a, b in names.items() for kind in kinds}


def fused(names: Iterable[str], ours: str, width: int) -> Targets:
    """Targets of layers that are one of ours, `width` rows each, in order."""
    return {
        f"{name}.{kind}": (f"{ours}.{kind}", (0, width * place, width))
        for place, name in enumerate(names)
        for kind in ("weight", "bias")
    }


def changed(theirs: str, ours: str, transform: Any) -> Targets:
    """Targets of a layer whose rows diffusers stores in another order."""
    return {f"{theirs}.{kind}": (f"{ours}.{kind}", None, transform) for kind in ("weight", "bias")}


def with_prefix(targets: Targets, prefix: str) -> Targets:
    """The same map with a prefix before our keys."""
    return {a: prefix + b if isinstance(b, str) else (prefix + b[0], *b[1:]) for a, b in targets.items()}


def adapter_keys(targets: Targets, spellings: Iterable[str] = ORDINARY_SPELLINGS) -> dict[str, Target]:
    """Adapter key prefixes `{spelling + diffusers name: target}` of a map whose keys are those of the whole model.

    A spelling that ends in a dot keeps the dots of names, others have underscores.
    """
    out: dict[str, Target] = {}
    for theirs, target in targets.items():
        if theirs.endswith(".weight"):
            stem = theirs.removesuffix(".weight")
            for spelling in spellings:
                out[spelling + (stem if spelling.endswith(".") else stem.replace(".", "_"))] = target
    return out


def assembled(state_dict: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
    """A state dict with diffusers' keys under ours; fused weights are put together.

    Raises ValueError when a part of a fused weight is missing.
    """
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    wanted: dict[str, int] = {}
    for theirs, target in targets.items():
        value = state_dict.get(theirs)
        if not isinstance(target, str) and target[1] is not None:
            wanted[target[0]] = wanted.get(target[0], 0) + 1
        if value is None:
            continue
        if isinstance(target, str):
            out[target] = value
        elif target[1] is None:
            out[target[0]] = target[2](value)
        else:
            parts.setdefault(target[0], {})[target[1][1]] = value
    for key, pieces in parts.items():
        if len(pieces) != wanted[key]:
            raise ValueError(
                f"{key} is made of {wanted[key]} tensors of a diffusers file, of which this file has {len(pieces)}; "
                "it is incomplete"
            )
        out[key] = torch.cat([pieces[place] for place in sorted(pieces)], dim=0)
    return out


def scale_before_shift(weight: torch.Tensor) -> torch.Tensor:
    """Exchange the halves of the first axis: diffusers' last norm stores (scale, shift), these networks (shift, scale)."""
    first, second = weight.chunk(2, dim=0)
    return torch.cat((second, first), dim=0)
