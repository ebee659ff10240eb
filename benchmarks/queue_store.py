"""What a long history on disk costs: the start of the server, and its answers.

    python -m benchmarks.queue_store --entries 10000

Writes a history of prompts that carry a workflow of `--kilobytes`, as the page sends one with each prompt, then starts
the real program on the CPU with `--no-persist`, with an empty file and with the long one, in turn. Times are medians: of
`--repeats` starts, from the start of the process until it listens; of 70 requests of a kind, one at a time; and of
reading the file alone (`open`). What the first request of a kind took is listed apart. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

from comfy_execution.prompt_queue import ExecutionStatus, PromptQueue
from comfy_execution.prompt_store import PromptStore
from tests.e2e import server as e2e
from tests.e2e.workflows import node

FILE = os.path.join("taco_dit", "prompts.sqlite3")
PACK = os.path.join(os.path.dirname(e2e.__file__), "semantics_pack")
READS = ("/history?max_items=64", "/jobs?limit=64", "/jobs?limit=64&status=failed", "/prompt")


_DRAW = random.Random(0)
_WORDS = [f"{_DRAW.getrandbits(40):x}" for _ in range(2000)]


def workflow(kilobytes: float) -> dict[str, Any]:
    """What a page sends with a prompt, of about that size."""
    nodes = [{"id": i, "type": _DRAW.choice(_WORDS), "pos": [_DRAW.random(), i], "widgets": _DRAW.choices(_WORDS, k=4)}
             for i in range(max(int(kilobytes * 8), 1))]  # fmt: skip
    return {"extra_pnginfo": {"workflow": {"id": "w", "nodes": nodes}}}


def fill(path: str, entries: int, kilobytes: float) -> None:
    """A history of `entries` prompts, every tenth failed."""
    server = SimpleNamespace(number=0, queue_updated=lambda: None)
    queue = PromptQueue(server, PromptStore(path))
    for number in range(entries):
        extra = {"create_time": 1_700_000_000_000 + number, **workflow(kilobytes)}
        queue.put((number, f"old-{number}", {"1": node("SShow", value=number)}, extra, ["1"]))
        taken = queue.get(0)
        assert taken is not None
        images = {"images": [{"filename": f"{number}.png", "subfolder": "", "type": "output"}]}
        good = number % 10 > 0
        ending = (
            "execution_success" if good else "execution_error",
            {"timestamp": number, "traceback": ["a line"] * 20},
        )
        status = ExecutionStatus("success" if good else "error", good, [("execution_start", {"timestamp": 0}), ending])
        queue.task_done(taken[1], {"outputs": {"1": images}, "meta": {}}, status)
    queue.close()


def _server(base: str, folder: str | None) -> e2e.Server:
    flags = ["--no-demo"] if folder is None else ["--no-demo", "--user-directory", folder]
    return e2e.Server(base, 1, flags, persist=folder is not None)


def start_ms(base: str, folder: str | None) -> float:
    """Until the program listens, with the user folder `folder`, or without persistence."""
    begin = time.perf_counter()
    with _server(base, folder):
        return 1000 * (time.perf_counter() - begin)


def open_ms(folder: str) -> float:
    """Reading the file into a queue."""
    begin = time.perf_counter()
    store = PromptStore(os.path.join(folder, FILE))
    PromptQueue(SimpleNamespace(number=0), store)
    took = time.perf_counter() - begin
    store.close()
    return 1000 * took


def request_ms(base: str, folder: str | None, kilobytes: float) -> dict[str, float]:
    """Medians of 70 requests of each kind, the history's once it has 64 entries, and the first of those for jobs."""
    times: dict[str, list[float]] = {}
    with _server(base, folder) as server:
        for path in READS[1:]:
            times[f"first GET {path}"] = [_timed(server, path)]
        for number in range(70):
            body = {"prompt": {"1": node("SShow", value=number)}, "extra_data": workflow(kilobytes)}
            times.setdefault("POST /prompt", []).append(_timed(server, "/prompt", body))
            for path in READS[1:]:
                times.setdefault(f"GET {path}", []).append(_timed(server, path))
        times[f"GET {READS[0]}"] = [_timed(server, READS[0]) for _ in range(20)]
    return {name: round(1000 * statistics.median(values), 1) for name, values in times.items()}


def _timed(server: e2e.Server, path: str, body: Any = None) -> float:
    begin = time.perf_counter()
    server.json(path, body)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10000)
    parser.add_argument("--kilobytes", type=float, default=30.0, help="size of a prompt's workflow")
    parser.add_argument("--repeats", type=int, default=5, help="starts of the server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        shutil.copytree(PACK, os.path.join(base, "custom_nodes", "semantics_pack"))
        empty, full = (os.path.join(base, name) for name in ("empty", "full"))
        os.makedirs(empty)
        begin = time.perf_counter()
        fill(os.path.join(full, FILE), options.entries, options.kilobytes)
        results: dict[str, Any] = {
            "fill_ms_per_prompt": round(1000 * (time.perf_counter() - begin) / options.entries, 2)
        }
        results["file_mib"] = round(os.path.getsize(os.path.join(full, FILE)) / 2**20, 1)
        folders = {"no persistence": None, "empty file": empty, "long history": full}
        starts = [{name: start_ms(base, folder) for name, folder in folders.items()} for _ in range(options.repeats)]
        for name, folder in folders.items():
            results[name] = {"start": round(statistics.median(turn[name] for turn in starts))}
            if folder is not None:
                results[name]["open"] = round(statistics.median(open_ms(folder) for _ in range(5)), 1)
            results[name] |= request_ms(base, folder, options.kilobytes)
            print(name, results[name])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
