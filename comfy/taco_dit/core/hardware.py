"""Profiles from data sheets, for explaining plans without the machine.

GPU: dense bf16 peak with fp32 accumulation in TFLOP/s, memory in GB/s and GiB, from the maker's data sheets and architecture
white papers. What is reached of the peak was measured on H100 and H200 (docs/benchmarks.md); the same shares are assumed
for the others. Links: what is reached each way by every rank while all send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .machine_profile import DeviceRates, Link, MachineProfile

# Share of the peak by rows of the product, and by heads x queries of attention: measured on H200, torch 2.11, cuDNN attention.
_MATRIX_SHARE = ((1152, 0.62), (2304, 0.667), (4608, 0.80), (8192, 0.81))
_ATTENTION_SHARE = ((27648, 0.555), (110592, 0.654))
_MEMORY_SHARE = 0.85


class Gpu(NamedTuple):
    """A row of `GPUS`."""

    name: str
    bf16_tflops: float
    memory_gbs: float
    memory_gib: int
    host_gbs: float


GPUS = {
    "h200": Gpu("H200 SXM", 989, 4800, 141, 54.8),
    "h100": Gpu("H100 SXM", 989, 3350, 80, 54.8),
    "h100-pcie": Gpu("H100 PCIe", 756, 2000, 80, 54.8),
    "a100": Gpu("A100 SXM 80GB", 312, 2039, 80, 25.0),
    "a100-40": Gpu("A100 SXM 40GB", 312, 1555, 40, 25.0),
    "l40s": Gpu("L40S", 362, 864, 48, 25.0),
    "5090": Gpu("RTX 5090", 209.5, 1792, 32, 50.0),
    "4090": Gpu("RTX 4090", 165.2, 1008, 24, 25.0),
    "3090": Gpu("RTX 3090", 71, 936, 24, 25.0),
    "a6000": Gpu("RTX A6000", 154.8, 768, 48, 25.0),
}

# GB/s each way and us a collective. NVLink of H100 and H200: measured (270 to 310 GB/s of 450; 18 to 23 us). PCIe: the link's
# raw rate less a quarter; without peer access each byte crosses host memory, which halves it and adds a copy.
LINKS = {
    "nvlink": ("NVLink 4, 18 links each", Link(270.0, 20.0)),
    "nvlink3": ("NVLink 3, 12 links each", Link(180.0, 20.0)),
    "nvlink-bridge": ("NVLink bridge between pairs, 4 links", Link(42.0, 20.0)),
    "pcie5": ("PCIe 5.0 x16 with peer access", Link(48.0, 25.0)),
    "pcie4-p2p": ("PCIe 4.0 x16 with peer access", Link(24.0, 25.0)),
    "pcie4": ("PCIe 4.0 x16 through host memory", Link(10.0, 40.0)),
    "pcie3": ("PCIe 3.0 x16 through host memory", Link(5.0, 40.0)),
}
NETWORK_LATENCY_US = 60.0
_LAUNCH_US = 2.5  # between kernels of a captured call


def device(name: str) -> DeviceRates:
    """Rates of a GPU by its key in `GPUS`. Raises KeyError."""
    gpu = GPUS[name]
    matrix = tuple((rows, share * gpu.bf16_tflops) for rows, share in _MATRIX_SHARE)
    attention = tuple((rows, share * gpu.bf16_tflops) for rows, share in _ATTENTION_SHARE)
    return DeviceRates(gpu.name, matrix, attention, gpu.memory_gbs * _MEMORY_SHARE, gpu.memory_gib * 2**30)


def profile(
    gpus: Sequence[str], link: str = "nvlink", ranks_per_host: int | None = None, network_gbits: float = 100.0
) -> MachineProfile:
    """A machine of these GPUs, one rank each; hosts of `ranks_per_host` share `network_gbits` Gb/s each.

    Raises ValueError for names that are not in the tables.
    """
    for kind, name, table in [("GPU", gpu, GPUS) for gpu in gpus] + [("link", link, LINKS)]:
        if name not in table:
            raise ValueError(f"{kind} {name!r} is not known; known: {', '.join(table)}")
    here = ranks_per_host or len(gpus)
    near = LINKS[link][1]
    far = Link(network_gbits / 8 * 0.9 / here, NETWORK_LATENCY_US)
    names = [*dict.fromkeys(GPUS[gpu].name for gpu in gpus)]
    text = f"data sheets of {', '.join(names)}; {LINKS[link][0]}"
    if here < len(gpus):
        text += f"; {network_gbits:g} Gb/s between hosts"
    links = tuple(tuple(near if a // here == b // here else far for b in range(len(gpus))) for a in range(len(gpus)))
    host = min(GPUS[gpu].host_gbs for gpu in gpus)
    return MachineProfile(tuple(device(gpu) for gpu in gpus), links, host, _LAUNCH_US, source=text)
