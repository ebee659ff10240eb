"""The index of the page's templates, with what runs here marked and placed first, and with what the others lack.

The page sorts templates by `usage`, `searchRank` and date and shows `tags` and `description`, so that is where it is said.
All is told from the templates alone (`template_requirements`), before anything is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from app import frontend_management as frontend
from app.template_requirements import is_network, missing_of

_INDEX = re.compile(r"index(?:\.([A-Za-z-]+))?\.json")
_FIRST, _LAST = 1000, -1000  # the ends of the page's searchRank
_GIB = 2**30
_MOST_NAMES = 4
_SERVICE = "service"  # kind of what calls a paid service elsewhere


@dataclass(frozen=True)
class Memory:
    """Bytes of the GPUs in use together, and of host memory, from which weights are streamed. Without GPUs nothing is said
    of memory: files are mapped, and are read again where they do not fit."""

    devices: int
    host: int


@dataclass(frozen=True)
class _Words:
    """What is said, by kind of what is missing; `{}` is its names. short: in a card, where it is not the name alone."""

    runs: str
    lacks: str
    missing: Mapping[str, str]
    short: Mapping[str, str]
    slow: str
    between: str
    end: str


_EN = _Words(
    "Runs here", "Not here: {}",
    {_SERVICE: "It calls a paid service, for which there are no nodes", "family": "Not in this version: {}",
     "format": "Files in these formats are not read: {}", "node": "Nodes that are not in this version: {}",
     "memory": "Its files need {} of memory, more than this machine has"},
    {_SERVICE: "a paid service", "format": "{} files", "memory": "{} of memory"},
    "Its files take {}, more than the GPUs have: weights are streamed, which is slower.", ", ", ".",
)  # fmt: skip
_ZH = _Words(
    "可以运行", "不能运行：{}",
    {_SERVICE: "它调用收费服务，这个版本没有这类节点", "family": "这个版本没有：{}", "format": "不能读取这些格式的文件：{}",
     "node": "这个版本没有这些节点：{}", "memory": "它的文件需要 {} 内存，超过现有的内存"},
    {_SERVICE: "收费服务", "format": "{} 格式", "memory": "{} 内存"},
    "它的文件有 {}，超过 GPU 显存：权重会边算边传，因此较慢。", "、", "。",
)  # fmt: skip


def words_for(language: str) -> _Words:
    """Chinese for zh and zh-TW, else English."""
    return _ZH if language.startswith("zh") else _EN


def lacking_text(missing: Collection[Mapping[str, str]], words: _Words) -> str:
    """What is missing, in a sentence for each kind; of many names the first ones. Empty when nothing is."""
    said = []
    for kind, text in words.missing.items():
        names = [entry["name"] for entry in missing if entry["kind"] == kind]
        more = [f"+{len(names) - _MOST_NAMES}"] if len(names) > _MOST_NAMES else []
        if names:
            said.append(text.format(words.between.join(names[:_MOST_NAMES] + more)) + words.end)
    return " ".join(said)


def _tag(missing: Collection[Mapping[str, str]], words: _Words) -> str:
    """What a card has room for: that it runs, or the first thing that is missing."""
    if not missing:
        return words.runs
    order = list(words.missing)
    first = min(missing, key=lambda entry: order.index(entry["kind"]))
    name = words.short.get(first["kind"], "{}").format(first["name"])
    return words.lacks.format(name)


class TemplateIndex:
    """Marks indices; what a template lacks is looked at once for each set of nodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: frozenset[str] = frozenset()
        self._missing: dict[str, list[dict[str, str]]] = {}

    def marked(self, name: str, known: Collection[str], memory: Memory) -> Any:
        """An index by its file's name (`index.json`, `index.zh.json`), marked; None for other files and missing ones.

        known: the names of all node types.
        """
        found = _INDEX.fullmatch(name)
        path = frontend.template_file(name) if found else None
        if found is None or path is None:
            return None
        with open(path, encoding="utf-8") as file:
            groups = json.load(file)
        words = words_for(found.group(1) or "")
        with self._lock:
            if self._known != frozenset(known):
                self._known, self._missing = frozenset(known), {}
            for template in (template for group in groups for template in group.get("templates", [])):
                self._mark(template, memory, words)
        return groups

    def missing(self, entry: Mapping[str, Any], memory: Memory) -> list[dict[str, str]]:
        """What a template of the index lacks: as `missing_of`, also `memory` and `service`."""
        if entry.get("openSource") is False:
            return [{"kind": _SERVICE, "name": "", "text": _EN.missing[_SERVICE]}]
        size = int(entry.get("size") or 0)
        lacking = list(self._of_file(entry["name"]))
        if memory.devices and size > memory.devices + memory.host:
            text = f"{size / _GIB:.0f} GiB"
            lacking.append({"kind": "memory", "name": text, "text": _EN.missing["memory"].format(text)})
        return lacking

    def _of_file(self, name: str) -> list[dict[str, str]]:
        if name not in self._missing:
            path = frontend.template_file(name + ".json")
            graph = {}
            if path is not None:
                with open(path, encoding="utf-8") as file:
                    graph = json.load(file)
            found = missing_of(graph, self._known)
            self._missing[name] = sorted(found, key=lambda entry: not is_network(entry["name"]))  # which people know
        return self._missing[name]

    def _mark(self, entry: dict[str, Any], memory: Memory, words: _Words) -> None:
        missing = self.missing(entry, memory)
        notes = [lacking_text(missing, words)] if missing else []
        size = int(entry.get("size") or 0)
        if not missing and memory.devices and size > memory.devices:
            notes.append(words.slow.format(f"{size / _GIB:.0f} GiB"))
        entry["tags"] = [_tag(missing, words), *entry.get("tags", [])]
        entry["description"] = " ".join([*notes, entry.get("description", "")]).strip()
        entry["searchRank"] = _LAST if missing else _FIRST
        if missing:
            entry["usage"] = 0  # which weighs more than the rank
        entry["taco_missing"] = missing


def memory_here() -> Memory:
    """Memory of this machine's devices in use, and of the host."""
    import torch

    import comfy.model_management as management
    from comfy.taco_dit import runtime

    device = management.get_torch_device()
    host = int(management.get_total_memory(torch.device("cpu")))
    if device.type == "cpu":
        return Memory(0, host)
    return Memory(int(management.get_total_memory(device)) * runtime.current().manager.world_size, host)


def file_of_index(name: str) -> bool:
    """Whether a file of the templates is an index."""
    return _INDEX.fullmatch(os.path.basename(name)) is not None
