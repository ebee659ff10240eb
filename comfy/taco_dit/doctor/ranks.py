"""Ranks started only to be tested: every collective on every group, links timed, attention compared.

    python -m comfy.taco_dit.doctor.ranks FOLDER [--cpu]         one rank, started by `run_ranks`

Each rank notes what it is about to do in FOLDER/RANK.doing, so that a hang can be named, and leaves FOLDER/RANK.json.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from comfy.taco_dit.core.config_manager import divisors
from comfy.taco_dit.core.control_hub import Hub
from comfy.taco_dit.core.control_plane import DOOR
from comfy.taco_dit.core.data_plane import Group
from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager, rank_device
from comfy.taco_dit.core.machine_profile import MachineProfile
from comfy.taco_dit.core.measuring import combine, measure
from comfy.taco_dit.core.plan import ParallelDims

from .findings import OK, PROBLEM, WARNING, Finding

TIME_LIMIT_S = 180.0
_LINK_BYTES = {"cuda": 256 * 1024**2, "cpu": 4 * 1024**2}
_MOST_PAIRS = 28  # all pairs of 8 ranks


def layouts(ranks: int) -> list[ParallelDims]:
    """Every split of `ranks` into cfg x data x ulysses x ring."""
    return [
        ParallelDims(cfg, data, ulysses, ring_degree=ranks // (cfg * data * ulysses))
        for cfg in divisors(ranks)
        for data in divisors(ranks // cfg)
        for ulysses in divisors(ranks // (cfg * data))
    ]


def groups_of(ranks: int) -> list[tuple[int, ...]]:
    """Every group that some plan on `ranks` ranks would use, the largest first."""
    found = {
        group
        for dims in layouts(ranks)
        for rank in range(ranks)
        for group in (dims.token_group(rank), dims.row_group(rank), dims.ulysses_group(rank), dims.ring_group(rank))
    }
    return sorted((group for group in found if len(group) > 1), key=lambda group: (-len(group), group))


class Rank:
    """One rank of the test."""

    def __init__(self, folder: str, cpu: bool) -> None:
        info = RankInfo.from_environment(os.environ)
        self.device = rank_device(info, cpu)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.manager = TACODiTDistributedManager(info, self.device)
        self.folder = folder
        self.results: list[dict[str, Any]] = []

    def doing(self, what: str) -> None:
        """Write it where the parent reads it if this rank hangs."""
        with open(os.path.join(self.folder, f"{self.manager.rank}.doing"), "w", encoding="utf-8") as file:
            file.write(what)

    def together(self, what: str) -> None:
        """Wait for all ranks."""
        self.doing(f"waiting for the others before {what}")
        control = self.manager.control
        assert control is not None, "the doctor starts several ranks"
        control.set(f"doctor/{what}/{self.manager.rank}", b"1")
        for rank in range(self.manager.world_size):
            control.get(f"doctor/{what}/{rank}")

    def note(self, level: str, subject: str, text: str, cure: str = "") -> None:
        """Report a finding."""
        self.results.append({"level": level, "subject": subject, "text": text, "cure": cure})

    def examine(self) -> None:
        """Everything."""
        ranks = self.manager.world_size
        assert self.manager.data is not None
        for members in groups_of(ranks):
            name = "ranks " + ", ".join(map(str, members))
            self.together(name)
            if self.manager.rank in members:
                self.doing(f"joining the group of {name}")
                self._collectives(self.manager.data.group(members), name)
        for pair in itertools.islice(itertools.combinations(range(ranks), 2), _MOST_PAIRS):
            self.together(f"link {pair}")
            if self.manager.rank in pair:
                self._link(self.manager.data.group(pair), pair)
        self.together("measuring")
        self.doing("measuring computing and links, as the planner does")
        numbers = measure(self.manager, True)
        with open(os.path.join(self.folder, f"{self.manager.rank}.numbers"), "w", encoding="utf-8") as file:
            json.dump(numbers, file)
        self.together("the end")

    def _collectives(self, group: Group, name: str) -> None:
        wrong = []
        for collective, works in (("all-to-all", self._all_to_all), ("all-gather", self._all_gather),
                                  ("broadcast", self._broadcast), ("shift", self._shift)):  # fmt: skip
            self.doing(f"{collective} among {name}")
            if not works(group):
                wrong.append(collective)
        if wrong:
            remedy = "wrong sums mean a faulty link or driver: test with NCCL_P2P_DISABLE=1, update the driver"
            self.note(PROBLEM, name, f"{', '.join(wrong)}: wrong values on rank {self.manager.rank}", remedy)
        elif group.index == 0:
            self.note(OK, name, "all-to-all, all-gather, broadcast, shift right, with even and uneven parts")

    def _tensor(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def _all_to_all(self, group: Group) -> bool:
        """Rank i sends i * 100 + j to rank j, j + 1 times."""
        counts = [j + 1 for j in range(group.size)]
        send = torch.cat([torch.full((n,), group.index * 100.0 + j, device=self.device) for j, n in enumerate(counts)])
        mine = group.index + 1
        out = torch.full((mine * group.size,), -1.0, device=self.device)
        group.all_to_all(out, send, [mine] * group.size, counts)
        wanted = torch.cat(
            [torch.full((mine,), i * 100.0 + group.index, device=self.device) for i in range(group.size)]
        )
        return torch.equal(out, wanted)

    def _all_gather(self, group: Group) -> bool:
        rows = [i + 1 for i in range(group.size)]
        local = torch.full((rows[group.index], 3), float(group.index), device=self.device)
        wanted = torch.cat([torch.full((n, 3), float(i), device=self.device) for i, n in enumerate(rows)])
        return torch.equal(group.all_gather(local, rows), wanted)

    def _broadcast(self, group: Group) -> bool:
        for source in range(group.size):
            tensor = self._tensor(float(group.index), 7.0)
            group.broadcast(tensor, source)
            if not torch.equal(tensor, self._tensor(float(source), 7.0)):
                return False
        return True

    def _shift(self, group: Group) -> bool:
        """Each rank sends its index to the next one, index + 1 times."""
        before = (group.index - 1) % group.size
        out = torch.full((before + 1,), -1.0, device=self.device)
        pending = group.shift(out, torch.full((group.index + 1,), float(group.index), device=self.device))
        pending.wait()
        return torch.equal(out, torch.full_like(out, float(before)))

    def _link(self, group: Group, pair: tuple[int, int]) -> None:
        """Both ranks send half of a buffer to each other at once; the best of five."""
        count = _LINK_BYTES[self.device.type] // 4
        send = torch.ones(count, device=self.device)
        out = torch.empty_like(send)
        halves = [count // 2, count - count // 2]
        received = [halves[group.index]] * 2
        out = out.new_empty(sum(received))
        self.doing(f"timing the link {pair}")
        best = min(self._timed(lambda: group.all_to_all(out, send, received, halves)) for _ in range(6))
        if group.index == 0:
            rate = halves[1] * 4 / best / 1e9
            self.note(OK, f"rank {pair[0]} - rank {pair[1]}", f"{rate:.2f} GB/s each way, {best * 1e3:.2f} ms")

    def _timed(self, function: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def run_ranks(
    ranks: int, cpu: bool, environ: dict[str, str], limit: float = TIME_LIMIT_S,
    numbers: list[dict[str, Any]] | None = None,
) -> Iterator[Finding]:  # fmt: skip
    """Start `ranks` processes, wait, and report; a rank that hangs or dies is named with what it was doing.

    What each rank measured is appended to `numbers`, in rank order, as far as ranks came to that.
    """
    with tempfile.TemporaryDirectory(prefix="taco_doctor_") as folder:
        yield from _supervise(folder, ranks, cpu, environ, limit)
        found = [_read(folder, f"{rank}.numbers") for rank in range(ranks)]
        if numbers is not None:
            numbers += [json.loads(content) for content in found if content]


def machine_profile(numbers: list[dict[str, Any]], ranks: int, alone: torch.device | None) -> MachineProfile | None:
    """The profile of ranks that all measured, or of one rank's device, which is measured now; else None."""
    if alone is not None:
        return combine([measure(TACODiTDistributedManager(RankInfo(), alone), True)])
    return combine(numbers) if len(numbers) == ranks else None


