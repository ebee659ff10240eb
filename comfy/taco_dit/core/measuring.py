"""Measures the machine on all ranks together, once; the result is kept for each set of devices and versions.

GPUs are measured at the first start, in about two seconds, most of which make NCCL's communicator and are needed anyway.
CPU ranks share cores with everything else, so they are measured only with `--taco-measure`. All ranks get rank 0's
profile through the control plane, also a rank that is started again later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from comfy.ldm.modules import kernels
from utils import atomic_files

from .data_plane import Group
from .distributed_manager import TACODiTDistributedManager
from .machine_profile import DeviceRates, Link, MachineProfile, assumed
from .processes import shares_gpus
from .wire import decode, encode

FILE = os.path.join("taco_dit", "machine.json")  # in the user folder
LIMIT_S = 30.0  # after that the numbers of a machine that is not measured are used
CAPTURED_LAUNCH_US = 2.5  # between kernels of a CUDA graph
_VERSION = 1  # of what is measured and how
_KEPT = 16  # profiles in the file
_VALUE = "profile/value"


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device. Widths in channels, transfers in bytes."""

    dtype: torch.dtype
    rows: tuple[int, ...]
    inner: int
    outer: int
    heads: tuple[int, ...]
    tokens: int
    head_size: int
    memory: int
    link: int
    repeats: int


SIZES = {
    "cuda": Sizes(torch.bfloat16, (256, 1152, 2304, 4608), 3072, 12288, (6, 24), 4608, 128, 1 << 28, 1 << 25, 8),
    "cpu": Sizes(torch.float32, (64, 512), 256, 512, (1, 4), 256, 64, 1 << 22, 1 << 19, 3),
}


