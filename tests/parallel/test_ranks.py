"""The helper that runs a function on ranks: what it says of ranks that fail, end or hang, and that none stays."""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.e2e.server import is_alive, wait_until

from . import ranks


@pytest.fixture(scope="module", autouse=True)
def _parent_is_there():
    ranks.run_ranks(1, _imported)


def _about(manager, value):
    return manager.rank, manager.world_size, os.getpid(), os.getppid(), value, os.environ["TACO_TEST_WORD"]


def _fail(manager, folder, way):
    with open(os.path.join(folder, str(manager.rank)), "w") as file:
        file.write(str(os.getpid()))
    if manager.rank == 1:
        if way == "raise":
            raise KeyError("the reason")
        os._exit(7) if way == "end" else time.sleep(60)
    elif way == "end":
        manager.control.get("never")
    return manager.rank


def test_ranks_are_processes_of_one_parent_with_the_test_s_environment(monkeypatch):
    monkeypatch.setenv("TACO_TEST_WORD", "word")
    found = ranks.run_ranks(3, _about, "a value")
    assert [(rank, world, value, word) for rank, world, _, _, value, word in found] == [
        (rank, 3, "a value", "word") for rank in range(3)
    ]
    assert len({pid for _, _, pid, _, _, _ in found}) == 3 and len({parent for _, _, _, parent, _, _ in found}) == 1
    assert wait_until(lambda: not any(is_alive(pid) for _, _, pid, _, _, _ in found), 5)


@pytest.mark.parametrize("way, said", [
    ("raise", ["rank 1:\nTraceback", "in _fail", "KeyError: 'the reason'"]),
    ("end", ["rank 0:\nno answer within 0.5 s", "rank 1:\nits process ended with status 7"]),
    ("hang", ["rank 1:\nno answer within 2 s"]),
])  # fmt: skip
def test_a_failure_is_told_and_nothing_stays(tmp_path, monkeypatch, way, said):
    monkeypatch.setattr(ranks, "AFTER_FAILURE", 0.5)
    with pytest.raises(AssertionError) as raised:
        ranks.run_ranks(2, _fail, str(tmp_path), way, timeout=2)
    for words in said:
        assert words in str(raised.value)
    pids = [int((tmp_path / name).read_text()) for name in "01"]
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)


def _imported(manager):
    return len(os.listdir(f"/proc/{os.getppid()}/task")), "tests.parallel.preload" in sys.modules


def test_the_parent_has_imported_everything_and_has_one_thread():
    assert ranks.run_ranks(1, _imported) == [(1, True)]
