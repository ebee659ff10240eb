"""What a large prompt took of host memory goes back to the system."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from comfy import host_memory
from comfy.host_memory import HostMemory, private_bytes
from comfy_execution.worker import PromptWorker

MIB = 2**20

if host_memory._malloc_trim() is None or not private_bytes():
    pytest.skip("not glibc on Linux", allow_module_level=True)


def fragments() -> list[torch.Tensor]:
    """About 320 MiB in pieces that the allocator keeps, freed but for some that lie between them."""
    pieces = [torch.ones(20_000) for _ in range(4_000)]
    return pieces[::200]


def in_thread() -> list[torch.Tensor]:
    """The same in a thread, which has an arena of its own."""
    kept: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: kept.extend(fragments()))
    thread.start()
    thread.join()
    return kept


@pytest.mark.parametrize("work", [fragments, in_thread])
def test_freed_memory_goes_back(work) -> None:
    memory = HostMemory()
    memory.trim()
    before = private_bytes()
    kept = work()
    gc.collect()
    grown = private_bytes() - before
    assert grown > 200 * MIB, "the allocator keeps it"
    assert memory.trim() > 150 * MIB
    assert private_bytes() - before < 100 * MIB
    assert len(kept) == 20


def test_little_growth_costs_nothing(monkeypatch) -> None:
    calls: list[int] = []
    size = 1000 * MIB
    monkeypatch.setattr(host_memory, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(host_memory, "private_bytes", lambda: size)
    memory = HostMemory()
    memory.trim()
    assert len(calls) == 1, "the first time it is not known what is left of earlier work"
    size += 40 * MIB
    memory.trim()
    assert len(calls) == 1
    size += 40 * MIB
    memory.trim()
    memory.trim()
    assert len(calls) == 2


def test_the_worker_trims_between_prompts(monkeypatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(host_memory, "trim", lambda: calls.append(None))
    worker = PromptWorker(None, None)
    worker._collect_garbage()
    assert not calls
    worker._gc_due = True
    worker._collect_garbage()
    assert len(calls) == 1


def test_without_glibc_nothing_happens(monkeypatch) -> None:
    monkeypatch.setattr(host_memory, "_malloc_trim", lambda: None)
    assert HostMemory().trim() == 0
