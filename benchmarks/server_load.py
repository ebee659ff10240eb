"""How fast the server answers many clients while it renders.

    python -m benchmarks.server_load --clients 100 --prompts 1000 --ranks 1

Starts the real program on the CPU with a tiny random model. Every client is a page: it keeps a WebSocket open, posts
its share of the prompts (a real sampling run each) and after each post reads the queue, the history and the jobs, with
`--pause` seconds between its requests. Afterwards every prompt must be in the history exactly once. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
import uuid
from typing import Any

import aiohttp

from tests import tiny_models
from tests.e2e.server import Server
from tests.e2e.workflows import flux

READS = ("/queue", "/history?max_items=64", "/jobs?limit=100", "/prompt")


class Load:
    """Answer times by path, and the prompts that were posted."""

    def __init__(self, port: int, pause: float) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.pause = pause
        self.seconds: dict[str, list[float]] = {}
        self.errors: list[str] = []
        self.posted: list[str] = []

    async def call(self, session: aiohttp.ClientSession, method: str, path: str, **more: Any) -> Any:
        """One timed request; its JSON, or None when it failed, which is noted."""
        begin = time.perf_counter()
        try:
            async with session.request(method, self.base + path, **more) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.errors.append(f"{path}: {error!r}")
            return None
        self.seconds.setdefault(f"{method} {path.split('?')[0]}", []).append(time.perf_counter() - begin)
        if answer.status != 200:
            self.errors.append(f"{path}: {answer.status} {content[:200]!r}")
            return None
        # reading what is large would take the time of the other clients, which share this process
        return json.loads(content) if method == "POST" else None

    async def client(self, number: int, prompts: int) -> None:
        """One page."""
        draw = random.Random(number)
        client_id = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.base}/ws?clientId={client_id}") as ws:
            reading = asyncio.create_task(_listen(ws))
            await asyncio.sleep(draw.random() * self.pause * (1 + len(READS)))
            for turn in range(prompts):
                prompt = flux(width=64, height=64, steps=1, seed=number * 100_000 + turn)
                answer = await self.call(session, "POST", "/prompt", json={"prompt": prompt, "client_id": client_id})
                if answer is not None:
                    self.posted.append(answer["prompt_id"])
                for path in READS:
                    await asyncio.sleep(self.pause * (0.5 + draw.random()))
                    await self.call(session, "GET", path)
            reading.cancel()


async def _listen(ws: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in ws:
        pass


async def run(port: int, clients: int, prompts: int, pause: float) -> dict[str, Any]:
    """Post everything, wait until it is done, and say how it went: all is well when `succeeded` is `prompts`."""
    load = Load(port, pause)
    begin = time.perf_counter()
    share = [prompts // clients + (i < prompts % clients) for i in range(clients)]
    await asyncio.gather(*(load.client(number, share[number]) for number in range(clients)))
    posting = time.perf_counter() - begin
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{load.base}/prompt") as answer:
                left = (await answer.json())["exec_info"]["queue_remaining"]
            if not left:
                break
            await asyncio.sleep(0.2)
        async with session.get(f"{load.base}/history") as answer:
            history = await answer.json()
    done = {key for key, entry in history.items() if entry["status"]["status_str"] == "success"}
    every = sorted(second for times in load.seconds.values() for second in times)
    return {
        "requests": len(every),
        "errors": len(load.errors),
        "first_errors": load.errors[:3],
        "posted": len(load.posted),
        "succeeded": len(done & set(load.posted)),
        "posting_s": round(posting, 1),
        "all_done_s": round(time.perf_counter() - begin, 1),
        "median_ms": round(statistics.median(every) * 1000, 1),
        "p95_ms": round(every[int(len(every) * 0.95)] * 1000, 1),
        "worst_ms": round(every[-1] * 1000, 1),
        "median_ms_by_path": {
            path: round(statistics.median(times) * 1000, 1) for path, times in sorted(load.seconds.items())
        },
    }


def main() -> None:
    """Parse flags, start the server, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between a client's requests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        tiny_models.write_flux(f"{base}/models")
        with Server(base, args.ranks) as server:
            server.run(flux(width=64, height=64, steps=1))
            server.request("/history", {"clear": True})
            result = asyncio.run(run(server.port, args.clients, args.prompts, args.pause))
    print(json.dumps({"ranks": args.ranks, "clients": args.clients, "pause_s": args.pause, **result}))


if __name__ == "__main__":
    main()
