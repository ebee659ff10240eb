"""Results kept from prompt to prompt, found by what a node would compute.

A node's *signature* is a digest of its class, its IS_CHANGED value, its constants and the signatures of the nodes it is
linked to: equal signatures mean equal results, whatever the ids. Digests of parents are reused, so signing a prompt is
linear in its size. Nodes whose class asks for UNIQUE_ID or is NOT_IDEMPOTENT have their id in it too.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from comfy_execution.graph_utils import is_link, node_class

Signature = bytes
_unique = itertools.count()


class Uncacheable(Exception):
    """A constant that has no stable representation."""


def _feed(digest: Any, value: Any) -> None:
    """Put a constant into a digest, with its type and length, so that different values never look alike."""
    if value is None or isinstance(value, bool):
        digest.update(b"n" if value is None else (b"t" if value else b"f"))
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(b"s%d:" % len(data))
        digest.update(data)
    elif isinstance(value, int):
        digest.update(b"i%d;" % int(value))
    elif isinstance(value, float):
        if value != value:  # NaN never equals anything, itself included
            raise Uncacheable
        digest.update(b"d" + struct.pack("<d", value))
    elif isinstance(value, bytes):
        digest.update(b"b%d:" % len(value))
        digest.update(value)
    elif isinstance(value, list | tuple):
        digest.update(b"l%d:" % len(value))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Mapping):
        digest.update(b"m%d:" % len(value))
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, set | frozenset):
        digest.update(b"e%d:" % len(value))
        for part in sorted(fingerprint(item) for item in value):
            digest.update(part)
    else:
        raise Uncacheable


def fingerprint(value: Any) -> bytes:
    """16 bytes that stand for a constant; never the same twice for NaN and for objects without a stable form."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        _feed(digest, value)
    except Uncacheable:
        return b"unique" + struct.pack("<q", next(_unique))
    return digest.digest()


def _links(node: Mapping[str, Any]) -> list[str]:
    return [value[0] for value in node["inputs"].values() if is_link(value)]


def include_unique_id_in_input(class_type: str) -> bool:
    """Whether a class asks for its node's id. Raises NodeNotFoundError for an unknown class."""
    class_def: Any = node_class(class_type)
    hidden = class_def.INPUT_TYPES().get("hidden", {})
    return isinstance(hidden, Mapping) and "UNIQUE_ID" in [kind for kind in hidden.values() if isinstance(kind, str)]


def id_matters(class_type: str) -> bool:
    """Whether equal inputs do not mean equal results: the class asks for its id or says it is not idempotent."""
    return getattr(node_class(class_type), "NOT_IDEMPOTENT", False) or include_unique_id_in_input(class_type)


class Signer:
    """Signatures of the nodes of one prompt, each computed once.

    `dynprompt` gives nodes by id; `changed` holds the fingerprint of IS_CHANGED of those nodes that have one;
    `id_matters(class_type)` says whether a node's id is part of its signature.
    """

    def __init__(self, dynprompt: Any, changed: Mapping[str, bytes], id_matters: Any) -> None:
        self._dynprompt = dynprompt
        self._changed = changed
        self._id_matters = id_matters
        self._done: dict[str, Signature] = {}

    def sign(self, node_id: str) -> Signature:
        """Signature of a node; walks its ancestors without recursion. A cycle gets a signature that never repeats."""
        done = self._done
        stack = [node_id]
        open_ids: set[str] = set()
        while stack:
            current = stack[-1]
            if current in done:
                stack.pop()
                continue
            if not self._dynprompt.has_node(current):
                done[current] = fingerprint(object())
                stack.pop()
                continue
            node = self._dynprompt.get_node(current)
            waiting = [] if current in open_ids else [link for link in _links(node) if link not in done]
            if waiting:
                open_ids.add(current)
                stack.extend(waiting)
            else:
                done[current] = self._digest(current, node)
                stack.pop()
        return done[node_id]

    def _digest(self, node_id: str, node: Mapping[str, Any]) -> Signature:
        digest = hashlib.blake2b(digest_size=16)
        class_type = node["class_type"]
        try:
            _feed(digest, class_type)
            _feed(digest, self._changed.get(node_id, b""))
            _feed(digest, node_id if self._id_matters(class_type) else None)
            inputs = node["inputs"]
            for name in sorted(inputs):
                value = inputs[name]
                _feed(digest, name)
                if is_link(value):
                    digest.update(b"L")
                    _feed(digest, self._done.get(value[0]) or fingerprint(object()))
                    _feed(digest, value[1])
                else:
                    _feed(digest, value)
        except Uncacheable:
            return fingerprint(object())
        return digest.digest()


