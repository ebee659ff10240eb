"""Parts of a network that are worth compiling as one piece, and the switch that compiles them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

_compiled: dict[Any, Callable[..., Any]] = {}
_uncompilable: set[Any] = set()
_left_out: list[tuple[type, str]] = []
_compile_stages: contextvars.ContextVar[bool] = contextvars.ContextVar("compile_stages", default=False)


def leave_out(kind: type, *methods: str) -> None:
    """Keep methods that stages call, and that communicate, out of compiled stages.

    It is done when the first stage is compiled: torch's compiler takes 70 MB of memory.
    """
    _left_out.extend((kind, method) for method in methods)


@contextlib.contextmanager
def compiled_stages(enabled: bool = True) -> Iterator[None]:
    """Inside, `stage` functions run compiled by torch.compile."""
    token = _compile_stages.set(enabled)
    try:
        yield
    finally:
        _compile_stages.reset(token)


def stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a part of a block in which no tokens are combined: pure, without communication, worth compiling as one
    piece.

    Each stage is compiled once and serves all blocks of its kind, for one size and then, when another comes, for any.
    Where compiling fails (no C compiler, an unsupported GPU) the stage runs plainly from then on, with one warning.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not _compile_stages.get() or function in _uncompilable:
            return function(*args, **kwargs)
        if function not in _compiled:
            while _left_out:
                kind, method = _left_out.pop()
                setattr(kind, method, torch.compiler.disable(getattr(kind, method)))
            # Streams, batch sizes, patch kinds and models of several sizes share one function.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            _compiled[function] = torch.compile(function)
        try:
            return _compiled[function](*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _uncompilable.add(function)
            logging.warning("torch.compile failed (%s); this part runs uncompiled", str(error).splitlines()[0])
            return function(*args, **kwargs)

    return wrapper
