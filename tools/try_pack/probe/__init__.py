"""The pack that `tools.try_pack` puts beside the one it tries: a node that writes down what it is given, on every rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

MOST_PARTS = 200
MOST_NUMBERS = 1 << 22


def parts(value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """(path, kind, content) of a value and what it consists of: arrays, plain values, names of other classes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().to("cpu", torch.float32).contiguous().numpy()
        yield path, f"tensor {list(value.shape)}", flat.reshape(-1)[:MOST_NUMBERS]
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield path, f"array {list(value.shape)}", value.astype(np.float32).reshape(-1)[:MOST_NUMBERS]
    elif isinstance(value, Mapping):
        for key in value:
            yield from parts(value[key], f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from parts(item, f"{path}[{number}]")
    elif value is None or isinstance(value, str | int | float | bool):
        yield path, "plain", value
    else:
        yield path, "object", type(value).__name__


class TryPackProbe:
    CATEGORY = "try_pack"
    FUNCTION = "write"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    TACO_RANKS = "all"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*",), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
        return True

    INPUT_IS_LIST = True

    def write(self, value: Any, name: list[str]) -> dict[str, Any]:
        listed: list[list[Any]] = []
        arrays: dict[str, Any] = {}
        for path, kind, content in parts(value):
            if len(listed) >= MOST_PARTS:
                break
            if isinstance(content, np.ndarray):
                arrays[str(len(listed))] = content
                content = None
            listed.append([path, kind, content])
        file = os.path.join(os.environ["TRY_PACK_RECORDS"], f"{name[0]}.{os.environ.get('RANK', '0')}")
        np.savez(f"{file}.npz", **arrays)
        with open(f"{file}.json", "w", encoding="utf-8") as stream:
            json.dump(listed, stream)
        return {"ui": {"written": [name[0]]}}


NODE_CLASS_MAPPINGS = {"TryPackProbe": TryPackProbe}
