"""Calls of asynchronous nodes, in an order that ranks need not share.

On rank 0, and where there is only one rank, a call is a task of the executor's event loop. There a node that asks the
other ranks for something (samples, say) holds the loop until they answered. If the other ranks did the same, two such
nodes that resume in another order than on rank 0 would deadlock. So on the other ranks every call has
a thread with an event loop of its own, in which it can wait for its turn while others go on. `Lockstep.computing` lets
only one of these threads and the executor run at a time, as the steps of tasks in one event loop do.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from typing import Any

from comfy_execution.lockstep import ComputeLock, Lockstep, task

Call = Callable[[], Coroutine[Any, Any, Any]]


class NodeExit(RuntimeError):
    """An asynchronous node called `sys.exit` or the like; as such it would end the event loop with all other nodes."""


async def _contained(lockstep: Lockstep, call: Call) -> Any:
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt) as error:
        raise NodeExit(f"the node raised {type(error).__name__}: {error}") from error
    finally:
        lockstep.leave()


class _Stepwise:
    """Awaits a coroutine, holding a lock during each of its steps. `stepped` is set after the first one."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], lock: ComputeLock, stepped: threading.Event) -> None:
        self._coroutine = coroutine
        self._lock = lock
        self._stepped = stepped

    def __await__(self) -> Generator[Any, Any, Any]:
        proceed: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        while True:
            try:
                with self._lock:
                    awaited = proceed()
            except StopIteration as done:
                return done.value
            finally:
                self._stepped.set()
            try:
                yield awaited
                proceed = lambda: self._coroutine.send(None)  # noqa: E731
            except BaseException as error:  # noqa: BLE001 - a cancel belongs to the coroutine
                proceed = lambda error=error: self._coroutine.throw(error)  # type: ignore[misc]  # noqa: E731


class _ThreadCall:
    """A call in a thread of its own; `outcome` is its result."""

    def __init__(self, lockstep: Lockstep, call: Call) -> None:
        self._lockstep = lockstep
        self._call = call
        self._stepped = threading.Event()
        self._inner: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self.outcome: Future[Any] = Future()
        context = contextvars.copy_context()
        name = f"{threading.current_thread().name}: asynchronous node"
        threading.Thread(target=context.run, args=(self._run,), name=name, daemon=True).start()

    def _run(self) -> None:
        import torch

        import comfy.model_management

        try:
            comfy.model_management.enter_device_thread()
            with torch.inference_mode():
                self.outcome.set_result(asyncio.run(self._drive()))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            if not self.outcome.cancelled():
                self.outcome.set_exception(error)
        finally:
            self._stepped.set()

    async def _drive(self) -> Any:
        current = asyncio.current_task()
        assert current is not None
        self._inner = (asyncio.get_running_loop(), current)
        return await _Stepwise(_contained(self._lockstep, self._call), self._lockstep.computing, self._stepped)

    def first_step(self) -> None:
        """Wait until the call awaits something or is done."""
        with self._lockstep.computing.released():
            self._stepped.wait()

    def cancel(self) -> None:
        if self._inner is not None and not self.outcome.done():
            loop, inner = self._inner
            loop.call_soon_threadsafe(inner.cancel)


async def _result_of(call: _ThreadCall) -> Any:
    try:
        return await asyncio.shield(asyncio.wrap_future(call.outcome))
    finally:
        call.cancel()


async def begin(lockstep: Lockstep, prompt_id: str, name: str, call: Call) -> asyncio.Task[Any]:
    """Begin a call: a task of the running loop, done already when the call never really waits.

    `name` names the call among those of the prompt, alike on all ranks.
    """
    with task(prompt_id, name):
        if lockstep.is_first:
            begun = asyncio.ensure_future(_contained(lockstep, call))
            await asyncio.sleep(0)
            return begun
        in_thread = _ThreadCall(lockstep, call)
    in_thread.first_step()
    begun = asyncio.ensure_future(_result_of(in_thread))
    if in_thread.outcome.done():
        await asyncio.wait([begun])
    return begun


async def finish(lockstep: Lockstep, waiting: Sequence[Awaitable[Any]]) -> None:
    """Wait until calls are done, well or not; other calls may compute meanwhile."""
    with lockstep.computing.released():
        await asyncio.gather(*waiting, return_exceptions=True)