def _supervise(folder: str, ranks: int, cpu: bool, environ: dict[str, str], limit: float) -> Iterator[Finding]:
    hub = Hub()
    command = [sys.executable, "-m", "comfy.taco_dit.doctor.ranks", folder, *(["--cpu"] if cpu else [])]
    processes = []
    for rank in range(ranks):
        door = hub.make_door()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, DOOR: door.fileno()}
        own = {key: str(value) for key, value in place.items()}
        with door, open(os.path.join(folder, f"{rank}.log"), "wb") as log:
            processes.append(
                subprocess.Popen(
                    command, env={**environ, **own}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    pass_fds=[door.fileno()],
                )
            )  # fmt: skip
    end = time.monotonic() + limit
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() not in (None, 0) for p in processes):
                time.sleep(1.0)  # the others may have failed, too
                break
            time.sleep(0.05)
        states = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        hub.close()
    # A rank that died is the cause; those still waiting for it are not.
    died = any(state not in (None, 0) for state in states)
    for rank, state in enumerate(states):
        yield from _result(folder, rank, state, limit, died)


def _read(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _result(folder: str, rank: int, state: int | None, limit: float, died: bool) -> Iterator[Finding]:
    if state == 0:
        yield from (Finding(**result) for result in json.loads(_read(folder, f"{rank}.json")))
        return
    doing = _read(folder, f"{rank}.doing") or "starting"
    if state is None and died:
        yield Finding(WARNING, f"rank {rank}", f"was still {doing} when another rank ended")
        return
    remedy = (
        "run again with NCCL_DEBUG=INFO; test NCCL_P2P_DISABLE=1 (faulty direct access), NCCL_SHM_DISABLE=1 (shared "
        "memory of a container), and --taco-ranks with fewer ranks; docs/troubleshooting.md has more"
    )
    if state is None:
        yield Finding(PROBLEM, f"rank {rank}", f"hangs: {doing}, for up to {limit:.0f} s", remedy)
        return
    last = (_read(folder, f"{rank}.log").splitlines() or ["no output"])[-1]
    yield Finding(PROBLEM, f"rank {rank}", f"ended with status {state} while {doing}: {last}", remedy)


def attention_findings(device: torch.device) -> Iterator[Finding]:
    """Every attention function against the written-out one, on a size of Flux in small."""
    from comfy.ldm.modules import attention as module

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 517, 64, generator=generator).to(device, dtype) for _ in range(3))
    wanted = torch.softmax(q.float() @ k.float().transpose(-1, -2) / 8, -1) @ v.float()
    yield Finding(OK, "in use", module.describe_backend(device))
    for name, function in sorted(module.REGISTERED_ATTENTION_FUNCTIONS.items()):
        try:
            out = function(q, k, v, 6, skip_reshape=True, skip_output_reshape=True).float()
        except Exception as error:
            yield Finding(WARNING, name, f"fails: {error}", "choose another one (docs/configuration.md)")
            continue
        error_size = ((out - wanted).norm() / wanted.norm()).item()
        remedy = "do not choose this one; another driver or torch may fix it"
        right = error_size < (1e-2 if dtype == torch.bfloat16 else 1e-5)
        yield Finding(OK if right else PROBLEM, name, f"relative error {error_size:.1e}", "" if right else remedy)


def main(argv: list[str]) -> int:
    """One rank."""
    from comfy.taco_dit.core.launcher import die_with_parent

    die_with_parent()
    rank = Rank(argv[0], "--cpu" in argv)
    rank.examine()
    with open(os.path.join(argv[0], f"{rank.manager.rank}.json"), "w", encoding="utf-8") as file:
        json.dump(rank.results, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
