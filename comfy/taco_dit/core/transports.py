"""Which way heads and tokens go between the ranks of a token group: by collectives, or by copy engines into peers' memory.

Copy engines are there for GPUs of one host that can map one another's memory. Whether they gain anything depends on the
links, so both ways are tried when the first group is made: the exchange of a block beside a matrix product, captured in
a CUDA graph, on all ranks at once. The slower rank counts, and all ranks choose alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from comfy.taco_dit.parallel.exchange import CollectiveExchange, Exchange
from comfy.taco_dit.parallel.peer_exchange import PeerExchange

from .distributed_manager import TACODiTDistributedManager
from .peer_memory import NoPeerMemory, PeerMemory
from .plan import share

SMALLEST_SLOT, LARGEST_SLOT = 64 << 20, 256 << 20
_TRIAL = {
    "heads": 24,
    "tokens": 4608,
    "size": 128,
    "inner": 3072,
    "outer": 12288,
}  # a single block of Flux at 1024 x 1024
_REPEATS = 8

Gather = Callable[[str, Any], list[Any]]


class Transports:
    """Makes the exchanges of this process. One per engine.

    wanted: `parallel.exchange` of the configuration. gather: every rank's value on every rank. forget: drops captured
    calls, which refer to memory that is replaced.
    """

    def __init__(
        self, wanted: str, manager: TACODiTDistributedManager, gather: Gather, forget: Callable[[], None], clock: Any
    ) -> None:
        self._manager, self._gather, self._forget, self._clock = manager, gather, forget, clock
        self._possible = (
            wanted != "collective"
            and manager.device.type == "cuda"
            and manager.info.local_world_size == manager.world_size
        )
        self._measured = wanted == "auto"
        self._choice: list[Any] | None = None
        self._said: set[str] = set()

    def exchange(self, ranks: tuple[int, ...]) -> Exchange:
        """The exchange among these ranks; all ranks of the job make theirs at the same time."""
        data = self._manager.data
        assert data is not None
        group = data.group(ranks)
        if not self._possible:
            return CollectiveExchange(group, self._clock)
        # What was found out earlier is known to all ranks but those that were started again since.
        earlier = [choice for choice in self._gather("transport", self._choice) if choice is not None]
        self._choice = earlier[0] if earlier else None
        if self._choice is not None and not self._choice[0]:
            return self._collectives(group)
        memory, reason = self._memory(ranks, SMALLEST_SLOT)
        if self._choice is None:
            self._choice = self._choose(group, memory, reason)
        elif any(self._gather("peer memory", reason)):  # it was there before; room may have run out
            self._choice = [False, f"collectives: {reason}"]
        if memory is None or not self._choice[0]:
            data.drop_peer_memory(ranks)
            return self._collectives(group)
        return PeerExchange(group, memory, self._clock)

    @property
    def text(self) -> str:
        """What is used and why, for the status."""
        return "collectives" if self._choice is None else str(self._choice[1])

    def _collectives(self, group: Any) -> CollectiveExchange:
        if self._manager.rank == 0 and self.text not in self._said:
            self._said.add(self.text)
            logging.info("TACO-DiT: tokens go between GPUs by %s", self.text)
        return CollectiveExchange(group, self._clock)

    def _choose(self, group: Any, memory: PeerMemory | None, reason: str) -> list[Any]:
        """[whether peers' memory is used, why], the same on all ranks."""
        times = (0.0, 0.0)
        if memory is not None and self._measured:
            times = _trial(PeerExchange(group, memory), memory.device), _trial(CollectiveExchange(group), memory.device)
        found = self._gather("transports tried", (reason, *times))
        missing = [each[0] for each in found if each[0]]
        peer, collective = (max(each[i] for each in found) for i in (1, 2))
        if missing:
            return [False, f"collectives: {missing[0]}"]
        if not self._measured:
            return [True, "copy engines"]
        if peer >= collective:
            return [False, f"collectives: {collective:.2f} ms beside a product, {peer:.2f} by copy engines"]
        return [True, f"copy engines: {peer:.2f} ms beside a product, {collective:.2f} by collectives"]

    def _memory(self, ranks: tuple[int, ...], slot_bytes: int) -> tuple[PeerMemory | None, str]:
        data = self._manager.data
        assert data is not None
        try:
            return data.peer_memory(ranks, slot_bytes), ""
        except NoPeerMemory as error:
            return None, str(error)

    def reserve(self, plan: Any, entries: int, model: Any) -> None:
        """Before a call, on all ranks of a token group: room for transfers of so many entries of a model to each rank."""
        for exchange in (plan.exchange, getattr(plan, "heads", None)):
            if not isinstance(exchange, PeerExchange):
                continue
            wanted = min(entries * model.get_dtype_inference().itemsize, LARGEST_SLOT)
            if wanted <= exchange.memory.slot_bytes:
                continue
            torch.cuda.synchronize()
            self._forget()
            size = min(LARGEST_SLOT, max(wanted, exchange.memory.slot_bytes * 3 // 2))
            memory, reason = self._memory(exchange.memory.ranks, size)
            if memory is None:
                raise RuntimeError(
                    f"there is no room for {size >> 20} MiB to exchange tokens in ({reason}); set parallel.exchange to "
                    "collective in taco_dit_config.yaml"
                )
            exchange.memory = memory


def entries_of_call(rows: int, tokens: int, hidden: int, heads: int, ranks: int) -> int:
    """The most that a rank receives at once: queries, keys and values of all tokens of its heads."""
    most = max(stop - start for start, stop in (share(heads, ranks, rank) for rank in range(ranks)))
    return 3 * rows * (tokens + ranks) * most * -(-hidden // max(1, heads))


def _trial(exchange: CollectiveExchange, device: torch.device) -> float:
    """Milliseconds of an exchange beside a product that does not need it."""
    heads, tokens, size = _TRIAL["heads"], _TRIAL["tokens"], _TRIAL["size"]
    counts = [stop - start for start, stop in (share(tokens, exchange.size, rank) for rank in range(exchange.size))]
    ranges = [share(heads, exchange.size, rank) for rank in range(exchange.size)]
    local = counts[exchange.index]
    parts = [torch.randn(1, heads, local, size, device=device, dtype=torch.bfloat16) for _ in range(3)]
    x = torch.randn(local, _TRIAL["inner"], device=device, dtype=torch.bfloat16)
    weight = torch.randn(_TRIAL["inner"], _TRIAL["outer"], device=device, dtype=torch.bfloat16)

    def once() -> None:
        with exchange.during_blocks():
            for _ in range(_REPEATS):
                arriving = exchange.start_heads(parts, ranges, counts)
                torch.mm(x, weight)
                arriving.result()

    return _captured_time(once) / _REPEATS


def _captured_time(function: Callable[[], None], repeats: int = 3) -> float:
    """Milliseconds of a function that is captured in a CUDA graph."""
    function()  # kernels are made
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    stop.record()
    stop.synchronize()
    graph.reset()
    return float(start.elapsed_time(stop)) / repeats
