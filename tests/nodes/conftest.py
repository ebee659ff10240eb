from __future__ import annotations

import asyncio

import pytest

import nodes


@pytest.fixture(scope="session")
def all_nodes():
    """All node classes by type, the extra ones included."""
    failed = asyncio.run(nodes.init_builtin_extra_nodes())
    assert failed == []
    return nodes.NODE_CLASS_MAPPINGS
