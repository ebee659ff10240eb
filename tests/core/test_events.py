"""The panel's list of warnings and errors: bounded, without repetition, each with what to do."""

from __future__ import annotations

import logging

import pytest

from comfy.taco_dit.utils.events import TEXT_LIMIT, EventHandler, EventLog, remedy_for, shortened


def test_the_oldest_go_when_it_is_full():
    log = EventLog(capacity=3)
    for number in range(5):
        log.add("warning", f"message {number}", rank=0)
    assert [event["text"] for event in log.as_list()] == ["message 2", "message 3", "message 4"]


def test_the_same_again_counts_up_and_names_all_ranks():
    log = EventLog()
    log.add("warning", "again", rank=2, at=1.0)
    log.add("warning", "other", rank=0)
    log.add("warning", "again", rank=1, at=5.0)
    other, again = log.as_list()
    assert other["text"] == "other" and other["count"] == 1
    assert (again["count"], again["ranks"], again["time"]) == (2, [1, 2], 5.0)
    log.add("error", "again", rank=1)
    assert len(log.as_list()) == 3, "an error is another event than a warning"


def test_clearing_forgets_all():
    log = EventLog()
    log.add("error", "text", rank=0)
    log.clear()
    assert log.as_list() == []


def test_events_of_another_rank_keep_their_rank_cure_and_time():
    theirs, ours = EventLog(), EventLog()
    theirs.add("error", "old", rank=1)
    seen = theirs.as_list()[-1]["id"]
    theirs.add("error", "new", rank=1, cure=("see_node", "do this"), node="7 (KSampler)", at=3.0)
    ours.take(theirs.since(seen))
    (event,) = ours.as_list()
    assert (event["text"], event["ranks"], event["cure"], event["node"], event["time"]) == (
        "new", [1], "do this", "7 (KSampler)", 3.0,
    )  # fmt: skip


def test_copies_do_not_reach_the_list():
    log = EventLog()
    log.add("warning", "text", rank=0)
    log.as_list()[0]["text"] = "changed"
    assert log.as_list()[0]["text"] == "text"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("GPU 3, 4, 5 not found (0 present): computing on the CPU, which is slow", "nvidia-smi -L"),
        ("GPU 2 not found (2 present): left out", "nvidia-smi -L"),
        ("CUDA_VISIBLE_DEVICES names GPU 7, not found: left out", "nvidia-smi -L"),
        ("no NVIDIA GPU found: computing on the CPU, which is slow", "driver"),
        ("without effect in this version: --async-offload", "leave these flags out"),
        ("rank 1 (cuda:1) failed: OutOfMemoryError: CUDA out of memory. Tried to allocate", "smaller picture"),
        ("rank 2 would sample tensors of other shapes than rank 0; a custom node differs by rank", "TACO_RANKS"),
        ("the launcher started all ranks again, 1 times so far", "The queue goes on"),
        ("Cannot import /x/pack module for custom nodes", ".venv"),
        ("something nobody foresaw", "console"),
    ],
)
def test_known_messages_have_their_remedy(text, word):
    assert word in remedy_for(text)[1]


def test_an_error_of_a_node_names_it():
    assert "node 5 (KSampler)" in remedy_for("ValueError: on purpose", "5 (KSampler)")[1]


def test_long_messages_become_one_line():
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: the reason\n'
    assert shortened(trace) == "ValueError: the reason"
    assert shortened("first\nsecond") == "first"
    assert shortened(" \n") == ""
    assert len(shortened("x" * 5000)) == TEXT_LIMIT


def test_warnings_of_logging_arrive_unless_they_come_by_another_way():
    log = EventLog()
    logger = logging.getLogger("tests.events")
    logger.addHandler(EventHandler(log, rank=3))
    logger.propagate = False
    logger.info("not this")
    logger.warning("a %s", "warning")
    logger.error("an error")
    logger.error("told elsewhere", extra={"reported": True})
    assert [(e["level"], e["text"], e["ranks"]) for e in log.as_list()] == [
        ("warning", "a warning", [3]), ("error", "an error", [3]),
    ]  # fmt: skip
