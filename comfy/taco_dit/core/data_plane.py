"""Groups of ranks for tensors, in generations: when a prompt fails, a generation is thrown away and a new one made.

Tensors on GPUs go through NCCL, in process groups made directly from torch's class, not through torch.distributed's
global registry; tensors in host memory go through streams of our own (`socket_group`). Both can be left while a peer does
not come: NCCL communicators are aborted, streams closed.
"""

from __future__ import annotations

import collections
import datetime
import gc
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from .control_client import ControlClient
from .peer_memory import PeerMemory
from .socket_group import SocketGroup

ABORT_DEADLINE_S = 8.0
ABANDONED = "this prompt was abandoned by another rank"


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> None:
        """Return when its result can be used: at once on a GPU, whose current stream waits instead."""


class Group(Protocol):
    """Collectives among some ranks, on tensors of one kind of device. `index` is this rank's position among `ranks`."""

    ranks: tuple[int, ...]
    size: int
    index: int

    def all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> None:
        """Part i of `send` (rows of the first axis) goes to rank i; parts may be of any size, also 0."""

    def all_gather(self, local: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Concatenate every rank's `local` along the first axis; rank i contributes `rows[i]` rows."""

    def gather_into(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """Fill `out` with every rank's `local` of equal size, in order; `local` may be this rank's place in `out`."""

    def reduce_scatter(self, parts: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """This rank's rows of the sum of every rank's `parts`; rank i gets `rows[i]` rows of the first axis, in order."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `tensor`, the same bits on every rank."""

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` with that of the rank at position `source`."""

    def shift(self, out: torch.Tensor, send: torch.Tensor) -> Pending:
        """Begin to send `send` to the next rank and to fill `out` from the previous one; both are flat, of any size.

        Neither may be changed before `Pending.wait` returned, and the group takes no call but `shift` until then.
        """

    def start_all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> Pending:
        """Begin an `all_to_all`; the same rules as for `shift` hold until its end."""

    def abort(self) -> None:
        """Leave collectives in progress; the group is unusable afterwards."""


class _OnStream:
    """Communication on a side stream. It keeps its tensors: their memory must not be reused before the streams meet."""

    def __init__(self, stream: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        self._stream, self._tensors = stream, tensors

    def wait(self) -> None:
        torch.cuda.current_stream(self._tensors[0].device).wait_stream(self._stream)
        self._tensors = self._tensors[:1]


class NcclGroup:
    """A group on GPUs. Collectives run on the caller's stream, those that are begun on one of the group's own."""

    def __init__(self, backend: Any, ranks: tuple[int, ...], rank: int, store: Any = None) -> None:
        self._backend = backend
        self._store = store  # torch does not keep the Python part of a store, which it needs at the first collective
        self.ranks = ranks
        self.size = len(ranks)
        self.index = ranks.index(rank)
        self._side: Any = None

    @staticmethod
    def _options(kind: type[Any]) -> Any:
        options = kind()
        if hasattr(options, "asyncOp"):
            options.asyncOp = False  # on the caller's stream: no event synchronisation around each collective
        return options

    def all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> None:
        """As `Group.all_to_all`."""
        work = self._backend.alltoall_base(
            out, send, list(out_splits), list(send_splits), self._options(AllToAllOptions)
        )
        if work is not None:
            work.wait()

    def all_gather(self, local: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """As `Group.all_gather`."""
        most = max(rows)
        padded = local.contiguous()
        if local.shape[0] < most:
            padded = local.new_zeros((most, *local.shape[1:]))
            padded[: local.shape[0]] = local
        out = padded.new_empty((self.size * most, *local.shape[1:]))
        if out.numel():
            self.gather_into(out, padded)
        if min(rows) == most:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(most), rows)])

    def gather_into(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """As `Group.gather_into`."""
        work = self._backend._allgather_base(out, local, self._options(AllgatherOptions))
        if work is not None:
            work.wait()

    def reduce_scatter(self, parts: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """As `Group.reduce_scatter`. NCCL's takes equal numbers of rows: fewer are filled up with what nobody reads."""
        most, padded = max(rows), parts.contiguous()
        if min(rows) < most:
            padded = parts.new_zeros((self.size * most, *parts.shape[1:]))
            for place, part, count in zip(padded.split(most), parts.split(list(rows)), rows):
                place[:count] = part
        out = parts.new_empty((most, *parts.shape[1:]))
        if out.numel():
            work = self._backend._reduce_scatter_base(out, padded, self._options(ReduceScatterOptions))
            if work is not None:
                work.wait()
        return out[: rows[self.index]]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `Group.all_reduce`."""
        out = tensor.clone(memory_format=torch.contiguous_format)
        work = self._backend.allreduce([out], self._options(AllreduceOptions))
        if work is not None:
            work.wait()
        return out

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """As `Group.broadcast`."""
        options = self._options(BroadcastOptions)
        options.rootRank = source
        work = self._backend.broadcast([tensor], options)
        if work is not None:
            work.wait()

    def shift(self, out: torch.Tensor, send: torch.Tensor) -> Pending:
        """As `Group.shift`. An all-to-all in which only neighbours get something: it can be captured in CUDA graphs."""
        sent, received = [0] * self.size, [0] * self.size
        sent[(self.index + 1) % self.size] = send.numel()
        received[(self.index - 1) % self.size] = out.numel()
        return self.start_all_to_all(out, send, received, sent)

    def start_all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> Pending:
        """As `Group.start_all_to_all`."""
        if self._side is None:
            self._side = torch.cuda.Stream(out.device)
        self._side.wait_stream(torch.cuda.current_stream(out.device))
        with torch.cuda.stream(self._side):
            self.all_to_all(out, send, out_splits, send_splits)
        return _OnStream(self._side, (out, send))

    def abort(self) -> None:
        """As `Group.abort`."""
        backend, self._backend = self._backend, None
        if backend is not None and hasattr(backend, "abort"):
            backend.abort()


class RendezvousStore(dist.Store):
    """What NCCL's ranks find each other through: keys of the control plane that begin with `prefix`.

    A wait ends with ConnectionAbortedError as soon as `stop` is true.
    """

    def __init__(self, control: ControlClient, prefix: str, stop: Callable[[], bool]) -> None:
        super().__init__()
        self._control = control
        self._prefix = self.name = prefix
        self._stop = stop

    def _key(self, key: str) -> str:
        """The control plane's key of one of torch's."""
        return self._prefix + key

    def set(self, key: str, value: Any) -> None:
        self._control.set(self._key(key), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        value = self._control.get(self._key(key), self._stop)
        if value is None:
            raise ConnectionAbortedError(ABANDONED)
        return value

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(self._control.peek(self._key(key)) for key in keys)

    def add(self, key: str, amount: int) -> int:
        return self._control.add(self._key(key), amount)

    def delete_key(self, key: str) -> bool:
        self._control.delete(self._key(key))
        return True

    def clone(self) -> RendezvousStore:
        return self


class SymmetricStore(RendezvousStore):
    """What symmetric memory's ranks find each other through.

    Torch numbers their exchanges (`NAME/NUMBER/RANK`) by a counter of the process. A rank that was started again has
    counted less than its peers and would wait for ever, so numbers are counted from the first that this store sees.
    """

    def __init__(self, control: ControlClient, prefix: str, stop: Callable[[], bool]) -> None:
        super().__init__(control, prefix, stop)
        self._first: dict[str, int] = {}

    def _key(self, key: str) -> str:
        found = re.fullmatch(r"(.*)/(\d+)/(\d+)", key)
        if found is None:
            return self._prefix + key
        name, number, rank = found.groups()
        return f"{self._prefix}{name}/{int(number) - self._first.setdefault(name, int(number))}/{rank}"


def _abort_group(group: Group) -> None:
    try:
        group.abort()
    except RuntimeError as error:
        logging.debug("aborting a process group: %s", error)


class DataPlane:
    """All groups of this process. `generation` must change on all ranks together."""

    def __init__(self, control: ControlClient, rank: int, world_size: int, device: torch.device) -> None:
        self._control = control
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.generation = 0
        self._groups: dict[tuple[str, tuple[int, ...], str], Any] = {}
        self._peer_memories: collections.Counter[tuple[int, ...]] = collections.Counter()  # made in this generation
        self._lock = threading.RLock()
        self._aborted = False
        self._releases: list[Callable[[], None]] = []

    def group(self, ranks: Sequence[int], device_type: str | None = None, purpose: str = "") -> Group:
        """The group of `ranks` for tensors on `device_type` (this rank's device by default); made on first use.

        Groups of the same ranks for different purposes may be used at the same time.
        Only the ranks named need to call. Raises ConnectionAbortedError when the prompt is abandoned meanwhile.
        """
        members = tuple(ranks)
        kind = device_type or self.device.type
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError(ABANDONED)
            known: Group | None = self._groups.get((kind, members, purpose))
            if known is not None:
                return known
        made = self._make(kind, members, purpose)  # without the lock: NCCL waits for peers
        with self._lock:
            if not self._aborted:
                kept: Group = self._groups.setdefault((kind, members, purpose), made)
                return kept
        made.abort()
        raise ConnectionAbortedError(ABANDONED)

    def _make(self, kind: str, members: tuple[int, ...], purpose: str) -> Group:
        name = f"generation/{self.generation}/{kind}{purpose}/{'-'.join(map(str, members))}/"
        if kind != "cuda":
            return SocketGroup(self._control.open_pair, name, members, self.rank)
        generation = self.generation
        store = RendezvousStore(self._control, name, lambda: self._aborted or self.generation != generation)
        index = members.index(self.rank)
        # Making a communicator cannot be abandoned, waiting here can.
        store.set(f"here/{index}", b"1")
        store.wait([f"here/{i}" for i in range(len(members))])
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(hours=1)
        return NcclGroup(dist.ProcessGroupNCCL(store, index, len(members), options), members, self.rank, store)

    def peer_memory(self, ranks: Sequence[int], slot_bytes: int) -> PeerMemory:
        """Memory that these ranks of this host write to directly, with slots of so many bytes; what they had is dropped.

        All of them call it. Raises NoPeerMemory on all of them, and ConnectionAbortedError as `group` does.
        """
        members = tuple(ranks)
        self.drop_peer_memory(members)
        self._peer_memories[members] += 1
        name = f"generation/{self.generation}/peers{self._peer_memories[members]}/{'-'.join(map(str, members))}/"
        generation = self.generation
        store = SymmetricStore(self._control, name, lambda: self._aborted or self.generation != generation)
        count = torch.cuda.device_count()
        made = PeerMemory(store, members, self.rank, self.device, [rank % count for rank in members], slot_bytes)
        with self._lock:
            if not self._aborted:
                self._groups["peers", members, ""] = made
                return made
        made.abort()
        raise ConnectionAbortedError(ABANDONED)

    def drop_peer_memory(self, ranks: Sequence[int]) -> None:
        """Forget the memory of these ranks, if there is any; it is freed when nothing else refers to it."""
        with self._lock:
            self._groups.pop(("peers", tuple(ranks), ""), None)

    def abort(self, deadline_s: float = ABORT_DEADLINE_S) -> bool:
        """Leave every collective and refuse new ones until `renew`. May be called from any thread.

        NCCL's abort first ends the kernels that wait for peers, then waits until no CUDA graph refers to the
        communicator any more; a graph cannot be destroyed while such a kernel of it runs. So aborts are begun, each in
        a thread of its own, and graphs are destroyed meanwhile (`before_groups_end`). Returns whether all ended within
        the deadline; a rank for which this is False cannot go on and must be replaced.
        """
        with self._lock:
            if self._aborted:
                return True
            self._aborted = True
            groups, self._groups = list(self._groups.values()), {}
        self._control.poke()
        threads = [threading.Thread(target=_abort_group, args=(group,), daemon=True) for group in groups]
        threads += [threading.Thread(target=release, daemon=True) for release in self._releases]
        for thread in threads:
            thread.start()
        end = time.monotonic() + deadline_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            logging.error("TACO-DiT: rank %d could not leave its process groups within %.0f s", self.rank, deadline_s)
            return False
        del groups, threads
        gc.collect()
        return True

    def before_groups_end(self, release: Callable[[], None]) -> None:
        """Call `release` whenever groups are aborted; it must free what refers to them, such as captured CUDA graphs."""
        self._releases.append(release)

    @property
    def aborted(self) -> bool:
        """Whether this generation was abandoned."""
        return self._aborted

    def renew(self, generation: int) -> None:
        """Start a new generation of groups."""
        with self._lock:
            self._groups = {}
            self._peer_memories.clear()  # a rank that was started again counts from the beginning
            self.generation = generation
            self._aborted = False
        gc.collect()
