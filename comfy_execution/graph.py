"""The graph of a running prompt and the order in which its nodes run.

`ExecutionList` holds the nodes still to be run and how many others each waits for. Ready nodes lie in a heap, so choosing
the next one costs O(log n). The choice depends only on the prompt: first output and asynchronous nodes (results show
early, waiting overlaps), then nodes that feed an output, then nodes that feed such a node, then the oldest.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

from comfy_execution.caching import CacheEntry, CacheSet
from comfy_execution.graph_utils import ExecutionBlocker, NodeNotFoundError, is_link, node_class

__all__ = [
    "DependencyCycleError",
    "DynamicPrompt",
    "ExecutionBlocker",
    "ExecutionList",
    "NodeInputError",
    "NodeNotFoundError",
    "TopologicalSort",
    "get_input_info",
    "node_class",
]


class DependencyCycleError(Exception):
    """Nodes wait for each other."""


class NodeInputError(Exception):
    """A node has no such input."""


def _last(node_id: str, following: Mapping[str, str], known: dict[str, str]) -> str:
    """The end of the chain that begins with a node; each node of a chain is followed once, `known` keeps its end.

    A chain that bites its tail (a node that is shown on itself) ends where it would begin again.
    """
    passed: dict[str, None] = {}
    while node_id in following and node_id not in known and node_id not in passed:
        passed[node_id] = None
        node_id = following[node_id]
    node_id = known.get(node_id, node_id)
    for before in passed:
        known[before] = node_id
    return node_id


class DynamicPrompt:
    """The prompt as sent, plus the ephemeral nodes that running nodes expand into."""

    def __init__(self, original_prompt: dict[str, dict[str, Any]]) -> None:
        self.original_prompt = original_prompt
        self.ephemeral_prompt: dict[str, dict[str, Any]] = {}
        self.ephemeral_parents: dict[str, str] = {}
        self.ephemeral_display: dict[str, str] = {}
        self._real: dict[str, str] = {}
        self._shown: dict[str, str] = {}

    def get_node(self, node_id: str) -> dict[str, Any]:
        node = self.ephemeral_prompt.get(node_id) or self.original_prompt.get(node_id)
        if node is None:
            raise NodeNotFoundError(f"Node {node_id} not found")
        return node

    def has_node(self, node_id: str) -> bool:
        return node_id in self.original_prompt or node_id in self.ephemeral_prompt

    def add_ephemeral_node(self, node_id: str, node_info: dict[str, Any], parent_id: str, display_id: str) -> None:
        """Add a node that `parent_id` expanded into, whose progress is shown on `display_id`."""
        self.ephemeral_prompt[node_id] = node_info
        self.ephemeral_parents[node_id] = parent_id
        self.ephemeral_display[node_id] = display_id

    def get_real_node_id(self, node_id: str) -> str:
        """The node of the original prompt that this one was expanded from."""
        return _last(node_id, self.ephemeral_parents, self._real)

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self.ephemeral_parents.get(node_id)

    def get_display_node_id(self, node_id: str) -> str:
        """The node on which the progress of this one is shown."""
        return _last(node_id, self.ephemeral_display, self._shown)

    def all_node_ids(self) -> list[str]:
        """Ids in the order of the prompt, ephemeral ones last, in the order they were added."""
        return list(dict.fromkeys([*self.original_prompt, *self.ephemeral_prompt]))

    def get_original_prompt(self) -> dict[str, dict[str, Any]]:
        return self.original_prompt


Category = Literal["required", "optional", "hidden"]


def get_input_info(
    class_def: Any, input_name: str, valid_inputs: Mapping[str, Any] | None = None, memo: dict[Any, Any] | None = None
) -> tuple[Any, Category | None, Any]:
    """`(type, category, options)` of a node's input; `(None, None, None)` when it is not declared.

    Some node packs look at the call stack from INPUT_TYPES and expect it to be called from a function of this name.
    `memo` keeps INPUT_TYPES' answer per class.
    """
    if valid_inputs is None:
        if memo is not None and class_def in memo:
            valid_inputs = memo[class_def]
        else:
            valid_inputs = class_def.INPUT_TYPES()
            if memo is not None:
                memo[class_def] = valid_inputs
    category: Category
    for category in ("required", "optional", "hidden"):
        # packs put objects here that answer `in` and `[]` only
        declared = valid_inputs.get(category)
        if declared is not None and input_name in declared:
            info = declared[input_name]
            if category == "hidden" and not isinstance(info, list | tuple):
                return info, category, {}
            return info[0], category, info[1] if len(info) > 1 else {}
    return None, None, None


def is_async_node(class_def: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(class_def, getattr(class_def, "FUNCTION", ""), None))


_OTHER = 3
# how often a prompt that waits for asynchronous nodes looks whether it was cancelled
STOP_INTERVAL_S = 0.2


class TopologicalSort:
    """Nodes to be run, with the links between them ("strong" links: those that must be satisfied first)."""

    def __init__(self, dynprompt: DynamicPrompt) -> None:
        self.dynprompt = dynprompt
        self.pendingNodes: dict[str, int] = {}
        self.blockCount: dict[str, int] = {}
        self.blocking: dict[str, dict[str, dict[int, bool]]] = {}
        self.externalBlocks = 0
        self.unblockedEvent = asyncio.Event()
        self._added = 0
        self._fresh: list[str] = []
        self._ready: list[tuple[int, int, str]] = []
        self._queued: dict[str, int] = {}
        self._input_types: dict[Any, Any] = {}

    def get_input_info(self, unique_id: str, input_name: str) -> tuple[Any, Category | None, Any]:
        """Type, category and options of an input of a node."""
        class_def = node_class(self.dynprompt.get_node(unique_id)["class_type"])
        return get_input_info(class_def, input_name, memo=self._input_types)

    def is_cached(self, node_id: str) -> bool:
        return False

    def add_node(
        self, node_unique_id: str, include_lazy: bool = False, subgraph_nodes: Iterable[str] | None = None
    ) -> None:
        """Add a node and everything it needs that is neither cached nor lazy."""
        allowed = None if subgraph_nodes is None else set(subgraph_nodes)
        waiting = [node_unique_id]
        links: list[tuple[str, int, str]] = []
        while waiting:
            unique_id = waiting.pop()
            if unique_id in self.pendingNodes:
                continue
            inputs = self.dynprompt.get_node(unique_id)["inputs"]
            self._register(unique_id)
            if self.is_cached(unique_id):  # the results it was made from may be gone
                continue
            sources = []
            for name, value in inputs.items():
                if not is_link(value):
                    continue
                source, slot = value
                if allowed is not None and source not in allowed:
                    continue
                options = self.get_input_info(unique_id, name)[2]
                if options is not None and options.get("lazy") and not include_lazy:
                    continue
                if not self.is_cached(source):
                    sources.append(source)
                    links.append((source, slot, unique_id))
            # the first input is taken from the stack, and so numbered, first
            waiting.extend(reversed(sources))
        for link in links:
            self.add_strong_link(*link)

    def _register(self, unique_id: str) -> None:
        self.pendingNodes[unique_id] = self._added
        self._fresh.append(unique_id)
        self._added += 1
        self.blockCount[unique_id] = 0
        self.blocking[unique_id] = {}

    def add_strong_link(self, from_node_id: str, from_socket: int, to_node_id: str) -> None:
        """Make one node wait for another (which is added if it is neither cached nor pending)."""
        if self.is_cached(from_node_id):
            return
        self.add_node(from_node_id)
        waiting = self.blocking[from_node_id]
        if to_node_id not in waiting:
            waiting[to_node_id] = {}
            self.blockCount[to_node_id] += 1
        waiting[to_node_id][from_socket] = True

    def make_input_strong_link(self, to_node_id: str, to_input: str) -> None:
        """Ask for a lazy input. Raises NodeInputError when there is no such link."""
        inputs = self.dynprompt.get_node(to_node_id)["inputs"]
        if to_input not in inputs:
            raise NodeInputError(
                f"Node {to_node_id} says it needs input {to_input}, but there is no input to that node"
            )
        value = inputs[to_input]
        if not is_link(value):
            raise NodeInputError(f"Node {to_node_id} says it needs input {to_input}, but that value is a constant")
        self.add_strong_link(value[0], value[1], to_node_id)

    def add_external_block(self, node_id: str) -> Callable[[], None]:
        """Make a node wait for something outside the graph; call the result (in the loop's thread) when it happened."""
        if node_id not in self.blockCount:
            raise NodeNotFoundError(f"Node {node_id} is not waiting to be run")
        self.externalBlocks += 1
        self.blockCount[node_id] += 1

        def unblock() -> None:
            self.externalBlocks -= 1
            if node_id in self.blockCount:
                self._unblock(node_id)
            self.unblockedEvent.set()

        return unblock

    def _unblock(self, node_id: str) -> None:
        self.blockCount[node_id] -= 1
        if self.blockCount[node_id] == 0:
            self._enqueue(node_id)

    def pop_node(self, unique_id: str) -> None:
        """A node is done: release those that waited for it."""
        del self.pendingNodes[unique_id]
        for blocked in self.blocking.pop(unique_id):
            self._unblock(blocked)
        del self.blockCount[unique_id]
        self._queued.pop(unique_id, None)

    def get_ready_nodes(self) -> list[str]:
        return [node_id for node_id in self.pendingNodes if self.blockCount[node_id] == 0]

    def is_empty(self) -> bool:
        return not self.pendingNodes

    # ---- choice ----------------------------------------------------------------------------------------------------

    def _is_output(self, node_id: str) -> bool:
        return bool(getattr(node_class(self.dynprompt.get_node(node_id)["class_type"]), "OUTPUT_NODE", False))

    def _priority(self, node_id: str) -> int:
        if self._is_output(node_id) or is_async_node(node_class(self.dynprompt.get_node(node_id)["class_type"])):
            return 0
        fed = self.blocking[node_id]
        if any(self._is_output(consumer) for consumer in fed):
            return 1
        if any(self._is_output(second) for consumer in fed for second in self.blocking.get(consumer, ())):
            return 2
        return _OTHER

    def _enqueue(self, node_id: str) -> None:
        priority = self._priority(node_id)
        self._queued[node_id] = priority
        heapq.heappush(self._ready, (priority, self.pendingNodes[node_id], node_id))

    def pick(self) -> str | None:
        """The next node to run, None when all wait; it stays pending until `pop_node`."""
        while self._ready:
            priority, _, node_id = heapq.heappop(self._ready)
            if self._queued.get(node_id) == priority and self.blockCount.get(node_id) == 0:
                del self._queued[node_id]
                return node_id
        return None


class ExecutionList(TopologicalSort):
    """The sort of a running prompt: knows what is cached, stages one node at a time, counts who still needs a result."""

    def __init__(self, dynprompt: DynamicPrompt, output_cache: Any) -> None:
        super().__init__(dynprompt)
        self.output_cache = output_cache.outputs if isinstance(output_cache, CacheSet) else output_cache
        self.staged_node_id: str | None = None
        self._holds: dict[str, list[str]] = {}
        self._needed: dict[str, int] = {}

    def is_cached(self, node_id: str) -> bool:
        return self.output_cache.get(node_id) is not None

    def get_cache(self, from_node_id: str, to_node_id: str | None = None) -> CacheEntry | None:
        """Result of `from_node_id` for its consumer, None when it has not run."""
        return self.output_cache.get(from_node_id)

    def _register(self, unique_id: str) -> None:
        super()._register(unique_id)
        for value in self.dynprompt.get_node(unique_id)["inputs"].values():
            if is_link(value):
                self.hold(value[0], unique_id)

    def hold(self, from_node_id: str, to_node_id: str) -> None:
        """Keep a result until `to_node_id` is done."""
        self._holds.setdefault(to_node_id, []).append(from_node_id)
        self._needed[from_node_id] = self._needed.get(from_node_id, 0) + 1

    def start(self) -> None:
        """Queue the added nodes that wait for nothing; call it whenever nodes were added."""
        for node_id in self._fresh:
            if self.blockCount.get(node_id) == 0 and node_id not in self._queued and node_id != self.staged_node_id:
                self._enqueue(node_id)
        self._fresh.clear()

    async def choose(self, stop: Callable[[], bool] = lambda: False) -> str | None:
        """The node to run next, after waiting for outside events if need be; None when the rest wait in a circle.

        While waiting, `stop` is asked now and then; when it says so, any pending node is the answer.
        """
        while True:
            node_id = self.pick()
            if node_id is not None or self.externalBlocks == 0:
                return node_id
            if stop():
                return next(iter(self.pendingNodes))
            self.unblockedEvent.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.unblockedEvent.wait(), STOP_INTERVAL_S)

    def stage(self, node_id: str) -> None:
        """Mark the node that is about to run."""
        self.staged_node_id = node_id
        self._queued.pop(node_id, None)

    def unstage_node_execution(self) -> None:
        """The staged node has to wait for something and will be staged again."""
        node_id = self.staged_node_id
        self.staged_node_id = None
        assert node_id is not None
        if self.blockCount[node_id] == 0:
            self._enqueue(node_id)

    def complete_node_execution(self) -> None:
        """The staged node is done."""
        node_id = self.staged_node_id
        assert node_id is not None
        self.pop_node(node_id)
        self.staged_node_id = None
        for source in self._holds.pop(node_id, ()):
            self._needed[source] -= 1
            if self._needed[source] == 0:
                self.output_cache.release(source)
        if not self._needed.get(node_id):
            self.output_cache.release(node_id)

    def get_nodes_in_cycle(self) -> list[str]:
        """Pending nodes that wait, directly or not, for themselves."""
        waiting: dict[str, list[str]] = {node_id: [] for node_id in self.pendingNodes}
        for source, consumers in self.blocking.items():
            for node_id in consumers:
                waiting[node_id].append(source)
        # repeatedly remove the nodes that wait for none of the rest
        free = [node_id for node_id, sources in waiting.items() if not sources]
        counts = {node_id: len(sources) for node_id, sources in waiting.items()}
        while free:
            node_id = free.pop()
            counts.pop(node_id, None)
            for blocked in self.blocking.get(node_id, ()):
                if blocked in counts:
                    counts[blocked] -= 1
                    if counts[blocked] == 0:
                        free.append(blocked)
        return list(counts)