class CacheKeySetInputSignature:
    """Signatures of nodes under ComfyUI's name, for packs that ask whether nodes would compute the same.

    is_changed_cache: has `async get(node_id)`, the answer of IS_CHANGED.
    """

    def __init__(self, dynprompt: Any, node_ids: Iterable[str], is_changed_cache: Any) -> None:
        self.dynprompt = dynprompt
        self.is_changed_cache = is_changed_cache
        self._changed: dict[str, bytes] = {}
        self._signer = Signer(dynprompt, self._changed, id_matters)
        self.keys: dict[str, Signature] = {}

    async def add_keys(self, node_ids: Iterable[str]) -> None:
        """Sign nodes, after the nodes they depend on were asked whether they changed."""
        waiting = [node_id for node_id in node_ids if self.dynprompt.has_node(node_id)]
        wanted = dict.fromkeys(waiting)
        while waiting:
            node_id = waiting.pop()
            if node_id not in self._changed and self.dynprompt.has_node(node_id):
                self._changed[node_id] = fingerprint(await self.is_changed_cache.get(node_id))
                waiting += _links(self.dynprompt.get_node(node_id))
        self.keys.update({node_id: self._signer.sign(node_id) for node_id in wanted})

    def all_node_ids(self) -> set[str]:
        """The nodes that were signed."""
        return set(self.keys)

    def get_used_keys(self) -> Iterable[Signature]:
        """The signatures."""
        return self.keys.values()

    def get_data_key(self, node_id: str) -> Signature | None:
        """A node's signature, equal for nodes that compute the same; None for one that was not signed."""
        return self.keys.get(node_id)


@dataclass
class CacheEntry:
    """Result of a node: `outputs[slot]` is a list of values; `ui` what the page shows, `{"meta", "output"}` or None.

    `first_only` says that the node ran on rank 0 alone and the others do not have the values (yet); `files` are those
    that the node is still writing.
    """

    ui: dict[str, Any] | None
    outputs: list[list[Any]]
    first_only: bool = False
    owner: tuple[str, str] | None = field(default=None, compare=False)
    used: int = field(default=0, compare=False)
    made: tuple[int, int] = field(default=(0, 0), compare=False)
    files: list[Any] = field(default_factory=list, compare=False)


class CacheType(Enum):
    """What is kept: CLASSIC the last prompt's results, LRU the latest `lru` ones, NONE only what the running prompt
    needs, RAM_PRESSURE all, as long as `ram` GiB of host memory are available.
    """

    CLASSIC = 0
    LRU = 1
    NONE = 2
    RAM_PRESSURE = 3


