"""Queue and history outlive the server: rank 0 killed while prompts wait, and an orderly stop."""

from __future__ import annotations

import os
import signal

import pytest

from tests.e2e.server import Server, wait_until
from tests.e2e.test_processes import free_port
from tests.e2e.workflows import flux, insert, node

QUICK = ["quick1", "quick2", "quick3"]


def slow_prompt(label):
    return insert(flux(seed=811, steps=500), "watch", "TestModel", label=label, slow_ms=50, fail="never", fail_rank=0,
                  fail_step=1)  # fmt: skip


def quick_prompt(text):
    return {"1": node("TestRecord", label="order", text=text), "2": node("TestOutput", label="shown", text=text)}


def post(server, prompt_id, prompt, status=200, **more):
    """Queue a prompt with an id of our own, whose page is `page of` it."""
    body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": f"page of {prompt_id}", **more}
    answered, content = server.request("/prompt", body)
    assert answered == status, content


def running(server):
    return [item[1] for item in server.json("/queue")["queue_running"]]


def waiting(server):
    return [item[1] for item in server.json("/queue")["queue_pending"]]


def steps(server, label):
    """Steps a slow prompt has made on rank 0, all its runs together."""
    return len(server.records(label).get(0, ()))


def ending(entry):
    return entry["status"]["messages"][-1]


def check_quick(server):
    """Every quick prompt ran once, on both ranks in order, and its entry is its own."""
    history = server.json("/history")
    for rank, lines in server.records("order").items():
        assert lines == QUICK, f"rank {rank}"
    for prompt_id in QUICK:
        assert ending(history[prompt_id])[0] == "execution_success"
        assert history[prompt_id]["outputs"] == {"2": {"text": [prompt_id]}}


@pytest.mark.timeout(180)
def test_rank_0_is_killed_twice_while_prompts_wait(base, tmp_path):
    flags = ["--port", str(free_port()), "--user-directory", str(tmp_path)]
    with Server(base, 2, flags, persist=True) as server:
        post(server, "done", quick_prompt("done"), extra_data={"api_key_comfy_org": "secret"})
        assert wait_until(lambda: "done" in server.json("/history"), 20)
        before = server.json("/history/done"), server.json("/jobs/done")
        os.remove(os.path.join(server.record_folder, "order.0"))
        os.remove(os.path.join(server.record_folder, "order.1"))
        post(server, "slow", slow_prompt("slow"))
        assert wait_until(lambda: steps(server, "slow") > 2, 40)
        for prompt_id in (QUICK[1], QUICK[2]):
            post(server, prompt_id, quick_prompt(prompt_id))
        post(server, QUICK[0], quick_prompt(QUICK[0]), front=True)
        assert waiting(server) == QUICK
        for turn in range(2):
            pid = server.pids()[0]
            server.listening_again()
            os.kill(pid, signal.SIGKILL)
            server.wait_ready()
            assert (server.json("/history/done"), server.json("/jobs/done")) == before
            if turn == 0:
                made = steps(server, "slow")
                assert wait_until(lambda: running(server) == ["slow"], 10) and waiting(server) == QUICK
                post(server, "slow", slow_prompt("slow"), 409)
                post(server, "done", quick_prompt("done"), 409)
                assert wait_until(lambda made=made: steps(server, "slow") > made + 2, 40), server.tail()
        assert wait_until(lambda: QUICK[2] in server.json("/history"), 40), server.tail()
        check_quick(server)
        kind, data = ending(server.json("/history/slow")["slow"])
        assert kind == "execution_error" and "the server ended twice while this prompt ran" in data["exception_message"]
        assert not running(server) and not waiting(server)
        post(server, "after", quick_prompt("after"))
        assert wait_until(lambda: "after" in server.json("/history"), 20)
    assert os.stat(tmp_path / "taco_dit" / "prompts.sqlite3").st_mode & 0o777 == 0o600


@pytest.mark.timeout(120)
def test_an_orderly_stop_and_start(base, tmp_path):
    flags = ["--user-directory", str(tmp_path)]
    with Server(base, 1, flags, persist=True) as server:
        post(server, "slow", slow_prompt("slow"))
        for prompt_id in QUICK:
            post(server, prompt_id, quick_prompt(prompt_id))
        assert wait_until(lambda: steps(server, "slow") > 2, 40)
    with Server(base, 1, flags, persist=True) as server:
        assert wait_until(lambda: running(server) == ["slow"], 10) and waiting(server) == QUICK
        assert server.json("/history") == {}
        with server.page() as page:
            assert wait_until(lambda: steps(server, "slow") > 2, 40)
            server.request("/interrupt", {"prompt_id": "slow"})
            assert wait_until(lambda: QUICK[2] in server.json("/history"), 20)
            page.post(quick_prompt("new"))
            assert page.finish().outputs == {"2": {"text": ["new"]}}
        assert ending(server.json("/history/slow")["slow"])[0] == "execution_interrupted"
        assert server.records("order")[0] == [*QUICK, "new"]
        with Server(base, 1, flags, persist=True) as second:
            assert second.json("/history") == {}
            assert [line for line in second.log if "another server has it open" in line], second.tail()
