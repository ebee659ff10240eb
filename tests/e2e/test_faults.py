"""Cancelling and failing: every rank leaves the prompt together, one clear message, and the next prompt is right."""

from __future__ import annotations

import time

import pytest

from tests.e2e.compare import furthest
from tests.e2e.server import wait_until
from tests.e2e.workflows import flux, insert, node

STEP_MS = 60


def slow_prompt(label, steps=200, **settings):
    options = {"label": label, "slow_ms": STEP_MS, "fail": "never", "fail_rank": 1, "fail_step": 4, **settings}
    return insert(flux(seed=401, steps=steps), "watch", "TestModel", **options)


def check_goes_on(serve, server, pids, seed):
    """The next prompt is right and nobody was started again."""
    prompt = flux(seed=seed, cfg=4.5)
    assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1
    assert server.pids() == pids


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_cancel_while_sampling(serve, ranks):
    server = serve(ranks)
    pids = server.pids()
    label = f"cancelled{ranks}-"
    with server.page() as page:
        page.post(slow_prompt(label))
        third = page.wait("progress", lambda m: m["data"]["value"] == 3)
        fourth = page.wait("progress", lambda m: m["data"]["value"] == 4)
        step = fourth["at"] - third["at"]
        asked = time.monotonic()
        server.request("/interrupt", {})
        told = page.wait("execution_interrupted", timeout=15)
        assert told["at"] - asked < 2 * step + 1
        assert told["data"]["node_id"] == "sample" and told["data"]["node_type"] == "KSampler"
        outcome = page.finish()
    assert outcome.error is None and not outcome.of("execution_success")
    steps = {rank: len(lines) for rank, lines in server.records(label).items()}
    assert len(steps) == ranks and len(set(steps.values())) == 1, f"ranks stopped at different steps: {steps}"
    assert 4 <= steps[0] < 190
    check_goes_on(serve, server, pids, 402)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["denoiser", "decoder"])
def test_cancel_inside_one_long_call(serve, ranks, what):
    """Ranks that cannot stop together within their patience leave one after the other, between two blocks."""
    server = serve(ranks)
    pids = server.pids()
    label = f"long-{what}{ranks}-"
    prompt = flux(seed=411, steps=1)
    if what == "denoiser":
        insert(prompt, "slow", "TestSlowBlocks", label=label, seconds=1.5)
        last, blocks = "sample", 5
    else:
        insert(prompt, "slow", "TestSlowVae", "decode", "vae", label=label, seconds=0.8)
        last, blocks = "decode", 10
    with server.page() as page:
        page.post(prompt)
        page.wait("executing", lambda m: m["data"]["node"] == last)
        assert wait_until(lambda: len(server.records(label)) == ranks, 20)
        server.request("/interrupt", {})
        told = page.wait("execution_interrupted", timeout=30)
        assert told["data"]["node_id"] == last
        page.finish()
    ran = {rank: len(lines) for rank, lines in server.records(label).items()}
    assert len(ran) == ranks and max(ran.values()) < blocks, f"blocks that each rank ran: {ran} of {blocks}"
    check_goes_on(serve, server, pids, 412)


def test_cancel_what_waits_and_only_what_was_meant(serve):
    server = serve(2)
    with server.page() as page:
        running = page.post(slow_prompt("first-"))
        page.wait("progress", lambda m: m["data"]["value"] == 2)
        server.request("/interrupt", {"prompt_id": "another"})
        waiting = server.json("/prompt", {"prompt": flux(seed=403), "client_id": page.id})["prompt_id"]
        assert [item[1] for item in server.json("/queue")["queue_pending"]] == [waiting]
        server.request("/queue", {"delete": [waiting]})
        page.wait("progress", lambda m: m["data"]["value"] == 5)
        server.request("/interrupt", {"prompt_id": running})
        page.wait("execution_interrupted", timeout=15)
        page.finish()
    assert server.json(f"/history/{waiting}") == {}
    assert server.json(f"/history/{running}")[running]["status"]["status_str"] == "error"


