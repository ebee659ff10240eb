"""Who runs a node when several ranks execute the same prompt, and what they have to agree on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from comfy_execution import randomness
from comfy_execution.caching import CacheEntry
from comfy_execution.graph import DynamicPrompt, get_input_info, is_async_node, node_class
from comfy_execution.graph_utils import is_link
from comfy_execution.lockstep import Lockstep

DONE, EXPAND, PENDING = "done", "expand", "pending"
# values that rank 0 can send cheaply: a node that has only these need not run on all ranks
_PLAIN_DATA = {"IMAGE", "MASK", "LATENT", "AUDIO", "STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
_SMALL = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
# values that hold networks or functions, which cannot be sent to another process
_OBJECTS = {
    "MODEL", "CLIP", "VAE", "CONTROL_NET", "CLIP_VISION", "STYLE_MODEL", "UPSCALE_MODEL", "GLIGEN", "PHOTOMAKER",
    "AUDIO_ENCODER", "MODEL_PATCH", "GUIDER", "SAMPLER", "NOISE", "HOOKS",
}  # fmt: skip


def kinds_of(declared: Any) -> set[str]:
    """Names of the types that an input or output declares: each member of a union, COMBO for a list of choices.

    Packs declare types that are unequal to nothing, or that cannot be hashed; here they are plain text.
    """
    if isinstance(declared, list | tuple):
        return {"COMBO"}
    text = str.__str__(declared) if isinstance(declared, str) else "?"
    return {part.strip() for part in text.split(",")}


class Ranks:
    """The rank rules of one running prompt.

    A node class may say `TACO_RANKS = "all" | "first"`. Otherwise nodes with side effects (API nodes, nodes that are
    not idempotent, output nodes whose outputs nobody uses or that are given plain data only) run on rank 0 only, all
    others on every rank. Nodes that return networks always run on every rank, for these cannot be sent; where other
    outputs turn out not to be sendable, the other ranks run the node after rank 0 did (`hands_over`).
    """

    def __init__(self, lockstep: Lockstep, dynprompt: DynamicPrompt) -> None:
        self.lockstep = lockstep
        self.dynprompt = dynprompt
        self.several = lockstep.world_size > 1
        self._files_aside = False
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
        if getattr(class_def, "API_NODE", False):
            return True
        if self._returns(class_def) & _OBJECTS and node_id in self._used:
            return False
        if getattr(class_def, "NOT_IDEMPOTENT", False):
            return True
        if not getattr(class_def, "OUTPUT_NODE", False):
            return False
        return node_id not in self._used or self._is_given_plain_data(node_id, class_def)

    @staticmethod
    def _returns(class_def: Any) -> set[str]:
        return {kind for declared in class_def.RETURN_TYPES for kind in kinds_of(declared)}

    def _is_given_plain_data(self, node_id: str, class_def: Any) -> bool:
        """Whether a node is linked to nothing but data: it writes a file, rather than samples.

        What a link carries is said by the node that it comes from, or else by the input that it ends in.
        """
        valid_inputs = class_def.INPUT_TYPES()

        def is_plain(name: str, link: Any) -> bool:
            ends_in = kinds_of(get_input_info(class_def, name, valid_inputs)[0])
            return self._kinds_from(link) <= _PLAIN_DATA or ends_in <= _PLAIN_DATA

        inputs = self.dynprompt.get_node(node_id)["inputs"]
        return all(is_plain(name, value) for name, value in inputs.items() if is_link(value))

    def _kinds_from(self, link: Any) -> set[str]:
        source: Any = node_class(self.dynprompt.get_node(link[0])["class_type"])
        slot = int(link[1])
        return kinds_of(source.RETURN_TYPES[slot]) if slot < len(source.RETURN_TYPES) else {"?"}

    # ---- what only rank 0 has ---------------------------------------------------------------------------------------

    def hands_over(self, node_id: str, first_only: bool) -> bool:
        """Whether rank 0 offers a node's outputs to the others as soon as it has run: it may be that they cannot be sent.

        Not where the class says that it runs on rank 0, or is paid by the call: it never runs anywhere else then.
        """
        class_def: Any = node_class(self.dynprompt.get_node(node_id)["class_type"])
        elsewhere = getattr(class_def, "TACO_RANKS", None) is None and not getattr(class_def, "API_NODE", False)
        foreign = first_only and node_id in self._used and not self._returns(class_def) <= _PLAIN_DATA
        return foreign and elsewhere and not is_async_node(class_def)

    def agree_on_texts(self, node_id: str, outputs: list[list[Any]]) -> list[list[Any]]:
        """Outputs of a node that ran on every rank, if it may have written files: texts and numbers are rank 0's.

        They may be the names of files. No rank goes on before all have come here, so none reads what another one is
        still writing. Such nodes are output nodes, and nodes of packs that return a text.
        """
        class_def: Any = node_class(self.dynprompt.get_node(node_id)["class_type"])
        kinds = [kinds_of(declared) for declared in class_def.RETURN_TYPES]
        foreign = str(getattr(class_def, "RELATIVE_PYTHON_MODULE", "")).startswith("custom_nodes")
        if not getattr(class_def, "OUTPUT_NODE", False) and not (foreign and {"STRING"} in kinds):
            return outputs
        mine = {
            str(slot): values
            for slot, (kind, values) in enumerate(zip(kinds, outputs, strict=False))
            if kind <= _SMALL and all(type(value) in (str, int, float, bool) for value in values)
        }
        theirs = self.lockstep.gather(f"texts of node {node_id}", json.dumps(mine))[0]
        agreed = json.loads(theirs)
        return [agreed.get(str(slot), values) for slot, values in enumerate(outputs)]

    @contextmanager
    def files_aside(self, class_def: Any) -> Iterator[None]:
        """While an output node runs on a rank that follows, what it saves goes to a folder of the rank's own.

        So files are saved once, by rank 0, and ranks do not write to the same one. The folder is emptied by the next
        prompt that needs it.
        """
        import folder_paths

        if self.lockstep.is_first or not getattr(class_def, "OUTPUT_NODE", False):
            yield
            return
        before = folder_paths.get_output_directory(), folder_paths.get_temp_directory()
        own = os.path.join(before[1], f"rank_{self.lockstep.rank}")
        if not self._files_aside:
            shutil.rmtree(own, ignore_errors=True)
            self._files_aside = True
        folders = os.path.join(own, "output"), os.path.join(own, "temp")
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        folder_paths.set_output_directory(folders[0])
        folder_paths.set_temp_directory(folders[1])
        try:
            yield
        finally:
            folder_paths.set_output_directory(before[0])
            folder_paths.set_temp_directory(before[1])

    async def align_random(self, node_id: str, first_only: bool) -> None:
        """Before a node runs: what it draws without a seed is the same on all ranks.

        Generators diverge where a node runs on rank 0 alone; before the next node on all ranks they take rank 0's
        state. A node that is not idempotent lives by such numbers, and gets that state in any case.
        """
        if not self.several:
            return
        class_def = node_class(self.dynprompt.get_node(node_id)["class_type"])
        everywhere = not first_only or self.hands_over(node_id, first_only)
        if everywhere and (self._random_differs or getattr(class_def, "NOT_IDEMPOTENT", False)):
            state = await self.decide("random state", randomness.get_state)
            if not self.lockstep.is_first:
                randomness.set_state(state)
        self._random_differs = first_only or (self._random_differs and not everywhere)

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
