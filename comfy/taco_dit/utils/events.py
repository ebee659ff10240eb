"""Warnings and errors for the panel: a bounded list, each with what to do about it.

Rank 0 keeps the list. Warnings come from `logging`, on every rank; how prompts failed comes from the prompt worker.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

CAPACITY = 100
TEXT_LIMIT = 600

# (code, pattern, what to do), the first that matches the message is used; see docs/troubleshooting.md
_REMEDIES = (
    ("out_of_memory", r"OutOfMemory|out of memory",
     "Use a smaller picture or batch, load the model in a smaller weight type (fp8), or end other programs on this"
     " GPU; then queue again."),
    ("ranks_differ", r"other shapes than rank 0|other LoRA or weight patches",
     "A custom node does something else on each rank. Find it by disabling packs; a node with side effects can say"
     " TACO_RANKS = \"first\"."),
    ("nccl", r"NCCL|nccl",
     "Start with NCCL_DEBUG=INFO and read the console. NCCL_P2P_DISABLE=1 helps where peer access does not work, "
     "NCCL_NVLS_ENABLE=0 where multicast does not."),
    ("restarted", r"started all ranks again",
     "Rank 0 ended; often the system ended it for want of memory. Look at the console, use fewer ranks "
     "(--taco-ranks) or smaller models. The queue goes on with what was waiting."),
    ("no_gpu", r"no NVIDIA GPU found",
     "Install the NVIDIA driver (nvidia-smi must work) and unset an empty CUDA_VISIBLE_DEVICES."),
    ("gpu_not_found", r"GPU [\d, ]+,? ?(\(\d+ present\))?.*not found|not found \(\d+ present\)",
     "Name GPUs that exist: nvidia-smi -L lists them, TACO_GPUS=0,1 or --gpus 0,1 chooses."),
    ("no_effect", r"without effect in this version",
     "Nothing breaks; leave these flags out of the command line."),
    ("unknown_model", r"holds no diffusion model this version knows|is a model of .*, which is not in this version",
     "Use a model family that this version has, or the loader for the part that the file contains."),
    ("broken_file", r"is not a complete safetensors file",
     "Download the file again."),
    ("unsafe_file", r"cannot be read as weights only",
     "Convert the file to safetensors; code in files is never run."),
    ("not_here", r"is not in this version of TACO-DiT",
     "Take the nodes that are named out of the workflow."),
    ("together", r"stay together on every rank",
     "It works, with less to share. Take the pack that wraps the model out to compare."),
    ("disagreed", r"ranks disagreed",
     "Harmless: all ranks use rank 0's numbers. A node draws random numbers without a seed."),
    ("host_memory", r"the rest stays in host memory",
     "It runs, but slower. Use fp8 weights, or a GPU with more memory."),
    ("not_compiled", r"torch\.compile failed|cannot be captured",
     "It runs, but slower. Install a C compiler if there is none."),
    ("pack_failed", r"[Cc]annot import|IMPORT FAILED|did not import|no NODE_CLASS_MAPPINGS",
     "Install what the pack needs into .venv, or update or remove it; all other nodes work."),
    ("no_module", r"No module named '",
     "A node needs a package that is not installed. Install it into .venv (python -m pip install NAME) and start again, "
     "or take the node out of the workflow."),
    ("node_undescribed", r"retrieving information for the .* node",
     "A pack's node cannot describe its inputs and is left out. Update the pack, or remove it."),
    ("tiled", r"retrying with tiled VAE",
     "Nothing to do: the picture is decoded in tiles, which is slower."),
)  # fmt: skip
_COMPILED_REMEDIES = tuple((code, re.compile(pattern), remedy) for code, pattern, remedy in _REMEDIES)
_SEE_CONSOLE = "Look at the console and at docs/troubleshooting.md."
REMEDY_CODES = (*(code for code, _, _ in _REMEDIES), "see_node", "see_console")


def remedy_for(text: str, node: str | None = None) -> tuple[str, str]:
    """(code, text) of what to do about a message; `node` is the node that failed, if one did."""
    for code, pattern, remedy in _COMPILED_REMEDIES:
        if pattern.search(text):
            return code, remedy
    if node:
        return "see_node", (
            f"Look at the inputs of node {node}; the console has the traceback. The queue goes on: change the node or "
            "take it out, and queue again."
        )
    return "see_console", _SEE_CONSOLE


def shortened(text: str) -> str:
    """One line that says what a long message is about: of a traceback its last line, else the first."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 1] + "…"


class EventLog:
    """The last `capacity` events, oldest first; the same text again only increases its count. Thread-safe."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)

    def add(
        self,
        level: str,
        text: str,
        rank: int,
        cure: tuple[str, str] | None = None,
        node: str | None = None,
        at: float | None = None,
    ) -> None:
        """Note an event. `level` is "warning" or "error", `cure` as from `remedy_for`, `at` seconds since 1970."""
        text = shortened(text)
        code, cure_text = cure or remedy_for(text, node)
        at = time.time() if at is None else at
        with self._lock:
            number = next(self._numbers)
            for event in self._events:
                if (event["level"], event["text"]) == (level, text):
                    ranks = sorted({*event["ranks"], rank})
                    event |= {"id": number, "time": at, "count": event["count"] + 1, "ranks": ranks}
                    self._events.remove(event)
                    self._events.append(event)
                    return
            self._events.append({
                "id": number, "level": level, "text": text, "cure": cure_text, "cure_code": code, "ranks": [rank],
                "node": node, "time": at, "count": 1,
            })  # fmt: skip
            del self._events[: -self._capacity]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._events.clear()

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON: copies."""
        with self._lock:
            return [dict(event) for event in self._events]

    def since(self, number: int) -> list[dict[str, Any]]:
        """Copies of the events with a higher id."""
        return [event for event in self.as_list() if event["id"] > number]

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        """Add another rank's events."""
        for event in events:
            cure = event["cure_code"], event["cure"]
            self.add(event["level"], event["text"], event["ranks"][0], cure, event["node"], event["time"])


class EventHandler(logging.Handler):
    """Puts warnings and errors of `logging` into an event log, with what to do if the record says so.

    That is its `cure`, a pair as from `remedy_for`.

    Records marked `reported` are added elsewhere.
    """

    def __init__(self, log: EventLog, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "reported", False):
            return
        try:
            level = "error" if record.levelno >= logging.ERROR else "warning"
            self._log.add(level, record.getMessage(), self._rank, getattr(record, "cure", None))
        except Exception:  # noqa: BLE001 - as logging does with a message it cannot format
            self.handleError(record)
