"""The short form of `python -m tests.attack`, against a real server with a token."""

from __future__ import annotations

import pytest

from tests import attack


@pytest.mark.timeout(170)
def test_every_attack_is_refused():
    said = []
    with attack.scratch(ranks=1) as target:
        through = attack.attack(target, short=True, say=said.append)
    assert not through, "\n".join(said)
    assert not any(line.startswith("skipped") for line in said), said


def test_an_attack_that_succeeds_is_told(monkeypatch):
    def open_door(target):
        raise attack.NotRefused("it was open")

    def closed_door(target):
        pass

    monkeypatch.setattr(attack, "attacks", lambda short: {"door": open_door, "window": closed_door})
    monkeypatch.setattr(attack.Target, "json", lambda self, method, path: {})
    said = []
    assert attack.attack(attack.Target("http://127.0.0.1:1"), short=True, say=said.append) == ["door"]
    assert said == ["NOT refused  door: it was open", "refused      window"]
