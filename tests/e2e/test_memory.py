"""Host memory: ranks on one machine share a checkpoint's pages instead of each holding a copy.

Measured as PSS (a page shared by n processes counts 1/n in each), summed over the ranks without the launcher, above
what the same server takes before anything is loaded.
"""

from __future__ import annotations

import json
import os
import struct

import pytest

from tests import tiny_models
from tests.e2e.server import Server
from tests.e2e.workflows import parts

HIDDEN, HEAD, DOUBLE, SINGLE = 1536, 64, 3, 5
NAME = "big_flux.safetensors"


def write_big(path):
    """A Flux network of about 1.7 GB in fp32: one block of random numbers written again and again, fast."""
    import numpy as np

    shapes = tiny_models.flux_shapes(True, DOUBLE, SINGLE, HIDDEN, HEAD)
    header, position = {}, 0
    for key, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = (np.random.default_rng(1).standard_normal(1 << 22, dtype=np.float32) * 0.02).tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, position, len(noise)):
            file.write(noise[: position - start])
    return position


def pss(pids):
    """Bytes, summed over processes."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
            total += next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    return total


@pytest.fixture(scope="module")
def big(base):
    """Size in bytes of the big model, which is there during these tests only."""
    path = os.path.join(base, "models/diffusion_models", NAME)
    yield write_big(path)
    os.remove(path)


def grown(base, ranks):
    """Bytes of PSS that rendering with the big model adds."""
    with Server(base, ranks) as server:
        server.pictures(parts("tiny_flux_dev_bfl.safetensors", seed=901), 60)
        before = pss(server.pids())
        server.pictures(parts(NAME, seed=901, steps=1), 120)
        return pss(server.pids()) - before


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_hazard_11_four_ranks_hold_one_copy(base, big):
    """At most 1.3 times one rank's, and an allowance of 100 MiB a rank for activations and allocators."""
    one, four = grown(base, 1), grown(base, 4)
    assert one > 0.8 * big, f"{one / 2**20:.0f} MiB for a file of {big / 2**20:.0f}: was it read at all?"
    assert four <= 1.3 * one + 4 * 100 * 2**20, f"{four / 2**20:.0f} MiB on 4 ranks, {one / 2**20:.0f} on one"
