"""Exchange through peers' memory: where everything lands, when a slot is used again, and when collectives are used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy.taco_dit.core import data_plane
from comfy.taco_dit.core.peer_memory import SLOTS, NoPeerMemory
from comfy.taco_dit.core.plan import share
from comfy.taco_dit.core.transports import Transports, entries_of_call
from comfy.taco_dit.parallel import peer_exchange
from comfy.taco_dit.parallel.peer_exchange import PeerExchange


class Collectives:
    """In place of a process group: says that it was used."""

    def __init__(self, size: int, index: int) -> None:
        self.size, self.index, self.used = size, index, 0

    def all_to_all(self, out: torch.Tensor, send: torch.Tensor, *splits: Any) -> None:
        self.used += 1
        out.zero_()


class HostMemory:
    """`PeerMemory` of ranks that are threads of this process."""

    def __init__(self, index: int, slots: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.index, self._slots, self._barrier = index, slots, barrier
        self.slot_bytes = slots[0].shape[1]
        self.device, self.stream = torch.device("cpu"), _Stream()

    def received(self, slot: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self._slots[self.index][slot, : count * dtype.itemsize].view(dtype)

    def write(self, slot: int, peer: int, offset: int, data: torch.Tensor) -> None:
        size = data.dtype.itemsize
        self._slots[peer][slot, offset * size : (offset + data.numel()) * size] = data.view(torch.uint8)

    def meet(self, channel: int) -> None:
        self._barrier.wait(20)


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`threads(size, slot_bytes, work)`: work(exchange) on `size` ranks; what they return."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": lambda self, stream: None})())

    def run(size: int, slot_bytes: int, work: Callable[[PeerExchange], Any]) -> list[Any]:
        slots = [torch.full((SLOTS, slot_bytes), 255, dtype=torch.uint8) for _ in range(size)]
        barrier, found = threading.Barrier(size), [None] * size

        def rank(index: int) -> None:
            try:
                found[index] = work(PeerExchange(Collectives(size, index), HostMemory(index, slots, barrier)))
            except BaseException:
                barrier.abort()
                raise

        started = [threading.Thread(target=rank, args=(index,)) for index in range(size)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(30)
        return found

    return run


def _shares(count: int, size: int) -> list[tuple[int, int]]:
    return [share(count, size, rank) for rank in range(size)]


@pytest.mark.parametrize("size,heads,length", [(2, 4, 11), (3, 5, 13), (3, 2, 4), (4, 8, 3)])
def test_heads_and_tokens_arrive(threads: Callable[..., list[Any]], size: int, heads: int, length: int) -> None:
    """Uneven heads and tokens, ranks without either; three parts and one; back again; many times through all slots."""
    torch.manual_seed(1)
    whole = [torch.randn(2, heads, length, 8) for _ in range(3)]
    tokens, ranges = _shares(length, size), _shares(heads, size)
    counts = [stop - start for start, stop in tokens]

    def work(exchange: PeerExchange) -> bool:
        (a, b), (first, last) = tokens[exchange.index], ranges[exchange.index]
        mine = [t[:, :, a:b] for t in whole]
        with exchange.during_blocks():
            for turn in range(2 * SLOTS + 1):
                parts = [t + turn for t in mine][: 1 if turn % 2 else 3]
                brought = exchange.start_heads(parts, ranges, counts)
                found = brought.result()
                assert all(torch.equal(f, t[:, first:last] + turn) for f, t in zip(found, whole, strict=False))
                back = exchange.start_tokens(found[0] * 2, ranges, counts)
                assert torch.equal(back.result(), parts[0] * 2)
                assert back.result() is back.result()
        return exchange._group.used == 0

    assert threads(size, 1 << 16, work) == [True] * size


def test_when_collectives_are_used(threads: Callable[..., list[Any]]) -> None:
    """Outside of blocks, for what does not fit on the rank with most, and for a fourth transfer that nobody has read."""
    ranges, counts = _shares(3, 2), [5, 4]

    def work(exchange: PeerExchange) -> list[int]:
        parts = [torch.ones(1, 3, counts[exchange.index], 8)]
        used = []

        def note(start: Callable[..., Any], *arguments: Any) -> Any:
            before = exchange._group.used
            arriving = start(*arguments)
            used.append(exchange._group.used - before)
            return arriving

        note(exchange.start_heads, parts, ranges, counts)
        with exchange.during_blocks():
            many = [note(exchange.start_heads, parts, ranges, counts) for _ in range(SLOTS)]
            for one in many:
                one.result()
            with exchange.during_blocks():  # a network within
                note(exchange.start_heads, parts, ranges, counts).result()
        big = [torch.ones(1, 3, counts[exchange.index], 64)]
        with exchange.during_blocks():
            note(exchange.start_heads, big, ranges, counts).result()
            note(exchange.start_tokens, torch.ones(1, ranges[exchange.index][1], 9, 64), ranges, counts).result()
        return used

    # rank 0 has 2 heads of 9 tokens and rank 1 has 1: both must choose by what rank 0 receives
    found = threads(2, 9 * 2 * 8 * 4, work)
    assert found[0] == found[1] == [1, *[0] * (SLOTS - 1), 1, 0, 1, 1]


def test_a_slot_that_is_being_read_is_not_written(threads: Callable[..., list[Any]]) -> None:
    """Results that are read late, while two further transfers are under way, are those of their own transfer."""
    ranges, counts = _shares(4, 2), [3, 3]

    def work(exchange: PeerExchange) -> bool:
        good = True
        with exchange.during_blocks():
            waiting: list[Any] = []
            for turn in range(20):
                part = torch.full((1, 4, 3, 8), float(turn))
                waiting.append((turn, exchange.start_heads([part], ranges, counts)))
                if len(waiting) == SLOTS - 1:
                    wanted, arriving = waiting.pop(0)
                    good &= bool((arriving.result()[0] == wanted).all())
        return good and exchange._group.used == 0

    assert threads(2, 1 << 12, work) == [True, True]


class Manager:
    """A `TACODiTDistributedManager` whose GPUs can, or cannot, write to one another's memory."""

    def __init__(self, rank: int, can: bool) -> None:
        self.rank, self.world_size, self.device = rank, 2, torch.device("cuda", rank)
        self.info = SimpleNamespace(local_world_size=2)
        self.can, self.made, self.data = can, 0, self

    def group(self, ranks: tuple[int, ...]) -> Collectives:
        return Collectives(len(ranks), ranks.index(self.rank))

    def peer_memory(self, ranks: tuple[int, ...], slot_bytes: int) -> Any:
        self.made += 1
        if not self.can:
            raise NoPeerMemory("rank 1: GPU 1 cannot write to the memory of GPU 0")
        return SimpleNamespace(ranks=ranks, slot_bytes=slot_bytes)

    def drop_peer_memory(self, ranks: tuple[int, ...]) -> None:
        self.made -= 1


