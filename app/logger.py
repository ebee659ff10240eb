"""The last lines of the console, for the page's log panel."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any

_lines: deque[dict[str, str]] | None = None
_interceptors: list[LogInterceptor] = []


class LogInterceptor(io.TextIOWrapper):
    """A stream that passes everything on and remembers it; `\\r` lines (progress bars) replace each other."""

    def __init__(self, stream: Any, **kwargs: Any) -> None:
        super().__init__(stream.buffer, encoding=stream.encoding, line_buffering=stream.line_buffering, **kwargs)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[list[dict[str, str]]], None]] = []
        self._since_flush: list[dict[str, str]] = []

    def write(self, data: str) -> int:
        entry = {"t": datetime.now().isoformat(), "m": data}
        with self._lock:
            self._since_flush.append(entry)
            if _lines is not None:
                if data.startswith("\r") and _lines and _lines[-1]["m"].startswith("\r"):
                    _lines.pop()
                _lines.append(entry)
        return super().write(data)

    def flush(self) -> None:
        super().flush()
        with self._lock:
            entries, self._since_flush = self._since_flush, []
        for callback in self._callbacks:
            callback(entries)

    def on_flush(self, callback: Callable[[list[dict[str, str]]], None]) -> None:
        self._callbacks.append(callback)


def get_logs() -> list[dict[str, str]]:
    """The remembered lines, `{"t": ISO time, "m": text}`, oldest first."""
    return list(_lines or ())


def on_flush(callback: Callable[[list[dict[str, str]]], None]) -> None:
    """Call `callback` with the new entries whenever the console is flushed."""
    for interceptor in _interceptors:
        interceptor.on_flush(callback)


class _BelowError(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR


def setup_logger(log_level: str = "INFO", capacity: int = 300, use_stdout: bool = False) -> None:
    """Remember the console's last `capacity` writes and log plain messages to it. Does nothing the second time.

    With `use_stdout` messages below ERROR go to stdout and the others to stderr.
    """
    global _lines
    if _lines is not None:
        return
    _lines = deque(maxlen=capacity)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "buffer"):
            interceptor = LogInterceptor(stream)
            _interceptors.append(interceptor)
            setattr(sys, name, interceptor)
    logger = logging.getLogger()
    logger.setLevel(log_level)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if use_stdout:
        errors = logging.StreamHandler(sys.stderr)
        errors.setFormatter(logging.Formatter("%(message)s"))
        errors.setLevel(logging.ERROR)
        logger.addHandler(errors)
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(_BelowError())
    logger.addHandler(handler)


_startup_warnings: list[str] = []


def log_startup_warning(msg: str) -> None:
    """Warn now and once more when the server is up."""
    logging.warning(msg)
    _startup_warnings.append(msg)


def print_startup_warnings() -> None:
    """Repeat the warnings of the start, which scrolled away."""
    for message in _startup_warnings:
        logging.warning(message)
    _startup_warnings.clear()
