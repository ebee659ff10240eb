"""What the executor itself costs: chains of nodes that do nothing.

    python -m benchmarks.executor_overhead --ranks 1,2

Starts the real program on the CPU for each number of ranks. A chain of n trivial nodes with one output is posted; the
time is from the POST to the message that the prompt is done, with one WebSocket open: first uncached, then the same
prompt again, all cached. Traffic is what the WebSocket carried for the uncached run. Validation is measured without the
server. The same for a node that expands n times, each time into a node and the next expansion (`deep`). Medians of
`--repeats`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from typing import Any

import aiohttp

from tests.e2e import server as e2e
from tests.e2e.workflows import node

PACK = os.path.join(os.path.dirname(e2e.__file__), "semantics_pack")
LENGTHS = (1, 20, 50, 100, 200, 1000)
DEPTHS = (100, 400, 950)


def chain(length: int, start: int) -> dict[str, Any]:
    """`length` nodes in a row and an output; `start` makes it differ from the chains before."""
    prompt = {f"n{i}": node("SAdd", a=[f"n{i - 1}", 0] if i else start, b=1) for i in range(length)}
    return prompt | {"out": node("SShow", value=[f"n{length - 1}", 0])}


def deep(depth: int, start: int) -> dict[str, Any]:
    """A node that expands `depth` times, and an output."""
    return {"e": node("SExpand", value=start, depth=depth, label=""), "out": node("SShow", value=["e", 0])}


async def one_run(session: aiohttp.ClientSession, port: int, prompt: dict[str, Any]) -> tuple[float, int]:
    """Seconds and WebSocket bytes of one prompt."""
    async with session.ws_connect(f"http://127.0.0.1:{port}/ws?clientId=bench", max_msg_size=0) as ws:
        await ws.receive()
        begin = time.perf_counter()
        body = {"prompt": prompt, "client_id": "bench"}
        async with session.post(f"http://127.0.0.1:{port}/prompt", json=body) as answer:
            assert answer.status == 200, await answer.text()
        size = 0
        while True:
            text = (await ws.receive()).data
            size += len(text)
            message = json.loads(text)
            assert message["type"] != "execution_error", message
            if message["type"] == "executing" and message["data"]["node"] is None:
                return time.perf_counter() - begin, size


async def measure(port: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians for each length and depth."""
    result = {}
    start = 0
    async with aiohttp.ClientSession() as session:
        await one_run(session, port, chain(10, -1))
        for make, length in [*((chain, length) for length in LENGTHS), *((deep, depth) for depth in DEPTHS)]:
            fresh, cached = [], []
            for _ in range(repeats):
                start += 10_000
                prompt = make(length, start % 97_000)
                fresh.append(await one_run(session, port, prompt))
                cached.append(await one_run(session, port, prompt))
            result[f"{make.__name__} {length}"] = {
                "uncached_ms": round(statistics.median(seconds for seconds, _ in fresh) * 1000, 1),
                "cached_ms": round(statistics.median(seconds for seconds, _ in cached) * 1000, 1),
                "websocket_kB": round(statistics.median(size for _, size in fresh) / 1000, 1),
            }
    return result


def validation_ms(length: int, repeats: int) -> float:
    """Milliseconds to check a chain, in this process."""
    import execution
    import nodes

    class Add:
        RETURN_TYPES = ("INT",)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"a": ("INT", {}), "b": ("INT", {})}}

    class Show(Add):
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"value": ("INT", {})}}

    nodes.NODE_CLASS_MAPPINGS.update(SAdd=Add, SShow=Show)
    times = []
    for _ in range(repeats):
        prompt = chain(length, 0)
        begin = time.perf_counter()
        valid, *_ = asyncio.run(execution.validate_prompt("bench", prompt))
        times.append(time.perf_counter() - begin)
        assert valid
    return round(statistics.median(times) * 1000, 1)


def main() -> None:
    """Parse flags, measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, Any] = {"validation_of_1000_ms": validation_ms(1000, args.repeats), "ranks": {}}
    with tempfile.TemporaryDirectory() as base:
        shutil.copytree(PACK, os.path.join(base, "custom_nodes", "semantics_pack"))
        for ranks in [int(part) for part in args.ranks.split(",")]:
            with e2e.Server(base, ranks) as server:
                measured = asyncio.run(measure(server.port, args.repeats))
            result["ranks"][ranks] = measured
            for name, row in measured.items():
                print(f"{ranks} rank(s), {name}: {row}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
