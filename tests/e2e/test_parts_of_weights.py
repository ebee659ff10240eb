"""A server whose ranks hold parts of the weights gives the pictures of one rank, prompt after prompt."""

from __future__ import annotations

import pytest

from tests.e2e.compare import furthest
from tests.e2e.server import Server
from tests.e2e.workflows import flux, with_areas, with_lora

PROMPTS = [
    flux(seed=1), flux(cfg=4.5, text="cat", width=112, height=80, seed=2), with_lora(0.8, seed=3),
    with_lora(None, seed=3), with_areas(cfg=4.5, seed=12),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(serve):
    return [serve(1).pictures(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "content,layout",
    [
        ("parallel: {tensor_parallel: true, tensor_parallel_degree: 2}", "tensor 2"),
        ("memory: {shard_weights: true}", "sharded"),
        ("parallel: {pipeline_parallel: true}", "pipeline 2"),
    ],
)
def test_same_pictures(base, expected, tmp_path, content, layout):
    config = tmp_path / "taco.yaml"
    config.write_text(content)
    server = Server(base, 2, ["--taco-config", str(config)])
    try:
        server.wait_ready()
        for prompt, want in zip(PROMPTS, expected):
            assert furthest(server.pictures(prompt), want) <= 1
        status = server.json("/taco_dit/status")
        assert (status["layout"], status["last_run"]["layout"]) == (layout, layout)
        assert "is true" in status["layout_reason"]
        with server.page() as page:
            page.post(flux(steps=200, seed=20))
            page.wait("progress", lambda m: m["data"]["value"] == 3)
            server.request("/interrupt", {})
            assert page.finish().of("execution_interrupted")
        assert furthest(server.pictures(PROMPTS[2]), expected[2]) <= 1, "after a cancel"
        assert f"weights {layout}" in server.tail(400), "the console names it"
    finally:
        server.stop()
