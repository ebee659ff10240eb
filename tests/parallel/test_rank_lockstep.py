"""The lockstep of two real ranks: nothing is lost, nothing stays behind, nobody waits for ever.

All scenarios run in one pair of processes, one after the other; each test looks at what one of them gave.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time

import pytest

from comfy_execution.lockstep import RankError
from tests.parallel.ranks import run_ranks

EXECUTION = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "execution")


def commands(lockstep):
    """Rank 0 frees memory a few times while the follower is busy."""
    if lockstep.rank == 0:
        for number in range(4):
            lockstep.announce({"kind": "free", "number": number})
        lockstep.announce({"kind": "leave"})
        lockstep.gather("commands are read", None)
        return [f"command/1.0/{number}" for number in range(1, 6) if lockstep._control.peek(f"command/1.0/{number}")]
    time.sleep(0.3)
    got = []
    lockstep.heard = lockstep.commands()
    for command in lockstep.heard:
        if command["kind"] == "leave":
            break
        got.append(command["number"])
    lockstep.gather("commands are read", None)
    return got


def keys(lockstep):
    """How many keys of the control plane come with 19 prompts; those of the last two stay for ranks that are late."""
    counts = []
    for number in range(21):
        lockstep.begin(str(number))
        lockstep.decide("a", lambda: 1)
        lockstep.gather("b", 2)
        lockstep.share("c", lambda: 3)
        lockstep.end()
        time.sleep(0.2 if number in (1, 20) else 0)
        if number in (1, 20):
            counts.append(lockstep._control.count())
    return counts[1] - counts[0]


def prompt_of(lockstep, function, count=1):
    """Run `count` asynchronous nodes with this function, and their sum; (success, error messages, outputs)."""
    from fakes import CLASSES, FakeServer, node

    import nodes
    from execution import PromptExecutor

    for name, cls in CLASSES.items():
        nodes.NODE_CLASS_MAPPINGS[name] = cls
    nodes.NODE_CLASS_MAPPINGS["Slow"].run = function
    executor = PromptExecutor(FakeServer(), lockstep=lockstep)
    prompt = {f"s{i}": node("Slow", value=i) for i in range(count)}
    prompt["a"] = node("Add", a=["s0", 0], b=[f"s{count - 1}", 0])
    prompt["out"] = node("Show", value=["a", 0])
    executor.execute(prompt, f"{function.__name__}{count}", {"client_id": "page"}, ["out"])
    errors = [data.get("exception_message") for event, data in executor.status_messages if event == "execution_error"]
    return executor.success, errors, executor.history_result["outputs"]


def asynchronous(lockstep, count):
    """Nodes that sample after an await; with two of them, in another order on each rank."""

    async def samples(self, value):
        await asyncio.sleep(0.1 if (value + lockstep.rank) % 2 else 0.3)
        total = 0
        for step in range(3):
            gathered = lockstep.gather("checksums", (value, step))
            assert gathered == [(value, step)] * 2
            lockstep.gate()
            total += value
            await asyncio.sleep(0.02 * lockstep.rank)
        return (total,)

    return prompt_of(lockstep, samples, count)


def out_of_step(lockstep):
    """An asynchronous node that asks less often on rank 1."""

    async def fewer(self, value):
        await asyncio.sleep(0.01)
        for step in range(3 - lockstep.rank):
            lockstep.gather("checksums", step)
        return (value,)

    return prompt_of(lockstep, fewer)


def close(lockstep):
    """End a prompt of which a failure is known."""
    with contextlib.suppress(RankError):
        lockstep.end()


def failure(lockstep):
    """Rank 1 fails while rank 0 waits for it."""
    lockstep.begin("fails")
    begun = time.monotonic()
    try:
        if lockstep.rank:
            time.sleep(0.2)
            raise ArithmeticError("on purpose")
        lockstep.gather("never", 1)
    except Exception as error:
        raised = lockstep.fail(error, "7")
    close(lockstep)
    return type(raised).__name__, str(raised), time.monotonic() - begun


def refused(lockstep):
    """Rank 1 cannot begin a prompt that was announced."""
    if lockstep.rank:
        next(lockstep.heard)
        lockstep.refuse("refused", ImportError("no such pack"))
        return ""
    lockstep.announce({"kind": "prompt", "item": ()})
    lockstep.begin("refused")
    try:
        lockstep.gather("never", 1)
    except RankError as error:
        close(lockstep)
        return str(error)
    return "nothing"


def death(lockstep):
    """The supervisor says that rank 1 ended, while rank 0 waits for it and in `end`."""
    if lockstep.rank:
        time.sleep(1.0)
        return None
    event = {"kind": "died", "rank": 1, "incarnation": 0, "how": "process ended by signal 9"}
    lockstep.begin("dies")
    threading.Timer(0.2, lockstep._control.append_event, (event,)).start()
    begun = time.monotonic()
    try:
        lockstep.gather("never", 1)
    except RankError as error:
        close(lockstep)
        return str(error), time.monotonic() - begun
    return "nothing", 0.0


def walk(manager):
    """Every scenario on this rank: name -> what it gave."""
    sys.path.insert(0, EXECUTION)
    import comfy.model_management
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep = RankLockstep(manager)
    comfy.model_management.set_interrupt_check(lockstep.interrupt_check)
    lockstep.join({"rank": lockstep.rank, "device": "cpu", "host": "here", "pid": None})
    given = {"commands": commands(lockstep), "keys": keys(lockstep)}
    for count in (1, 2):
        given[f"asynchronous {count}"] = asynchronous(lockstep, count)
    given["out of step"] = out_of_step(lockstep)
    given["failure"] = failure(lockstep)
    given["refused"] = refused(lockstep)
    given["death"] = death(lockstep)
    return given


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(2, walk, timeout=60)


def test_a_busy_follower_gets_every_command(ranks):
    assert ranks[1]["commands"] == [0, 1, 2, 3]
    assert ranks[0]["commands"] == [], "read commands are deleted"


def test_no_key_stays_behind(ranks):
    assert ranks[0]["keys"] == 0


@pytest.mark.parametrize("count, total", [(1, 0), (2, 3)])
def test_asynchronous_nodes_may_ask_all_ranks(ranks, count, total):
    for rank in ranks:
        assert rank[f"asynchronous {count}"][:2] == (True, [])
    assert ranks[0][f"asynchronous {count}"][2] == {"out": {"value": [total]}}


def test_an_asynchronous_node_that_goes_another_way(ranks):
    for success, errors, _ in (rank["out of step"] for rank in ranks):
        assert not success and "the ranks took different ways" in errors[0]
        assert "gathering checksums" in errors[0] and "end of node s0" in errors[0]


def test_a_failure_frees_who_waits(ranks):
    kind, message, seconds = ranks[0]["failure"]
    assert (kind, message) == ("RankError", "rank 1 (cpu) failed: ArithmeticError: on purpose")
    assert seconds < 2
    assert ranks[1]["failure"][:2] == ("ArithmeticError", "on purpose")


def test_a_follower_that_cannot_begin_says_so(ranks):
    assert ranks[0]["refused"] == "rank 1 (cpu) failed: ImportError: no such pack"


def test_a_rank_that_died_is_named(ranks):
    message, seconds = ranks[0]["death"]
    assert message == "rank 1 (cpu) failed: ProcessEnded: process ended by signal 9"
    assert seconds < 2
