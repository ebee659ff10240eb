"""A follower that ends or hangs is replaced: it costs the running prompt, nothing else. The tests share a server, in order."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import psutil
import pytest

from tests.e2e.server import Server, is_alive, wait_until
from tests.e2e.workflows import flux, insert

PROMPT = flux(seed=901, cfg=4.5)


def slow(label, **settings):
    options = {"label": label, "slow_ms": 60, "fail": "never", "fail_rank": 1, "fail_step": 4, **settings}
    return insert(flux(seed=902, steps=300), "watch", "TestModel", **options)


@pytest.fixture(scope="module")
def server(base):
    with Server(base, 2) as running:
        yield running


@pytest.fixture(scope="module")
def picture(server):
    return server.pictures(PROMPT)


def check_replaced(server, picture, before):
    """Rank 0 is the same process, rank 1 is another one, and the picture is the same."""
    assert np.array_equal(server.pictures(PROMPT), picture)
    after = server.pids()
    assert after[0] == before[0] and after[1] != before[1]
    assert not is_alive(before[1])


def test_killed_while_sampling_with_a_prompt_waiting(server, picture):
    pids = server.pids()
    with server.page() as page:
        running = page.post(slow("killed-"))
        page.wait("progress", lambda m: m["data"]["value"] == 3)
        waiting = server.json("/prompt", {"prompt": PROMPT, "client_id": page.id})["prompt_id"]
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        told = page.wait("execution_error", timeout=10)
        assert told["at"] - killed < 5
        assert told["data"]["prompt_id"] == running
        message = told["data"]["exception_message"]
        assert "rank 1 (cpu) failed" in message and "process ended by signal 9" in message
        while server.json(f"/history/{waiting}") == {}:
            asked = time.monotonic()
            server.json("/queue")
            assert time.monotonic() - asked < 1, "the server must answer all the time"
            assert asked - killed < 60
            time.sleep(0.1)
    assert server.json(f"/history/{running}")[running]["status"]["status_str"] == "error"
    assert server.json(f"/history/{waiting}")[waiting]["status"]["status_str"] == "success"
    assert any("waiting for rank 1" in line for line in server.log)
    check_replaced(server, picture, pids)


def test_killed_while_idle(server, picture):
    pids = server.pids()
    ends = sum("it is started again" in line for line in server.log)
    os.kill(pids[1], signal.SIGKILL)
    assert server.json("/prompt")["exec_info"]["queue_remaining"] == 0
    assert wait_until(lambda: sum("it is started again" in line for line in server.log) > ends, 5)
    check_replaced(server, picture, pids)


def test_a_follower_that_hangs_is_ended_after_a_cancel(server, picture):
    """Stopped by a signal, it answers nothing, and rank 0 waits for it inside a collective or a decision."""
    pids = server.pids()
    with server.page() as page:
        page.post(slow("hung-"))
        page.wait("progress", lambda m: m["data"]["value"] == 3)
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(0.5)
        server.request("/interrupt", {})
        page.wait("execution_interrupted", timeout=40)
        page.finish(10)
    check_replaced(server, picture, pids)


def test_a_prompt_runs_again_where_the_configuration_says_so(base, picture, tmp_path):
    """A follower is killed, and one does not answer until the deadline."""
    config = tmp_path / "config.yaml"
    config.write_text("recovery: {rerun_prompts: true, answer_deadline_s: 7}")
    with Server(base, 2, ["--taco-config", str(config)]) as server:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pids = server.pids()
            prompt = insert(flux(seed=901, cfg=4.5), "watch", "TestModel", label=f"again{number}-", slow_ms=500, fail="never",
                            fail_rank=1, fail_step=4)  # fmt: skip
            with server.page() as page:
                page.post(prompt)
                page.wait("progress")
                os.kill(pids[1], number)
                page.wait("execution_success", timeout=60)
                outcome = page.finish(20)
            assert outcome.error is None
            assert np.array_equal(outcome.pictures(), picture)
            assert server.pids()[0] == pids[0] and not is_alive(pids[1])
        assert sum("runs again" in line for line in server.log) == 2
        assert any("rank 1 does not answer" in line for line in server.log)


def follower(server):
    """The process of rank 1, as soon as there is one, whether it has joined or not."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "taco-rank-1" and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def test_a_series_of_ends_ends_the_job(server, picture):
    """The ends before did not count: a picture was made after each."""
    pids = server.pids()
    for _ in range(4):
        assert wait_until(lambda: follower(server) is not None, 5)
        process = follower(server)
        process.kill()
        process.wait(5)
    assert server.process.wait(15) == 1
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)
    assert "4th end of a rank in a row" in server.tail()
