"""Strategies on GPUs: NCCL's collectives in captured graphs, gathers and rings on side streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.prompt_server import BenchmarkServer
from tests.e2e.workflows import flux, with_areas, with_lora
from tests.gpu.conftest import FP32, gpu_ranks


@pytest.mark.multigpu
@pytest.mark.parametrize("graphs", ["auto", "false"])
@pytest.mark.parametrize("ranks,layout,content", [
    (2, "whole", "parallel: {ulysses_degree: 2}"),
    (2, "whole", "parallel: {ring_degree: 2}"),
    (3, "whole", "parallel: {ulysses_degree: 3}"),
    (4, "whole", "parallel: {ulysses_degree: 2, ring_degree: 2}"),
    (2, "whole", "parallel: {ulysses_degree: 2, exchange: peer}"),
    (3, "whole", "parallel: {ulysses_degree: 3, exchange: peer}"),
    (4, "whole", "parallel: {ulysses_degree: 2, ring_degree: 2, exchange: peer}"),
    (2, "pipeline 2", "parallel: {pipeline_parallel: true}"),
    (2, "tensor 2", "parallel: {tensor_parallel: true, tensor_parallel_degree: 2}"),
    (3, "tensor 3", "parallel: {tensor_parallel: true}"),
    (2, "sharded", "memory: {shard_weights: true}"),
    (3, "sharded", "memory: {shard_weights: true}"),
    (4, "tensor 2", "parallel: {tensor_parallel: true, tensor_parallel_degree: 2, ulysses_degree: 2}"),
])  # fmt: skip
def test_same_pictures(
    serve: Callable[..., BenchmarkServer], tmp_path: Path, ranks: int, layout: str, content: str, graphs: str
) -> None:
    """In fp32 at most 1/255 from one rank, plainly, captured, replayed, and after a LoRA came and went."""
    if ranks > gpu_ranks():
        pytest.skip(f"needs {ranks} ranks on GPUs")
    config = tmp_path / "taco.yaml"
    config.write_text(f"{content}\noptimization: {{use_cuda_graph: {graphs}}}\n")
    one = serve(1, *FP32)
    with BenchmarkServer(one.base, ranks, "cuda", (*FP32, "--taco-config", str(config))) as many:
        for prompt in (
            flux(steps=6, seed=1), flux(steps=6, seed=2), with_lora(0.8, steps=6, seed=3), with_lora(None, steps=6, seed=3),
            flux(steps=6, seed=4, cfg=4.5), with_areas(steps=6, cfg=4.5, seed=5),
        ):  # fmt: skip
            wanted, picture = (s.picture(s.run(prompt)[1]).astype(int) for s in (one, many))
            assert abs(picture - wanted).max() <= 1
        status = many.json("/taco_dit/status")
        assert status["layout"] == layout
        assert "exchange: peer" not in content or status["exchange"] == "copy engines"
        replayed = sum(prompt["counts"].get("calls_replayed", 0) for prompt in status["last_prompts"])
        assert (replayed > 0) is (graphs == "auto" and not layout.startswith("pipeline"))
