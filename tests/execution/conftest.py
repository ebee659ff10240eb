from __future__ import annotations

import pytest
from fakes import CALLS, CHANGED, CLASSES, FakeServer, Runner

import nodes


@pytest.fixture(autouse=True)
def test_nodes(monkeypatch):
    for name, cls in CLASSES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, cls)
    CALLS.by_thread.clear()
    CHANGED.clear()
    return CALLS


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def run(server) -> Runner:
    return Runner(server)
