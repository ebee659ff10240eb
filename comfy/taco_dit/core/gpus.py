"""Which GPUs a start uses, and what is said of them. Asks NVIDIA's management library; nothing here imports torch."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

GIB = 2**30
# Compute capabilities (NVIDIA's number of a GPU's generation).
TORCH_NEEDS = (7, 5)  # the oldest for which torch 2.13's own packages, built with CUDA 13, have kernels
BF16_NEEDS = (8, 0)
SMALL_GIB = 11.0  # Flux's weights in fp8; what a GPU with less holds of larger networks is copied to it in every step
ALIKE = 0.9  # cards of one kind differ by a few per cent in what they report


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine. `memory` (bytes) and `capability` are None where the driver does not tell them."""

    index: int
    name: str = "NVIDIA GPU"
    memory: int | None = None
    capability: tuple[int, int] | None = None

    @property
    def gib(self) -> str:
        """Its memory for people; empty when unknown."""
        return "" if self.memory is None else f"{self.memory / GIB:.0f} GiB"

    def is_below(self, needed: tuple[int, int]) -> bool:
        """Whether its generation is known to be older."""
        return self.capability is not None and self.capability < needed

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Choice:
    """What a start uses.

    `devices`: entries for CUDA_VISIBLE_DEVICES, in the order of the ranks; none: the CPU. `why`: what is to be said
    before the list of GPUs in the line that says what is used. `messages`: warnings, one line each.
    """

    devices: tuple[str, ...] = ()
    why: str = ""
    messages: tuple[str, ...] = ()


