"""What goes wrong on one GPU ends one prompt, under NCCL and with captured graphs too; the next picture is right."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.prompt_server import BenchmarkServer
from tests.e2e.workflows import Prompt, flux, node

pytestmark = [pytest.mark.multigpu, pytest.mark.timeout(120)]

ERROR_S, NEXT_S, CANCEL_S, DEAD_S, REPLACED_S = 5.0, 10.0, 1.0, 5.0, 60.0


def through_model(kind: str, rank: int, steps: int = 6, slow_ms: int = 0) -> Prompt:
    """A prompt whose model fails in step 4 of a rank; by then calls are captured unless there is a patch."""
    prompt = flux(steps=steps)
    prompt["test"] = node(
        "TestModel", model=["load", 0], label="gpu", slow_ms=slow_ms, fail=kind, fail_rank=rank, fail_step=4
    )
    prompt["sample"]["inputs"]["model"] = ["test", 0]
    return prompt


def through_node(kind: str, rank: int) -> Prompt:
    """A prompt in which a node before sampling fails on a rank."""
    prompt = flux(steps=6, seed=rank + 50)
    prompt["test"] = node("TestFail", latent_image=["latent", 0], rank=rank, kind=kind)
    prompt["sample"]["inputs"]["latent_image"] = ["test", 0]
    return prompt


@pytest.fixture(scope="module", params=["collective", "peer"])
def server(
    serve: Callable[..., BenchmarkServer], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> BenchmarkServer:
    """Two ranks that exchange tokens in every block, by either transport."""
    config = tmp_path_factory.mktemp("config") / "taco.yaml"
    config.write_text(f"parallel: {{ulysses_degree: 2, exchange: {request.param}}}\n")
    return serve(2, "--taco-config", str(config))


@pytest.fixture
def right(server: BenchmarkServer) -> np.ndarray:
    """The picture of the prompt that must come out right after each fault; drawn twice, so that calls are captured."""
    for _ in range(2):
        _, entry = server.run(flux(steps=6))
    status = server.json("/taco_dit/status")
    assert status["captured_calls"] > 0 and status["last_run"]["plan"] == "ulysses 2"
    wanted = {"peer": "copy engines", "collective": "collectives"}
    assert status["exchange"] == wanted[status["config"]["parallel"]["exchange"]]
    return server.picture(entry)


def error_of(entry: dict[str, Any]) -> str:
    """The message of a prompt that failed."""
    messages = dict(entry["status"]["messages"])
    assert entry["status"]["status_str"] == "error", entry["status"]
    return messages["execution_error"]["exception_message"]


def comes_out_right(server: BenchmarkServer, picture: np.ndarray, within: float = NEXT_S) -> None:
    """The next prompt comes soon, and after it the first one's picture again: results of two prompts ago are not kept."""
    seconds, entry = server.run(flux(steps=6, text="something else"))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert seconds < within
    _, entry = server.run(flux(steps=6))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert np.abs(server.picture(entry).astype(int) - picture.astype(int)).max() <= 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["wrapper", "block", "memory", "node"])
def test_an_exception_ends_the_prompt_and_the_next_is_right(
    server: BenchmarkServer, right: np.ndarray, kind: str, rank: int
) -> None:
    prompt = through_model(kind, rank) if kind in ("wrapper", "block") else through_node(kind, rank)
    seconds, entry = server.run(prompt)
    text = error_of(entry)
    assert "on purpose" in text
    assert rank == 0 or "rank 1" in text
    assert seconds < ERROR_S
    comes_out_right(server, right)


@pytest.mark.parametrize("after", [0.05, 0.4, 1.0])
def test_a_cancel_is_felt_at_once(server: BenchmarkServer, right: np.ndarray, after: float) -> None:
    prompt_id = server.json("/prompt", {"prompt": through_model("never", 9, steps=60, slow_ms=30)})["prompt_id"]
    time.sleep(after)
    started = time.perf_counter()
    server.json("/interrupt", {})
    while not (entry := server.json(f"/history/{prompt_id}").get(prompt_id)):
        assert time.perf_counter() - started < CANCEL_S
        time.sleep(0.01)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    comes_out_right(server, right)


def test_a_follower_that_is_killed_is_replaced(server: BenchmarkServer, right: np.ndarray) -> None:
    running = server.json("/prompt", {"prompt": through_model("never", 9, steps=200, slow_ms=30)})["prompt_id"]
    waiting = server.json("/prompt", {"prompt": flux(steps=6, seed=77)})["prompt_id"]
    time.sleep(1.0)
    pid = next(rank["pid"] for rank in server.json("/taco_dit/status")["ranks"] if rank["rank"] == 1)
    os.kill(pid, signal.SIGKILL)
    started = time.perf_counter()
    entries = {}
    for prompt_id, limit in ((running, DEAD_S), (waiting, REPLACED_S)):
        while not (entry := server.json(f"/history/{prompt_id}").get(prompt_id)):
            assert time.perf_counter() - started < limit
            time.sleep(0.05)
        entries[prompt_id] = entry
    assert "rank 1" in error_of(entries[running])
    assert entries[waiting]["status"]["status_str"] == "success"
    comes_out_right(server, right)
