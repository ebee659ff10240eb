"""Recorded figures of the reference, and how to compare with them.

The figures are not part of the project. They are looked for in `$TACO_GOLDENS`, then in `shared/goldens` beside the
checkout; without them the tests skip. `README.md` there says what every figure is.
"""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

# Worst relative error of each test, for the report: {(topic, case): error}.
WORST: dict[tuple[str, str], float] = {}


def folder() -> Path | None:
    """Where the recorded figures are, or None."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "goldens"
    places = [os.environ.get("TACO_GOLDENS"), str(beside)]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


@functools.cache
def load_json(name: str) -> Any:
    """A recorded JSON file, `{}` when there are no figures (so that tests can be collected)."""
    root = folder()
    if root is None or not (root / name).is_file():
        return {}
    return json.loads((root / name).read_text())


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of one recorded file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(str(path), "pt")
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self):
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


@functools.cache
def load_tensors(name: str) -> Tensors:
    """The tensors of a recorded file; skips the test when there are no figures."""
    require()
    return Tensors(folder() / name)  # type: ignore[operator]


def require() -> None:
    """Skip the test when there are no figures."""
    if folder() is None:
        pytest.skip("recorded figures not found: set TACO_GOLDENS to their folder")


def cases(table: Mapping[str, Any]) -> list[Any]:
    """Parameters of a test, one per entry; a single skipped one without figures."""
    if not table:
        return [pytest.param(None, marks=pytest.mark.skip(reason="recorded figures not found: set TACO_GOLDENS"))]
    return [pytest.param(name, id=str(name)) for name in table]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max|got - want| / max(1, max|want|); infinite when shapes differ or values are not finite."""
    if tuple(got.shape) != tuple(want.shape):
        return math.inf
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().cpu().double(), want.double()
    error = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    return error if math.isfinite(error) else math.inf


def check(topic: str, case: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Fail unless the relative error is within the tolerance; remembers the error for the report."""
    error = relative_error(got, want)
    WORST[(topic, case)] = max(error, WORST.get((topic, case), 0.0))
    assert error <= tolerance, (
        f"{case}: relative error {error:.3g} is over {tolerance:g} (shape {tuple(got.shape)}, "
        f"recorded {tuple(want.shape)})"
    )


def make_weights(recipe: Mapping[str, Any], set_seed: int) -> dict[str, torch.Tensor]:
    """A state dict from its recipe {key: [shape, rule]}: random by the CRC-32 of each key."""
    out = {}
    for key, (shape, rule) in recipe.items():
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()) ^ set_seed)
        r = torch.randn(shape, generator=generator)
        if rule == "mat":
            out[key] = r / math.sqrt(math.prod(shape[1:]))
        elif rule == "norm":
            out[key] = 1 + 0.1 * r
        else:
            out[key] = {"bias": 0.02, "emb": 0.5, "tab": 0.1}[rule] * r
    return out
