"""Memory on GPUs of one host that the ranks of a group write to directly, by the copy engines.

A copy engine moves data while the multiprocessors compute; a collective's kernel needs multiprocessors, and beside a
matrix product that has them all it only waits (docs/parallel_modes.md). Every rank has a few slots to receive in, which its
peers have mapped (CUDA's virtual memory, through torch's symmetric memory). What a rank writes is announced by a number
in its peer's memory that grows by one each time: plain stores, which PCIe carries as well as NVLink does. The numbers that
are waited for are kept on the device, so captured graphs go on counting.

A rank that waits also looks at a word in its own host memory: `abort` sets it, and the wait ends though no peer came.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from .processes import shares_gpus

SLOTS = 4
"""Exchanges that may be under way and not yet read on one rank, plus one."""

_CHANNELS = 2  # announcements on the caller's stream, and on the stream of the copies
_FLAG_BYTES = 4096
_POLLS = 64  # of a peer's number between two looks at the word in host memory, which is far away


class NoPeerMemory(RuntimeError):
    """The GPUs of a group cannot write to one another's memory; the message says why."""


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def meet(table, counters, index, channel, SIZE: tl.constexpr, POLLS: tl.constexpr):  # type: ignore[no-untyped-def]
        # One program for each rank. table: addresses of all ranks' flags [channel, rank], then that of the host's word.
        peer = tl.program_id(0)
        if peer != index:
            number = tl.load(counters + channel * SIZE + peer) + 1
            tl.store(counters + channel * SIZE + peer, number)
            there = tl.load(table + peer) + 4 * (channel * SIZE + index)
            tl.inline_asm_elementwise(
                "st.release.sys.global.s32 [$1], $2; mov.u32 $0, 0;", "=r,l,r", [there, number], dtype=tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
            here = tl.load(table + index) + 4 * (channel * SIZE + peer)
            stop = tl.load(table + SIZE).to(tl.pointer_type(tl.int32))
            polls = 0
            missing = 1
            while missing > 0:
                seen = tl.inline_asm_elementwise(
                    "ld.acquire.sys.global.s32 $0, [$1];", "=r,l", [here], dtype=tl.int32, is_pure=False, pack=1
                )
                missing = number - seen  # right across the overflow of 32 bits as well
                polls += 1
                if polls % POLLS == 0:  # noqa: SIM102  # Triton evaluates both sides of an `and`
                    if tl.load(stop, volatile=True) != 0:
                        missing = 0

    return meet


def _check_access(device: torch.device, devices: Sequence[int]) -> None:
    """Raises NoPeerMemory unless `device` can write to the memory of all these."""
    mine = device.index or 0
    for other in devices:
        if other != mine and not torch.cuda.can_device_access_peer(mine, other):
            raise NoPeerMemory(f"GPU {mine} cannot write to the memory of GPU {other}")


class PeerMemory:
    """Slots of this rank, those of its peers as they are mapped here, and the means to meet.

    Made by all `ranks` together. store: what they find one another through. devices: each rank's GPU. slot_bytes: of each of
    the `SLOTS` slots, the same on all ranks. Raises NoPeerMemory on all of them when one cannot.
    """

    def __init__(
        self,
        store: Any,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        devices: Sequence[int],
        slot_bytes: int,
    ) -> None:
        self.ranks, self.size, self.index = ranks, len(ranks), ranks.index(rank)
        self.device = device
        self.slot_bytes = -(-slot_bytes // 256) * 256
        self._store = store  # symmetric memory does not keep the Python part of it
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._agreed("memory", functools.partial(self._allocate, devices))
        self._agreed("mapped", self._map)
        self.stream = torch.cuda.Stream(device)

    def _agreed(self, step: str, do: Any) -> None:
        """Do a step on all ranks, or raise what kept one of them from it."""
        reason = b""
        try:
            do()
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0].encode()[:200] or b"no reason given"
        self._store.set(f"{step}/{self.index}", reason or b"done")
        for place, rank in enumerate(self.ranks):
            said = self._store.get(f"{step}/{place}")
            if said != b"done":
                raise NoPeerMemory(f"rank {rank}: {said.decode(errors='replace')}")

    def _allocate(self, devices: Sequence[int]) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory as SymmetricMemory

        _check_access(self.device, devices)
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and not everywhere sound
        if shares_gpus(os.environ):
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        size = SLOTS * self.slot_bytes + _FLAG_BYTES
        self._whole = SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device)
        self._whole[-_FLAG_BYTES:].zero_()
        torch.cuda.synchronize(self.device)

    def _map(self) -> None:
        c10d: Any = importlib.import_module("torch._C._distributed_c10d")  # its types differ between versions
        # Symmetric memory looks a group up by name, and of it only uses the store; which way depends on torch's version.
        name = f"taco-{self._store.name}"
        c10d._SymmetricMemory.set_group_info(name, self.index, self.size, self._store)
        group = c10d.ProcessGroup(self._store, self.index, self.size)  # the register does not keep it
        c10d._register_process_group(name, group)
        try:
            self._handle = c10d._SymmetricMemory.rendezvous(self._whole, name)
        finally:
            c10d._unregister_process_group(name)
        length = self._whole.numel()
        self._peers = [self._handle.get_buffer(peer, (length,), torch.uint8) for peer in range(self.size)]
        flags = [address + length - _FLAG_BYTES for address in self._handle.buffer_ptrs]
        self._table = torch.tensor([*flags, self._stop.data_ptr()], dtype=torch.int64, device=self.device)
        self._counters = torch.zeros(_CHANNELS, self.size, dtype=torch.int32, device=self.device)

    def received(self, slot: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `count` entries of a slot of this rank."""
        start = slot * self.slot_bytes
        return self._whole[start : start + count * dtype.itemsize].view(dtype)

    def write(self, slot: int, peer: int, offset: int, data: torch.Tensor) -> None:
        """Copy flat, contiguous `data` to entry `offset` of a slot of the rank at place `peer`, on the current stream."""
        size = data.dtype.itemsize
        start = slot * self.slot_bytes + offset * size
        self._peers[peer][start : start + data.numel() * size].copy_(data.view(torch.uint8))

    def meet(self, channel: int) -> None:
        """On the current stream: announce what was written before, and wait until all peers have announced theirs.

        All ranks meet equally often on each channel, 0 or 1.
        """
        _kernel()[(self.size,)](
            self._table, self._counters, self.index, channel, SIZE=self.size, POLLS=_POLLS, num_warps=1
        )  # fmt: skip

    def abort(self) -> None:
        """End all waiting, now and later; what was received is not to be used afterwards. From any thread."""
        self._stop.fill_(1)
