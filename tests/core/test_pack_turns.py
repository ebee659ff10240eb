"""Ranks import packs one after the other, rank 0 first."""

from __future__ import annotations

import threading
import time

import pytest

from comfy.taco_dit.core import pack_turns
from comfy.taco_dit.core.control_channel import Door
from comfy.taco_dit.core.control_client import ControlClient
from comfy.taco_dit.core.control_hub import Hub
from comfy.taco_dit.core.pack_turns import PackTurns


@pytest.fixture
def clients():
    hub = Hub()
    made = [ControlClient(Door(hub.make_door())) for _ in range(3)]
    yield made
    for client in made:
        client.close()
    hub.close()


def start(clients, packs, import_pack):
    """Every rank imports its packs; `import_pack(rank, pack)`. Returns when all are done."""

    def rank(number):
        turns = PackTurns(clients[number], number)
        for pack in packs[number]:
            with turns.turn(pack):
                import_pack(number, pack)
        turns.over()

    threads = [threading.Thread(target=rank, args=(number,)) for number in reversed(range(3))]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_no_two_ranks_import_a_pack_at_once(clients):
    inside, order = {}, {"a": [], "b": []}

    def import_pack(rank, pack):
        assert not inside.get(pack)
        inside[pack] = True
        time.sleep(0.02)
        order[pack].append(rank)
        inside[pack] = False

    start(clients, [["a", "b"]] * 3, import_pack)
    assert order == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_a_pack_that_fails_or_that_is_not_everywhere_holds_nobody_up(clients):
    def import_pack(rank, pack):
        seen.append((rank, pack))

    seen = []
    start(clients, [["a"], ["a", "late"], ["a", "later"]], import_pack)
    assert {(1, "late"), (2, "later")} <= set(seen)
    with pytest.raises(ValueError), PackTurns(clients[0], 0).turn("bad"):
        raise ValueError
    with PackTurns(clients[1], 1).turn("bad"):
        pass


def test_followers_do_not_wait_long_for_each_other_and_always_for_rank_0(clients, monkeypatch):
    monkeypatch.setattr(pack_turns, "STAGGER_S", 0.05)
    began, over = {}, {}

    def import_pack(rank, pack):
        began[rank] = time.monotonic()
        time.sleep(0.4)
        over[rank] = time.monotonic()

    start(clients, [["slow"]] * 3, import_pack)
    assert began[1] >= over[0] and began[1] + 0.04 < began[2] < over[1]


def test_rank_0_may_begin_anew_and_one_rank_alone_waits_for_nobody(clients):
    with PackTurns(clients[0], 0).turn("a"):
        pass
    pack_turns.forget(clients[0])
    assert clients[0].peek("packs/0/done/a") == b""
    with PackTurns(None, 0).turn("a"):
        PackTurns(None, 0).over()