@pytest.mark.parametrize("can", [True, False])
def test_a_rank_that_is_started_again_does_as_the_others(can: bool) -> None:
    """Each rank asks the others equally often, so none waits; what was found out once is not tried again."""
    rounds, barrier = [[None, None], [None, None]], threading.Barrier(2)

    def gather_of(rank: int) -> Callable[[str, Any], list[Any]]:
        def gather(topic: str, value: Any) -> list[Any]:
            for place, given in zip(rounds, (topic, value), strict=True):
                place[rank] = given
            barrier.wait(10)
            topics, values = list(rounds[0]), list(rounds[1])
            barrier.wait(10)
            assert topics[0] == topics[1]
            return values

        return gather

    def transports(rank: int) -> tuple[Manager, Transports]:
        manager = Manager(rank, can)
        return manager, Transports("peer", manager, gather_of(rank), lambda: None, None)  # type: ignore[arg-type]

    ranks = [transports(0), transports(1)]
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda each: each[1].exchange((0, 1)), ranks))
        assert [isinstance(exchange, PeerExchange) for exchange in found] == [can, can]
        assert [one.text == "copy engines" for _, one in ranks] == [can, can]
        assert can or "cannot write to the memory of GPU 0" in ranks[1][1].text
        ranks[1] = transports(1)
    assert ranks[0][0].made == (2 if can else 0)


def test_ranks_meet_under_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a rank that was started again, which has made none of the memory that the others had before."""
    names: list[str] = []

    def made(store: Any, *others: Any) -> Any:
        names.append(store.name)
        return SimpleNamespace(abort=lambda: None)

    monkeypatch.setattr(data_plane, "PeerMemory", made)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    control: Any = SimpleNamespace(poke=lambda: None)
    old, new = (data_plane.DataPlane(control, rank, 2, torch.device("cpu")) for rank in (0, 1))
    for size in (1, 2):  # room grew once
        old.peer_memory((0, 1), size)
    assert old.abort()
    for plane in (old, new):
        plane.renew(1)
        plane.peer_memory((0, 1), 1)
    assert len(set(names[:2])) == 2 and names[2] == names[3] and names[2] not in names[:2]


def test_a_process_that_has_counted_less_finds_its_peers() -> None:
    """Torch's numbers go on in a process that lives; a rank that was started again begins at 0."""
    kept: dict[str, bytes] = {}
    control: Any = SimpleNamespace(set=kept.__setitem__, get=lambda key, stop: kept[key])
    old, new = (data_plane.SymmetricStore(control, "g/", lambda: False) for _ in range(2))
    for turn in range(2):
        old.set(f"exchange/{7 + turn}/0", f"old {turn}")
        new.set(f"exchange/{turn}/1", f"new {turn}")
        assert old.get(f"exchange/{7 + turn}/1") == f"new {turn}".encode()
        assert new.get(f"exchange/{turn}/0") == f"old {turn}".encode()
    old.set("memory/0", "done")
    assert new.get("memory/0") == b"done" and len(kept) == 5


def test_room_for_a_call() -> None:
    """What `reserve` is told is enough for heads of any distribution of tokens."""
    for heads, ranks, tokens in ((24, 2, 4608), (5, 3, 77), (2, 3, 9)):
        most = max(stop - start for start, stop in _shares(heads, ranks))
        assert entries_of_call(2, tokens, heads * 16, heads, ranks) >= 3 * 2 * tokens * most * 16
    assert peer_exchange.SLOTS >= 4, "double attention has three transfers under way"
