"""Many pages at once while pictures are rendered: every answer is right, no prompt is lost, none runs twice."""

from __future__ import annotations

import asyncio
import os

import pytest

from benchmarks.server_load import run

CLIENTS, PROMPTS = 20, 60


@pytest.mark.timeout(240)  # a busy machine may be ten times slower than the benchmark
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_prompt_runs_once(serve, ranks):
    server = serve(ranks)
    folder = os.path.join(server.record_folder, "output")
    before = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    prompts = PROMPTS // ranks
    result = asyncio.run(run(server.port, CLIENTS, prompts, pause=0.02))
    assert result["errors"] == 0, result["first_errors"]
    assert result["posted"] == result["succeeded"] == prompts
    assert result["requests"] == prompts * 5
    new = set(os.listdir(folder)) - before
    assert len(new) == prompts, "one file for each prompt"
