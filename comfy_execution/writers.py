"""Files that are written while the prompt goes on.

Encoding a picture only occupies a processor core, so a node that saves passes its files to a few threads (Pillow lets
other threads run while it encodes). Files of one node are written at the same time. When the executor itself called the
node, the node returns at once: the executor goes on with other nodes, sends the page the node's output when its files
are complete, and ends the prompt after all of them. For every other caller, such as a custom node that saves through
`SaveImage` and then reads the file, `write` returns when the files are complete.

A file gets its name at once, as `name.part`, which counts for the next number of a series; it is renamed when it is
complete.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import IO, Any

from comfy import accounting

UNFINISHED = ".part"
MOST_THREADS = 8
WAITING_PER_THREAD = 4  # files that may wait for a thread: what they hold in memory is bounded

_node: ContextVar[Any] = ContextVar("comfy_writing_node", default=None)
_collected: ContextVar[list[Future[None]] | None] = ContextVar("comfy_written_files", default=None)


class _Threads:
    """The threads that write, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.BoundedSemaphore(1)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run a job in a thread; waits while too many others wait."""
        with self._lock:
            if self._pool is None:
                threads = min(MOST_THREADS, os.cpu_count() or 1)
                self._pool = ThreadPoolExecutor(threads, "file writer")
                self._room = threading.BoundedSemaphore(threads * (1 + WAITING_PER_THREAD))
        self._room.acquire()
        future = self._pool.submit(job)
        future.add_done_callback(lambda done: self._room.release())
        return future


_threads = _Threads()


@contextlib.contextmanager
def collecting() -> Iterator[list[Future[None]]]:
    """Inside, files of nodes that the executor calls may be complete later: when these futures are done."""
    files: list[Future[None]] = []
    token = _collected.set(files)
    try:
        yield files
    finally:
        _collected.reset(token)


@contextlib.contextmanager
def called_by_executor(node: Any) -> Iterator[None]:
    """Inside, `node`'s own function runs, called by the executor and by nobody else."""
    token = _node.set(node)
    try:
        yield
    finally:
        _node.reset(token)


def _write(path: str, encode: Callable[[IO[bytes]], None]) -> None:
    with accounting.phase("save"):
        try:
            with open(path + UNFINISHED, "w+b") as file:
                encode(file)
            os.replace(path + UNFINISHED, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(path + UNFINISHED)
            raise


def _reserve(paths: list[str]) -> None:
    """Create the unfinished files. Raises OSError, and leaves none, when one cannot be created."""
    for position, path in enumerate(paths):
        try:
            with open(path + UNFINISHED, "xb"):
                pass
        except OSError:
            for created in paths[:position]:
                os.remove(created + UNFINISHED)
            raise


def write(node: Any, files: dict[str, Callable[[IO[bytes]], None]]) -> None:
    """Write files: path -> what writes the content into an open file.

    Complete on return, unless `node` is a node that the executor calls itself and whose caller collects files; pass None
    for a node whose files somebody else may want to read at once. Raises what the first file that failed raised.
    """
    _reserve(list(files))
    collected = _collected.get()
    later = node is not None and collected is not None and _node.get() is node
    if len(files) == 1 and not later:
        for path, encode in files.items():
            _write(path, encode)
        return
    futures = [_threads.submit(partial(_write, path, encode)) for path, encode in files.items()]
    if later:
        assert collected is not None
        collected.extend(futures)
        return
    for future in futures:
        future.exception()
    for future in futures:
        future.result()


def when_done(futures: list[Future[None]], then: Callable[[], None]) -> threading.Event:
    """Call `then` when all are done without an error, in the thread of the last one; the event is set after that."""
    lock = threading.Lock()
    left = [len(futures)]
    over = threading.Event()

    def done(future: Future[None]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        try:
            if all(future.exception() is None for future in futures):
                then()
        finally:
            over.set()

    for future in list(futures):
        future.add_done_callback(done)
    return over