def identity(device: torch.device) -> list[str]:
    """What the rates of this rank's device depend on."""
    if device.type != "cuda":
        return [socket.gethostname(), f"CPU, {torch.get_num_threads()} threads", str(torch.__version__)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    versions = [str(torch.__version__), str(torch.version.cuda), _driver(), nccl]
    return [socket.gethostname(), torch.cuda.get_device_name(device), *versions]


def _driver() -> str:
    """The NVIDIA driver's version."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:  # in a container without that library
        logging.debug("the driver's version is unknown: %s", error)
        return "unknown"


# --- one device ------------------------------------------------------------------------------------------------------


def _seconds(device: torch.device, function: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call, issued one after the other without waiting, after two that are not counted."""
    for _ in range(2):
        function()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        return max(1e-9, (time.perf_counter() - began) / repeats)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    stop.synchronize()
    return max(1e-9, start.elapsed_time(stop) / 1e3 / repeats)


def device_rates(device: torch.device) -> DeviceRates:
    """Matrix products, attention and memory of one device."""
    sizes = SIZES[device.type]
    weight = torch.randn(sizes.inner, sizes.outer, device=device, dtype=sizes.dtype)
    matrix = []
    for rows in sizes.rows:
        x = torch.randn(rows, sizes.inner, device=device, dtype=sizes.dtype)
        seconds = _seconds(device, lambda x=x: x @ weight, sizes.repeats)  # type: ignore[misc]
        matrix.append((rows, 2 * rows * sizes.inner * sizes.outer / seconds / 1e12))
    attention = []
    for heads in sizes.heads:
        q, k, v = torch.randn(3, 1, heads, sizes.tokens, sizes.head_size, device=device, dtype=sizes.dtype)
        seconds = _seconds(device, lambda q=q, k=k, v=v: kernels.run(q, k, v), sizes.repeats)  # type: ignore[misc]
        attention.append((heads * sizes.tokens, 4 * heads * sizes.tokens**2 * sizes.head_size / seconds / 1e12))
    source = torch.ones(sizes.memory, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    memory = 2 * sizes.memory / _seconds(device, lambda: target.copy_(source), sizes.repeats) / 1e9
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else 0
    return DeviceRates(name, tuple(matrix), tuple(attention), memory, total)


def host_rate(device: torch.device) -> float:
    """GB/s from pinned host memory to the device."""
    size = SIZES[device.type].memory // 4
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _seconds(device, lambda: target.copy_(source, non_blocking=True), 4) / 1e9


def launch_us(device: torch.device, captured: bool) -> float:
    """Time between two small kernels, launched one by one or, with `captured`, by a CUDA graph."""
    if captured and device.type == "cuda":
        return CAPTURED_LAUNCH_US
    small = torch.ones(64, device=device)
    return _seconds(device, lambda: small.add_(1.0), 100) * 1e6


# --- links -----------------------------------------------------------------------------------------------------------


def rounds(ranks: int) -> Iterator[list[int | None]]:
    """A tournament: in each round every rank has one peer, or None, and meets every other once in all rounds."""
    places: list[int | None] = [*range(ranks), *([None] if ranks % 2 else [])]
    for _ in range(len(places) - 1):
        peers: dict[int, int | None] = {}
        for a, b in zip(places, reversed(places)):
            if a is not None:
                peers[a] = b
        yield [peers[rank] for rank in range(ranks)]
        places = [places[0], places[-1], *places[1:-1]]


def link_rates(group: Group, device: torch.device) -> tuple[list[float], float]:
    """(GB/s to each rank, while all ranks send, 0 to itself; microseconds of an empty all-to-all)."""
    sizes, found = SIZES[device.type], [0.0] * group.size
    send = torch.ones(sizes.link, dtype=torch.uint8, device=device)
    out = torch.empty_like(send)
    for peers in rounds(group.size):
        peer = peers[group.index]
        splits = [sizes.link if rank == peer else 0 for rank in range(group.size)]
        mine, theirs = (send, out) if peer is not None else (send[:0], out[:0])
        seconds = _seconds(
            device, lambda m=mine, t=theirs, s=splits: group.all_to_all(t, m, s, s), sizes.repeats  # type: ignore[misc]
        )  # fmt: skip
        if peer is not None:
            found[peer] = sizes.link / seconds / 1e9
    ones = [64] * group.size
    small, received = send[: 64 * group.size], out[: 64 * group.size]
    return found, _seconds(device, lambda: group.all_to_all(received, small, ones, ones), 10) * 1e6


def measure(manager: TACODiTDistributedManager, captured: bool) -> dict[str, Any]:
    """This rank's numbers, plain data; all ranks at the same time."""
    device = manager.device
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), here:
        rates = device_rates(device)
        links, latency = [0.0], 0.0
        if manager.data is not None:
            links, latency = link_rates(manager.data.group(range(manager.world_size)), device)
        found = {"name": rates.name, "matrix": [list(p) for p in rates.matrix],
                 "attention": [list(p) for p in rates.attention], "memory_gbs": rates.memory_gbs,
                 "memory_bytes": rates.memory_bytes, "links": links, "latency_us": latency,
                 "host_gbs": host_rate(device), "launch_us": launch_us(device, captured)}  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def combine(found: list[dict[str, Any]]) -> MachineProfile:
    """The profile of the ranks that found these numbers, in rank order; the slower end of each link counts."""
    ranks = range(len(found))
    devices = tuple(
        DeviceRates(one["name"], tuple((int(size), rate) for size, rate in one["matrix"]),
                    tuple((int(size), rate) for size, rate in one["attention"]), one["memory_gbs"], one["memory_bytes"])
        for one in found
    )  # fmt: skip
    latency = max(one["latency_us"] for one in found)
    links = tuple(
        tuple(Link(1.0 if a == b else min(found[a]["links"][b], found[b]["links"][a]), latency) for b in ranks)
        for a in ranks
    )
    host = min(one["host_gbs"] for one in found)
    return MachineProfile(devices, links, host, max(one["launch_us"] for one in found), source="measured")


# --- kept on disk ----------------------------------------------------------------------------------------------------


def load(path: str, key: Any) -> MachineProfile | None:
    """The profile that was kept under a key, or None."""
    return next((profile for known, profile in _read(path) if known == key), None)


def _read(path: str) -> list[tuple[Any, MachineProfile]]:
    try:
        with open(path, encoding="utf-8") as file:
            return [(entry["key"], MachineProfile.from_dict(entry["profile"])) for entry in json.load(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s cannot be used (%s): the machine is measured again", path, error)
        return []


def keep(path: str, key: Any, profile: MachineProfile) -> None:
    """Write a profile beside those of other keys. A folder that cannot be written to is named in a warning."""
    others = [(known, kept) for known, kept in _read(path) if known != key]
    entries = [{"key": known, "profile": kept.as_dict()} for known, kept in [(key, profile), *others][:_KEPT]]
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        atomic_files.write(path, json.dumps(entries, indent=1))
    except OSError as error:
        logging.warning("%s cannot be written (%s): the machine is measured again at the next start", path, error)


# --- all ranks -------------------------------------------------------------------------------------------------------


def agreed_profile(manager: TACODiTDistributedManager, path: str, captured: bool, again: bool) -> MachineProfile:
    """The profile of this machine, the same on every rank: kept in the file at `path`, else measured now.

    captured: whether calls run in CUDA graphs. again: measure even if there is a kept one. Every rank calls it at its
    start. CPU ranks are measured only with `again`, ranks that share a GPU never: they plan as if each had its own, since
    trying what that does is what sharing is for.
    """
    cuda = manager.device.type == "cuda"
    if not (cuda or again) or (cuda and manager.world_size > 1 and shares_gpus(os.environ)):
        return assumed(manager.world_size)
    if manager.control is None:
        return _alone(manager, path, captured, again)
    if not manager.control.peek(_VALUE):  # else this rank was started again, and the others have it
        me = {"identity": identity(manager.device), "captured": captured, "version": _VERSION}
        manager.control.set(f"profile/identity/{manager.rank}", encode(me))
        if manager.rank == 0:
            _lead(manager, path, captured, again)
        else:
            _take_part(manager, captured)
    return _published(manager)


def _alone(manager: TACODiTDistributedManager, path: str, captured: bool, again: bool) -> MachineProfile:
    key = [{"identity": identity(manager.device), "captured": captured, "version": _VERSION}]
    kept = None if again else load(path, key)
    if kept is None:
        try:
            kept = combine([measure(manager, captured)])
        except (RuntimeError, OSError) as error:
            logging.warning("TACO-DiT: the machine could not be measured: %s", error)
            return assumed(1)
        keep(path, key, kept)
    return kept


def _ask_all(manager: TACODiTDistributedManager, topic: str) -> list[Any] | None:
    """Every rank's value of a topic, or None when they are not there in time."""
    assert manager.control is not None
    end, found = time.monotonic() + LIMIT_S, []
    for rank in range(manager.world_size):
        value = manager.control.get(f"profile/{topic}/{rank}", lambda: time.monotonic() > end)
        if value is None:
            return None
        found.append(decode(value))
    return found


def _lead(manager: TACODiTDistributedManager, path: str, captured: bool, again: bool) -> None:
    """Rank 0: a kept profile, or the numbers of all ranks, for everybody."""
    assert manager.control is not None
    key = _ask_all(manager, "identity")
    kept = None if again or key is None else load(path, key)
    measuring = kept is None and key is not None
    manager.control.set("profile/measure", encode(measuring))
    if measuring:
        _report(manager, captured)
        found = _ask_all(manager, "numbers")
        if found is not None and None not in found:
            kept = combine(found)
            keep(path, key, kept)
    manager.control.set(_VALUE, encode({} if kept is None else kept.as_dict()))


def _take_part(manager: TACODiTDistributedManager, captured: bool) -> None:
    assert manager.control is not None
    end = time.monotonic() + 2 * LIMIT_S
    wanted = manager.control.get("profile/measure", lambda: time.monotonic() > end)
    if wanted is not None and decode(wanted):
        _report(manager, captured)


def _report(manager: TACODiTDistributedManager, captured: bool) -> None:
    """Measure and say the result, None when it failed; a peer that does not come is waited for LIMIT_S at most."""
    assert manager.control is not None and manager.data is not None
    limit = threading.Timer(LIMIT_S, manager.data.abort)
    limit.daemon = True
    limit.start()
    found = None
    try:
        found = measure(manager, captured)
    except (RuntimeError, OSError) as error:
        logging.warning("rank %d could not measure the machine: %s", manager.rank, error)
    finally:
        limit.cancel()
    manager.control.set(f"profile/numbers/{manager.rank}", encode(found))


def _published(manager: TACODiTDistributedManager) -> MachineProfile:
    assert manager.control is not None and manager.data is not None
    end = time.monotonic() + 4 * LIMIT_S
    value = manager.control.get(_VALUE, lambda: time.monotonic() > end)
    content = None if value is None else decode(value)
    if not content:
        manager.data.abort()  # on all ranks: groups that one of them left are made anew for the next prompt
        if manager.rank == 0:
            logging.warning("TACO-DiT: the machine could not be measured; plans assume well-connected GPUs")
        return assumed(manager.world_size)
    return MachineProfile.from_dict(content)
