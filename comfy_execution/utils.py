"""Which node is being executed right now, for code deep inside it (progress bars, logs)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class ExecutionContext(NamedTuple):
    """`list_index` counts the calls of one node over a list input; None when it is called once."""

    prompt_id: str
    node_id: str
    list_index: int | None


_current: ContextVar[ExecutionContext | None] = ContextVar("comfy_executing", default=None)


def get_executing_context() -> ExecutionContext | None:
    """The node this thread or task runs for; None outside of node calls."""
    return _current.get()


@contextmanager
def executing(prompt_id: str, node_id: str, list_index: int | None = None) -> Iterator[None]:
    """Mark the body as running for a node."""
    token = _current.set(ExecutionContext(prompt_id, node_id, list_index))
    try:
        yield
    finally:
        _current.reset(token)


CurrentNodeContext = executing


def full_type_name(klass: type) -> str:
    """`module.Class`; the bare name for built-in types."""
    module = klass.__module__
    return klass.__qualname__ if module == "builtins" else f"{module}.{klass.__qualname__}"
