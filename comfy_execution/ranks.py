"""Who runs a node when several ranks execute the same prompt, and what they have to agree on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

from comfy_execution import randomness
from comfy_execution.caching import CacheEntry
from comfy_execution.graph import DynamicPrompt, node_class
from comfy_execution.graph_utils import is_link
from comfy_execution.lockstep import Lockstep

DONE, EXPAND, PENDING = "done", "expand", "pending"
# values that rank 0 can send cheaply: a node that has only these need not run on all ranks
_PLAIN_DATA = {"IMAGE", "MASK", "LATENT", "AUDIO", "STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}


def _kinds(declared: Any) -> list[Any]:
    """Types of inputs; "?" where they cannot be known."""
    if not isinstance(declared, Mapping):
        return [] if declared is None else ["?"]
    kinds = [info[0] if isinstance(info, list | tuple) and info else "?" for info in declared.values()]
    return ["COMBO" if isinstance(kind, list | tuple) else kind for kind in kinds]


class Ranks:
    """The rank rules of one running prompt.

    A node class may say `TACO_RANKS = "all" | "first"`. Otherwise nodes with side effects (API nodes, nodes that are
    not idempotent, output nodes whose outputs nobody uses or that only handle plain data) run on rank 0 only, all
    others on every rank.
    """

    def __init__(self, lockstep: Lockstep, dynprompt: DynamicPrompt) -> None:
        self.lockstep = lockstep
        self.dynprompt = dynprompt
        self.several = lockstep.world_size > 1
        self._plain: dict[Any, bool] = {}
        self._used: set[str] = set()
        self._random_differs = True
        self.add_links(dynprompt.original_prompt)

    def add_links(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember which nodes' outputs are used by these."""
        if self.several:
            for node in nodes.values():
                self._used.update(value[0] for value in node["inputs"].values() if is_link(value))

    def first_only(self, node_id: str) -> bool:
        """Whether a node runs on rank 0 alone; never when there is only one rank."""
        if not self.several:
            return False
        class_def = node_class(self.dynprompt.get_node(node_id)["class_type"])
        said = getattr(class_def, "TACO_RANKS", None)
        if said is not None:
            if said not in ("all", "first"):
                raise ValueError(f"{class_def.__name__}.TACO_RANKS is {said!r}; allowed are 'all' and 'first'")
            return said == "first"
        if getattr(class_def, "API_NODE", False) or getattr(class_def, "NOT_IDEMPOTENT", False):
            return True
        if not getattr(class_def, "OUTPUT_NODE", False):
            return False
        return node_id not in self._used or self._is_plain(class_def)

    def _is_plain(self, class_def: Any) -> bool:
        """Whether a class takes and returns nothing but data: it writes a file, rather than samples."""
        if class_def not in self._plain:
            inputs = class_def.INPUT_TYPES()
            kinds = [kind for part in ("required", "optional") for kind in _kinds(inputs.get(part))]
            self._plain[class_def] = {*kinds, *class_def.RETURN_TYPES} <= _PLAIN_DATA
        return self._plain[class_def]

    async def align_random(self, first_only: bool) -> None:
        """Before a node runs: what it draws without a seed is the same on all ranks.

        Generators diverge where a node runs on rank 0 alone; before the next node on all ranks they take rank 0's
        state.
        """
        if first_only:
            self._random_differs = True
        elif self.several and self._random_differs:
            self._random_differs = False
            state = await self.decide("random state", randomness.get_state)
            if not self.lockstep.is_first:
                randomness.set_state(state)

    def share_inputs(self, node_id: str, get_cache: Callable[[str], CacheEntry | None]) -> None:
        """Give every rank the results that only rank 0 has and this node is linked to. Call it on all ranks."""
        self.share_results(filter(is_link, self.dynprompt.get_node(node_id)["inputs"].values()), get_cache)

    def share_results(self, links: Iterable[Any], get_cache: Callable[[str], CacheEntry | None]) -> None:
        """Give every rank the results behind these (node id, slot) pairs that only rank 0 has. Call it on all ranks."""
        if not self.several:
            return
        for source, _ in links:
            entry = get_cache(source)
            if entry is not None and entry.first_only:
                entry.outputs = self.lockstep.share(f"outputs of node {source}", partial(getattr, entry, "outputs"))
                entry.first_only = False

    async def decide(self, topic: str, choose: Callable[[], Any]) -> Any:
        """`Lockstep.decide`; a follower lets its asynchronous nodes run while it waits."""
        return self.lockstep.decide(topic, choose)

    async def decide_async(self, topic: str, choose: Callable[[], Awaitable[Any]]) -> Any:
        """Like `decide` for a choice that has to be awaited."""
        value = await choose() if self.lockstep.is_first else None
        return await self.decide(topic, lambda: value)
