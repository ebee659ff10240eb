"""Ranks that ask for different things are told so; nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfy_execution.lockstep import RankError
from tests.parallel.ranks import run_ranks

LARGE = 1 << 21

WAYS = {
    "decide": lambda lockstep: lockstep.decide("what to run", lambda: 1),
    "decide another": lambda lockstep: lockstep.decide("what is cached", lambda: 2),
    "gather": lambda lockstep: lockstep.gather("memory", lockstep.rank),
    "share": lambda lockstep: lockstep.share("a picture", lambda: torch.zeros(4)),
    "share much": lambda lockstep: lockstep.share("a film", lambda: torch.zeros(LARGE)),
    "end": lambda lockstep: None,
}


def walk(manager: Any, ways: list[str]) -> tuple[str, str, int]:
    """(kind of error, its message, a decision of the prompt after it) when each rank goes its way after a common one."""
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep = RankLockstep(manager)
    lockstep.begin("one")
    found: BaseException | None = None
    try:  # a rank that is late may hear of the others' failure in the common part
        assert lockstep.decide("common", lambda: 5) == 5
        WAYS[ways[lockstep.rank]](lockstep)
    except Exception as error:
        found = lockstep.fail(error)
    try:
        lockstep.end()
    except RankError as error:
        found = error
    lockstep.begin("two")
    again = lockstep.decide("again", lambda: 7)
    lockstep.end()
    return type(found).__name__, str(found), again


@pytest.mark.parametrize("first, second, topics", [
    ("decide", "decide another", ("decision what to run", "decision what is cached")),
    ("decide", "gather", ("decision what to run", "gathering memory")),
    ("gather", "decide", ("gathering memory", "decision what to run")),
    ("share", "gather", ("sharing a picture", "gathering memory")),
    ("share much", "decide", ("sharing a film", "decision what to run")),
    ("end", "decide", ("end of the prompt", "decision what to run")),
    ("gather", "end", ("gathering memory", "end of the prompt")),
])  # fmt: skip
def test_both_ways_are_named(first: str, second: str, topics: tuple[str, str]) -> None:
    results = run_ranks(2, walk, [first, second], timeout=60)
    assert {kind for kind, _, _ in results} <= {"OutOfStepError", "RankError"}
    for _, message, again in results:
        assert "the ranks took different ways" in message and "rank 0" in message and "rank 1" in message
        assert all(topic in message for topic in topics)
        assert again == 7


def test_the_odd_one_of_three_is_found() -> None:
    results = run_ranks(3, walk, ["gather", "gather", "share"], timeout=60)
    for _, message, again in results:
        assert "sharing a picture" in message and "gathering memory" in message and "rank 2" in message
        assert again == 7