@pytest.mark.parametrize("ranks", [2, 3])
def test_cancel_again_and_again(serve, ranks):
    """A group that is thrown away too often, or a flag that stays set, would show here."""
    server = serve(ranks)
    pids = server.pids()
    for turn in range(4):
        with server.page() as page:
            page.post(slow_prompt(f"again{ranks}{turn}-", slow_ms=turn * 10))
            page.wait("progress", lambda m: m["data"]["value"] == 2)
            server.request("/interrupt", {})
            page.wait("execution_interrupted", timeout=15)
            page.finish()
        assert furthest(server.pictures(flux(seed=410 + turn)), serve(1).pictures(flux(seed=410 + turn))) <= 1
    assert server.pids() == pids


def failed(server, prompt, rank):
    """Error of a prompt that fails on `rank`, within 10 s."""
    with server.page() as page:
        page.post(prompt)
        begun = time.monotonic()
        page.wait("execution_error", timeout=10)
        outcome = page.finish(timeout=10)
    assert time.monotonic() - begun < 10
    assert len(outcome.of("execution_error")) == 1 and not outcome.of("execution_success")
    message = outcome.error["exception_message"]
    if rank:
        assert f"rank {rank} (cpu) failed: ArithmeticError: on purpose" in message
    else:
        assert "on purpose" in message
    assert "ArithmeticError" in outcome.error["exception_type"]
    assert outcome.error["traceback"]
    return outcome.error


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (3, 1), (3, 2), (4, 3), (3, 0)])
def test_failure_before_sampling(serve, ranks, rank):
    server = serve(ranks)
    pids = server.pids()
    prompt = insert(flux(seed=420), "trip", "TestFail", slot="latent_image", rank=rank, kind="plain")
    assert failed(server, prompt, rank)["node_id"] == "trip"
    check_goes_on(serve, server, pids, 421)


@pytest.mark.parametrize("kind", ["wrapper", "block"])
@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (3, 1), (4, 2), (3, 0)])
def test_failure_inside_the_model_while_others_wait(serve, ranks, rank, kind):
    """The failing rank is missing in a collective that the others have entered already."""
    server = serve(ranks)
    pids = server.pids()
    prompt = slow_prompt(f"inside-{kind}-{ranks}{rank}-", slow_ms=0, fail=kind, fail_rank=rank)
    assert failed(server, prompt, rank)["node_id"] == "sample"
    check_goes_on(serve, server, pids, 422)


def test_failures_in_a_row(serve):
    server = serve(3)
    pids = server.pids()
    for turn, kind in enumerate(["block", "wrapper", "block"]):
        failed(server, slow_prompt(f"row{turn}-", slow_ms=0, fail=kind), 1)
    check_goes_on(serve, server, pids, 423)


def test_failure_that_rank_0_hears_of_in_its_last_node(serve):
    """Nothing is left to ask after the last node, so only closing the prompt can tell."""
    server = serve(3)
    prompt = {
        "count": node("TestChanged", label="last", ranks="0"),
        "trip": node("TestFail", latent_image=["count", 0], rank=1, kind="plain"),
        "slow": node("TestSlow", latent_image=["trip", 0], rank=0, seconds=0.4),
    }
    for _ in range(3):
        assert failed(server, prompt, 1)["node_id"] == "trip"


def test_out_of_memory_on_one_rank(serve):
    server = serve(3)
    pids = server.pids()
    prompt = insert(flux(seed=424), "trip", "TestFail", slot="latent_image", rank=1, kind="memory")
    outcome = server.run(prompt, 20)
    assert "rank 1" in outcome.error["exception_message"]
    assert "ran out of memory" in outcome.error["exception_message"]
    check_goes_on(serve, server, pids, 425)


def test_a_client_that_leaves_loses_nothing(serve):
    server = serve(2)
    with server.page() as page:
        prompt_id = page.post(slow_prompt("left-", steps=8))
        page.wait("progress")
    with server.page() as other:  # the queue is empty when everything is done
        if prompt_id not in server.json(f"/history/{prompt_id}"):
            other.wait("status", lambda m: not m["data"]["status"]["exec_info"]["queue_remaining"])
    entry = server.json(f"/history/{prompt_id}")[prompt_id]
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"]["save"]["images"]
