"""Process groups for tensors, in generations: when a prompt fails, a generation is thrown away and a new one made.

Groups are made directly from torch's process-group classes, not through torch.distributed's global registry, so that a
rank can leave a collective whose peer never came: NCCL communicators are aborted, and gloo groups are dropped, which
closes their sockets and makes the peers' collectives fail at once.
"""

from __future__ import annotations

import datetime
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions, BroadcastOptions

from .control_store import NEVER

ABORT_DEADLINE_S = 8.0


class Group:
    """Collectives among some ranks, on tensors of one kind of device."""

    def __init__(self, backend: Any, ranks: tuple[int, ...], rank: int) -> None:
        self._backend = backend
        self.ranks = ranks
        self.size = len(ranks)
        self.index = ranks.index(rank)

    @staticmethod
    def _options(kind: type[Any]) -> Any:
        options = kind()
        if hasattr(options, "asyncOp"):
            options.asyncOp = False  # on the caller's stream: no event synchronisation around each collective
        return options

    def all_to_all(
        self, out: torch.Tensor, send: torch.Tensor, out_splits: Sequence[int], send_splits: Sequence[int]
    ) -> None:
        """Part i of `send` (rows of the first axis) goes to rank i; parts may be of any size, also 0."""
        work = self._backend.alltoall_base(
            out, send, list(out_splits), list(send_splits), self._options(AllToAllOptions)
        )
        if work is not None:
            work.wait()

    def all_gather(self, local: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Concatenate every rank's `local` along the first axis; rank i contributes `rows[i]` rows."""
        most = max(rows)
        padded = local
        if local.shape[0] < most:
            padded = local.new_zeros((most, *local.shape[1:]))
            padded[: local.shape[0]] = local
        out = [torch.empty_like(padded) for _ in range(self.size)]
        work = self._backend.allgather([out], [padded.contiguous()], self._options(AllgatherOptions))
        if work is not None:
            work.wait()
        return torch.cat([part[:count] for part, count in zip(out, rows)])

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` with that of the rank at position `source`."""
        options = self._options(BroadcastOptions)
        options.rootRank = source
        work = self._backend.broadcast([tensor], options)
        if work is not None:
            work.wait()

    def abort(self) -> None:
        """Leave collectives in progress; the group is unusable afterwards."""
        backend, self._backend = self._backend, None
        if backend is not None and hasattr(backend, "abort"):
            backend.abort()


def _abort_group(group: Group) -> None:
    try:
        group.abort()
    except RuntimeError as error:
        logging.debug("aborting a process group: %s", error)


class DataPlane:
    """All groups of this process. `generation` must change on all ranks together."""

    def __init__(self, store: Any, rank: int, world_size: int, device: torch.device) -> None:
        self._store = store
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.generation = 0
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self._lock = threading.RLock()
        self._aborted = False
        self._releases: list[Callable[[], None]] = []

    def group(self, ranks: Sequence[int], device_type: str | None = None) -> Group:
        """The group of `ranks` for tensors on `device_type` (this rank's device by default); made on first use.

        Only the ranks named need to call.
        """
        members = tuple(ranks)
        kind = device_type or self.device.type
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("this prompt was abandoned by another rank")
            if (kind, members) in self._groups:
                return self._groups[kind, members]
        made = Group(self._make(kind, members), members, self.rank)  # without the lock: it waits for peers
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("this prompt was abandoned by another rank")
            return self._groups.setdefault((kind, members), made)

    def _make(self, kind: str, members: tuple[int, ...]) -> Any:
        name = f"data/{self.generation}/{kind}/{'-'.join(map(str, members))}/"
        store = dist.PrefixStore(name, self._store)
        index = members.index(self.rank)
        self._wait_for_peers(store, index, len(members))
        if kind == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = datetime.timedelta(hours=1)
            return dist.ProcessGroupNCCL(store, index, len(members), options)
        return dist.ProcessGroupGloo(store, index, len(members), NEVER)

    def _wait_for_peers(self, store: Any, index: int, size: int) -> None:
        """Until every member is about to make the group: making it cannot be abandoned, waiting here can.

        Raises ConnectionAbortedError when the prompt is abandoned meanwhile.
        """
        store.set(f"here/{index}", b"1")
        everyone = [f"here/{i}" for i in range(size)]
        while not store.check(everyone):
            if self._aborted:
                raise ConnectionAbortedError("this prompt was abandoned by another rank")
            time.sleep(0.001)

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
            self.generation = generation
            self._aborted = False
        gc.collect()
