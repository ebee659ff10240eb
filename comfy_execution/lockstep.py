"""The one thing the executor and the server know about ranks.

Under several ranks every process runs the same prompt through the same executor. Wherever two ranks could decide
differently (what to run next, what is cached, what a clock or a random number says) the executor asks a `Lockstep`
object instead, and rank 0's answer holds for all. `Lockstep` itself is the case of one rank: every answer is the
caller's own and nothing is communicated. `comfy.taco_dit.core.lockstep.RankLockstep` is the case of several.

All ranks must call the same methods in the same order between `begin` and `end`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed; raised on every rank that did not fail itself.

    Attributes: `rank` (int), `device` (str), `cause` (exception class name), `detail` (its message),
    `node_id` (str or None), `traceback` (list of str) describe what happened on the failing rank.
    """

    def __init__(
        self,
        rank: int,
        device: str,
        cause: str,
        detail: str,
        node_id: str | None = None,
        traceback: list[str] | None = None,
    ) -> None:
        super().__init__(f"rank {rank} ({device}) failed: {cause}: {detail}")
        self.rank = rank
        self.device = device
        self.cause = cause
        self.detail = detail
        self.node_id = node_id
        self.traceback = traceback or []


class Lockstep:
    """Decisions of a prompt's execution, for a single rank."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that serves HTTP, decides, and has side effects."""
        return self.rank == 0

    def begin(self, prompt_id: str) -> None:
        """Open a prompt: from here to `end` the ranks move together."""

    def end(self) -> None:
        """Close a prompt; waits until every rank has closed it.

        Raises RankError when another rank failed and this one did not notice yet.
        """

    def fail(self, error: BaseException, node_id: str | None = None) -> BaseException:
        """Tell the other ranks that this one leaves the prompt because of `error` (also an interrupt).

        Returns the exception to report: `error`, or a RankError when it only follows from another rank's failure.
        """
        return error

    def decide(self, topic: str, choose: Callable[[], T]) -> T:
        """Rank 0's `choose()` on every rank; the others do not call it. The value must be picklable and small.

        `topic` names the decision in error messages. An exception of `choose` is raised on rank 0 and reaches the
        others as RankError.
        """
        return choose()

    def gather(self, topic: str, value: T) -> list[T]:
        """Every rank's `value`, in rank order, on every rank."""
        return [value]

    def share(self, topic: str, produce: Callable[[], Any]) -> Any:
        """Like `decide` for large results: rank 0's `produce()`, tensors included, on every rank (on the CPU)."""
        return produce()

    def alone(self) -> AbstractContextManager[None]:
        """Inside, this rank works on its own (a node that runs on rank 0 only): it may stop without asking the others."""
        return nullcontext()

    def check(self) -> None:
        """Agreed check point: raises RankError if another rank failed. Cheap; call it once a node."""