def list_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs of this machine in PCI order, without touching them; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_describe(index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _describe(index: int) -> Gpu:
    import pynvml

    gpu = Gpu(index)
    with contextlib.suppress(pynvml.NVMLError):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        gpu = replace(gpu, name=str(pynvml.nvmlDeviceGetName(handle)))
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        gpu = replace(gpu, capability=(major, minor))
        # last: GPUs that share their memory with the CPU do not tell it
        gpu = replace(gpu, memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    return gpu


def choose_gpus(args: argparse.Namespace, environ: Mapping[str, str], present: Sequence[Gpu]) -> Choice:
    """The GPUs of a start: --gpus, else CUDA_VISIBLE_DEVICES, else all of --prefer-gpus, else all that are fit.

    Named GPUs that are not there are left out, and said.
    """
    if args.cpu:
        return Choice()
    if args.gpus is not None:
        return _named(args.gpus, present)
    if "CUDA_VISIBLE_DEVICES" in environ:
        return _visible(environ["CUDA_VISIBLE_DEVICES"], present)
    if not present:
        return Choice(messages=("no NVIDIA GPU found: computing on the CPU, which is slow",))
    preferred = args.prefer_gpus or ()
    if preferred and {gpu.index for gpu in present} >= set(preferred):
        return Choice(tuple(str(index) for index in preferred))
    return _all_fit(preferred, present)


def _named(wanted: Sequence[int], present: Sequence[Gpu]) -> Choice:
    usable = [index for index in wanted if index < len(present)]
    missing = _numbers(index for index in wanted if index >= len(present))
    if not missing:
        return Choice(tuple(map(str, usable)))
    what = f"GPU {missing} not found ({len(present)} present): "
    rest = "left out" if usable else "computing on the CPU, which is slow"
    return Choice(tuple(map(str, usable)), messages=(what + rest,))


def _visible(listed: str, present: Sequence[Gpu]) -> Choice:
    """Entries are numbers, or names of GPUs and of parts of them (`GPU-...`, `MIG-...`), which CUDA checks."""
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    known = [e for e in entries if present and (not e.lstrip("-").isdigit() or 0 <= int(e) < len(present))]
    missing = [entry for entry in entries if entry not in known]
    messages = []
    if missing:
        messages.append(f"CUDA_VISIBLE_DEVICES names GPU {', '.join(missing)}, not found: left out")
    if not known:
        why = "CUDA_VISIBLE_DEVICES is empty" if present and not entries else "no NVIDIA GPU found"
        messages.append(f"{why}: computing on the CPU, which is slow")
    return Choice(tuple(known), messages=tuple(messages))


def _all_fit(preferred: Sequence[int], present: Sequence[Gpu]) -> Choice:
    """All GPUs, without those that torch does not run on, or that would compute in another dtype than the others."""
    usable = [gpu for gpu in present if not gpu.is_below(TORCH_NEEDS)]
    messages = [
        f"{gpu} is left out: its compute capability is {_dotted(gpu.capability)}, torch's packages need "
        f"{_dotted(TORCH_NEEDS)}; with a torch built for it, name it with --gpus"
        for gpu in present
        if gpu not in usable
    ]
    modern = [gpu for gpu in usable if not gpu.is_below(BF16_NEEDS)]
    if modern:
        messages += [
            f"{gpu} is left out: it has no bf16 (compute capability {_dotted(gpu.capability)}), in which the others "
            "compute; to use it too, name all with --gpus"
            for gpu in usable
            if gpu not in modern
        ]
        usable = modern
    if not usable:
        messages.append("no GPU that can be used: computing on the CPU, which is slow")
    why = ""
    if usable and preferred:
        why = f"GPU {_numbers(preferred)} are not all there, so all of this machine are used: "
    return Choice(tuple(str(gpu.index) for gpu in usable), why, tuple(messages))


def describe_used(devices: Sequence[str], why: str, present: Sequence[Gpu], ranks: int) -> str:
    """The line that says what is used, for at least one device."""
    gpus = [present[int(device)] if device.isdigit() else None for device in devices]
    kinds = [f"{gpu.name}, {gpu.gib}".removesuffix(", ") if gpu else "" for gpu in gpus]
    if len(set(kinds)) == 1:
        each = " each" if len(gpus) > 1 and gpus[0] and gpus[0].memory else ""
        text = ", ".join(devices) + (f" ({kinds[0]}{each})" if kinds[0] else "")
    else:
        text = ", ".join(f"{device} ({kind})" if kind else device for device, kind in zip(devices, kinds))
    count = "one rank" if ranks == 1 else f"{ranks} ranks"
    name = "" if devices[0].startswith(("GPU-", "MIG-")) else "GPU "
    return f"{why or 'using '}{name}{text}; {count}"


def concerns(devices: Sequence[str], present: Sequence[Gpu]) -> list[str]:
    """What of the GPUs used costs speed or memory, one line each: too old, too small, unlike the others."""
    gpus = [present[int(device)] for device in devices if device.isdigit()]
    lines = [line for gpu in gpus for line in _concerns_of_one(gpu)]
    if len(gpus) > 1:
        lines += _concerns_of_several(gpus)
    return lines


def _concerns_of_one(gpu: Gpu) -> list[str]:
    lines = []
    if gpu.is_below(TORCH_NEEDS):
        lines.append(
            f"{gpu} is older than torch's packages support (compute capability {_dotted(gpu.capability)}, they need "
            f"{_dotted(TORCH_NEEDS)}): computing on it fails, unless your torch was built for it"
        )
    elif gpu.is_below(BF16_NEEDS):
        lines.append(
            f"{gpu} has no bf16 (compute capability {_dotted(gpu.capability)}): models are computed in fp16, or in fp32, "
            "which is several times slower, where fp16 does not suffice"
        )
    if gpu.memory is not None and gpu.memory < SMALL_GIB * GIB:
        lines.append(
            f"{gpu} has {gpu.gib}: models of its size and larger are copied to it part by part in every step, which is "
            "slow (memory that models need: README.md)"
        )
    return lines


def _concerns_of_several(gpus: Sequence[Gpu]) -> list[str]:
    lines = []
    sizes = [gpu.memory for gpu in gpus if gpu.memory is not None]
    largest = max(sizes, default=0)
    smaller = [gpu for gpu in gpus if gpu.memory is not None and gpu.memory < ALIKE * largest]
    if smaller:
        named = ", ".join(f"GPU {gpu.index} ({gpu.gib})" for gpu in smaller)
        lines.append(
            f"{named} has less memory than the others ({largest / GIB:.0f} GiB): every GPU holds the same share of a "
            "model, so the smallest one decides what fits"
        )
    names = {gpu.name for gpu in gpus}
    if len(names) > 1:
        fastest = max(gpus, key=lambda gpu: (gpu.capability or (0, 0), gpu.memory or 0))
        alike = _numbers((gpu.index for gpu in gpus if gpu.name == fastest.name), ",")
        lines.append(
            f"the GPUs are of {len(names)} kinds and get equal shares of the work, so each step takes as long as the "
            f"slowest one needs; --gpus {alike} uses {fastest.name} only"
        )
    old = [gpu for gpu in gpus if gpu.is_below(BF16_NEEDS)]
    if 0 < len(old) < len(gpus):
        lines.append(
            f"GPU {_numbers(gpu.index for gpu in old)} has no bf16, and all ranks must compute in one dtype; add --force-fp16"
        )
    return lines


def _dotted(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else f"{capability[0]}.{capability[1]}"


def _numbers(indices: Iterable[int], separator: str = ", ") -> str:
    return separator.join(str(index) for index in indices)
