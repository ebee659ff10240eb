"""Servers on GPUs, started once each: `./run_tests.sh gpu` on a machine with NVIDIA GPUs; without, tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.prompt_server import BenchmarkServer
from comfy.taco_dit.core.processes import shares_gpus
from tests import tiny_models

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FP32 = ("--force-fp32", "--fp32-vae", "--fp32-text-enc")


def gpu_ranks() -> int:
    """How many ranks on GPUs can be tried: one a GPU, or 4 where they may share one."""
    present = torch.cuda.device_count()
    return max(4, present) if present and shares_gpus(os.environ) else present


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine has not got."""
    for item in items:
        if item.get_closest_marker("multigpu") and gpu_ranks() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two NVIDIA GPUs, or one and TACO_SHARE_GPU=1"))
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., BenchmarkServer]]:
    """`serve(ranks, *flags)`: a server on that many GPUs with tiny models and the test nodes, started on first use."""
    base = tmp_path_factory.mktemp("gpu_base")
    tiny_models.write_flux(str(base / "models"))
    shutil.copytree(os.path.join(ROOT, "tests", "e2e", "pack"), base / "custom_nodes" / "e2e_pack")
    os.environ["TACO_TEST_RECORDS"] = str(tmp_path_factory.mktemp("records"))
    running: dict[tuple[int, tuple[str, ...]], BenchmarkServer] = {}

    def get(ranks: int, *flags: str) -> BenchmarkServer:
        key = ranks, flags
        if key not in running:
            running[key] = BenchmarkServer(str(base), ranks, "cuda", flags).__enter__()
        return running[key]

    yield get
    for server in running.values():
        server.__exit__()
