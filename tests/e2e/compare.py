"""Distances of pictures."""

from __future__ import annotations

import numpy as np


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference of two pictures, in 1/255."""
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return int(np.abs(a - b).max())


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean square difference, in 1/255."""
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return float(np.sqrt(((a - b) ** 2).mean()))