class OutputCache:
    """Results by node id for the running prompt, by signature across prompts (here: until the next prompt).

    `owner` of an entry is the (id, class) of the prompt's node that an ephemeral node was expanded from; such results
    are kept as long as that node is in the prompts and its expansions contain them.
    """

    signed = True

    def __init__(self) -> None:
        self._entries: OrderedDict[Signature, CacheEntry] = OrderedDict()
        self._keys: dict[str, Signature] = {}
        self._current: dict[str, CacheEntry] = {}
        self._generation = 0
        self._grown: dict[tuple[str, str], int] = {}

    def begin(self, signatures: Mapping[str, Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        """Start a prompt with these static nodes; forget what no longer belongs."""
        self._generation += 1
        self._keys = dict(signatures)
        self._current = {}
        self._forget(set(signatures.values()), owners)
        self._grown = {owner: at for owner, at in self._grown.items() if owner in owners}

    def grow(self, signatures: Mapping[str, Signature], owner: tuple[str, str]) -> None:
        """Add the ephemeral nodes that `owner` has expanded into."""
        self._keys.update(signatures)
        self._grown[owner] = self._generation

    def get(self, node_id: str) -> CacheEntry | None:
        """Result of a node of the running prompt, None when it has to run."""
        entry = self._current.get(node_id)
        if entry is None:
            key = self._keys.get(node_id)
            entry = self._entries.get(key) if key is not None else None
            if entry is None:
                return None
            self._current[node_id] = entry
            self._touch(self._keys[node_id], entry)
        return entry

    def set(self, node_id: str, entry: CacheEntry) -> None:
        self._current[node_id] = entry
        key = self._keys.get(node_id)
        if key is not None:
            self._entries[key] = entry
            self._touch(key, entry)

    def discard(self, node_id: str) -> None:
        """Forget a result that not every rank has."""
        self._current.pop(node_id, None)
        key = self._keys.get(node_id)
        if key is not None:
            self._entries.pop(key, None)

    def release(self, node_id: str) -> None:
        """Every consumer of a node has run."""

    def clear(self) -> None:
        self._entries.clear()
        self._current.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _touch(self, key: Signature, entry: CacheEntry) -> None:
        entry.used = self._generation

    def _belongs(self, entry: CacheEntry, owners: AbstractSet[tuple[str, str]]) -> bool:
        if entry.owner is None or entry.owner not in owners:
            return False
        return entry.used >= self._grown.get(entry.owner, 0)

    def _forget(self, kept: AbstractSet[Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        for key in [
            key for key, entry in self._entries.items() if key not in kept and not self._belongs(entry, owners)
        ]:
            del self._entries[key]


class LRUCache(OutputCache):
    """Keeps the `max_size` results used last, and always all of the running prompt's."""

    def __init__(self, max_size: int) -> None:
        super().__init__()
        self.max_size = max_size

    def _touch(self, key: Signature, entry: CacheEntry) -> None:
        super()._touch(key, entry)
        self._entries.move_to_end(key)

    def _forget(self, kept: AbstractSet[Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        excess = len(self._entries) - self.max_size
        for key in [key for key in self._entries if key not in kept][: max(excess, 0)]:
            del self._entries[key]


class NoCache(OutputCache):
    """Keeps a result only until the last node that needs it has run."""

    signed = False

    def begin(self, signatures: Mapping[str, Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        self._current = {}

    def grow(self, signatures: Mapping[str, Signature], owner: tuple[str, str]) -> None:
        pass

    def release(self, node_id: str) -> None:
        self._current.pop(node_id, None)

    def __len__(self) -> int:
        return len(self._current)


def _host_bytes(value: Any) -> float:
    """Host memory behind an output. Tensors count half: what was computed is worth more than what was loaded."""
    if isinstance(value, Mapping):
        return sum(_host_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_host_bytes(item) for item in value)
    said = getattr(value, "get_ram_usage", None)
    if callable(said):
        return float(said())
    if getattr(getattr(value, "device", None), "type", None) == "cpu" and hasattr(value, "element_size"):
        return value.numel() * value.element_size() / 2
    return 0.0


def _available_host_bytes() -> int:
    import torch

    import comfy.model_management

    return comfy.model_management.get_free_memory(torch.device("cpu"))


class RamCache(OutputCache):
    """Keeps every result until less than `headroom_gib` of host memory are available, then drops old and large ones.

    A result weighs its size times 1.3 for every prompt since it was used last; the heaviest goes first, until a tenth
    more than the headroom is available. Only rank 0 looks at its memory; results are named to the other ranks by
    `CacheEntry.made`, (prompt, number within it), for signatures of objects differ from process to process.
    """

    AGE, SMALLEST, MARGIN, COLLECT_INTERVAL_S = 1.3, 0.1 * 2**30, 1.1, 10.0

    def __init__(self, headroom_gib: float, available: Callable[[], int] = _available_host_bytes) -> None:
        super().__init__()
        self.headroom = headroom_gib * 2**30
        self._available = available
        self._made = 0
        self._collected = -self.COLLECT_INTERVAL_S

    def begin(self, signatures: Mapping[str, Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        super().begin(signatures, owners)
        self._made = 0

    def set(self, node_id: str, entry: CacheEntry) -> None:
        self._made += 1
        entry.made = (self._generation, self._made)
        super().set(node_id, entry)

    def _forget(self, kept: AbstractSet[Signature], owners: AbstractSet[tuple[str, str]]) -> None:
        pass

    def _weight(self, entry: CacheEntry) -> float:
        return self.AGE ** (self._generation - entry.used) * (self.SMALLEST + _host_bytes(entry.outputs))

    def relieve(self, needed: Callable[[], Collection[str]]) -> list[tuple[int, int]]:
        """Drop results until the headroom is available, never those of nodes in `needed()`; returns what was dropped.

        While there is room, `needed` is not asked: it is as large as the prompt, and this is called after every node.
        """
        if self._available() >= self.headroom:
            return []
        if time.monotonic() - self._collected >= self.COLLECT_INTERVAL_S:
            gc.collect()
            self._collected = time.monotonic()
        kept = {id(self._current[node_id]) for node_id in needed() if node_id in self._current}
        loose = [entry for entry in self._entries.values() if id(entry) not in kept]
        loose.sort(key=lambda entry: (self._weight(entry), -entry.used))
        dropped: list[tuple[int, int]] = []
        while loose and self._available() < self.headroom * self.MARGIN:
            dropped.append(loose.pop().made)
            self.drop(dropped[-1:])
        return dropped

    def drop(self, made: Collection[tuple[int, int]]) -> None:
        """Forget results; those this rank does not have are ignored."""
        if not made:
            return
        stores: list[dict[Any, CacheEntry]] = [self._entries, self._current]
        for held in stores:
            for key in [key for key, entry in held.items() if entry.made in made]:
                del held[key]


class ObjectCache:
    """Node instances by (node id, class), so that a node may keep state between prompts while it stays in them."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], Any] = {}
        self._used: set[tuple[str, str]] = set()
        self._dynprompt: Any = None

    def begin(self, dynprompt: Any, static: Iterable[tuple[str, str]]) -> None:
        """Start a prompt; instances of nodes that are neither in it nor were used in the last one are dropped."""
        keep = self._used | set(static)
        self._objects = {key: value for key, value in self._objects.items() if key in keep}
        self._used = set()
        self._dynprompt = dynprompt

    def _key(self, node_id: str) -> tuple[str, str]:
        return node_id, self._dynprompt.get_node(node_id)["class_type"]

    def get(self, node_id: str) -> Any:
        key = self._key(node_id)
        self._used.add(key)
        return self._objects.get(key)

    def set(self, node_id: str, value: Any) -> None:
        key = self._key(node_id)
        self._used.add(key)
        self._objects[key] = value

    def clear(self) -> None:
        self._objects.clear()
        self._used.clear()


class CacheSet:
    """The executor's caches. `cache_args`: `{"lru": results}` for CacheType.LRU, `{"ram": GiB}` for RAM_PRESSURE."""

    def __init__(self, cache_type: CacheType | None = None, cache_args: Mapping[str, Any] | None = None) -> None:
        self.cache_type = cache_type or CacheType.CLASSIC
        arguments = dict(cache_args or {})
        if self.cache_type is CacheType.LRU:
            self.outputs: OutputCache = LRUCache(int(arguments.get("lru", 0)))
        elif self.cache_type is CacheType.RAM_PRESSURE:
            self.outputs = RamCache(float(arguments.get("ram", 4.0)))
        elif self.cache_type is CacheType.NONE:
            self.outputs = NoCache()
        else:
            self.outputs = OutputCache()
        self.objects = ObjectCache()
        self.all = [self.outputs, self.objects]
