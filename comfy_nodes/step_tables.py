"""Noise schedules found by search: tables of levels, stretched to other numbers of steps.

`step_tables.json` holds the numbers; docs/third_party.md says where they come from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


@functools.cache
def tables() -> dict[str, Any]:
    """The file's tables by method: by model, or for GITS by coefficient and number of steps (2 to 20)."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def loglinear_interp(t_steps: Sequence[float], num_steps: int) -> np.ndarray:
    """`num_steps` levels along the curve of the given ones: linear between neighbours' logarithms."""
    places = np.linspace(0, len(t_steps) - 1, num_steps)
    return np.exp(np.interp(places, np.arange(len(t_steps)), np.log(t_steps)))


def stretched(levels: list[float], steps: int) -> list[float]:
    """`levels` for another number of steps; themselves when the number fits."""
    return levels if len(levels) == steps + 1 else loglinear_interp(levels, steps + 1).tolist()


def as_sigmas(levels: list[float], steps: int, denoise: float) -> torch.Tensor:
    """The last round(steps * denoise) steps of `levels` [steps + 1], ending in 0; empty when denoise is 0."""
    if denoise <= 0.0:
        return torch.FloatTensor([])
    kept = steps if denoise >= 1.0 else round(steps * denoise)
    return torch.FloatTensor([*levels[steps - kept : steps], 0.0])
