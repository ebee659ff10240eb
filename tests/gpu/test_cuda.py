"""What only GPUs can show: `./run_tests.sh gpu` on a machine with NVIDIA GPUs; skipped without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.prompt_server import BenchmarkServer
from tests.e2e.workflows import flux, node, with_areas
from tests.gpu.conftest import FP32, gpu_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while compiling
def test_compiled_and_captured_equals_plain(compiled: bool) -> None:
    """The captured call, with stages compiled or not, is the plain call up to bf16 rounding, for other values and sizes."""
    from comfy.model_patcher import ModelPatcher
    from comfy.taco_dit.fast.captured_calls import CapturedCalls
    from tests.parallel.tiny import inputs, tiny_flux

    device = torch.device("cuda")
    model = torch.nn.Module()
    model.diffusion_model = tiny_flux(hidden_size=256, num_heads=4, axes_dim=[8, 28, 28]).bfloat16()
    ModelPatcher(model, device, torch.device("cpu")).patch_model(device)
    reference = tiny_flux(hidden_size=256, num_heads=4, axes_dim=[8, 28, 28]).cuda()
    calls = CapturedCalls(compile_stages=compiled, cuda_graph=True)
    calls.begin_run()
    with torch.inference_mode():
        for height, width, text, seed in (
            (16, 16, 8, 1),
            (16, 16, 8, 2),
            (16, 16, 8, 4),
            (9, 13, 11, 3),
            (9, 13, 11, 5),
        ):
            values = {k: v.cuda().bfloat16() for k, v in inputs(height, width, text, seed=seed).items()}
            plain = model.diffusion_model(**values).float()
            exact = reference(**{k: v.float() for k, v in values.items()})
            fast = calls.bound(model, None)(values.pop("x"), values.pop("timestep"), **values).float()
            scale = exact.abs().max()
            # No further from fp32 than bf16 itself is, with room for which way each rounding falls.
            assert (fast - exact).abs().max() / scale <= 1.5 * (plain - exact).abs().max() / scale + 2e-3
    assert calls.status()["captured_calls"] == 2


@pytest.mark.multigpu
def test_ranks_agree_in_bf16(tmp_path: Path) -> None:
    """N ranks' bf16 result is no further from one rank's than bf16 is from itself (a few units in the last place)."""
    ranks = [r for r in (1, 2, 3, 4) if r <= gpu_ranks()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.denoise_step", "--model", "flux-small", "--repeats", "2", "--warmup", "2",
         "--ranks", ",".join(map(str, ranks))],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert [row["ranks"] for row in rows] == ranks
    assert all(row["deviation"] < 2e-2 for row in rows[1:])


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_rows_of_the_vae_agree(dtype: str, limit: float) -> None:
    """Rows dealt over GPUs: the picture and latent of one GPU, in about 1/N of the memory. Without TF32, which rounds."""
    ranks = [r for r in (1, 2, 3, 4) if r <= gpu_ranks()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vae", "--size", "1048", "--dtype", dtype, "--repeats", "2",
         "--ranks", ",".join(map(str, ranks))],
        cwd=ROOT, capture_output=True, text=True, timeout=400, env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    decodes, encodes = ([row for row in rows if row["what"] == what] for what in ("decode", "encode"))
    assert [row["ranks"] for row in decodes] == ranks
    assert all(row["difference"] <= limit for row in decodes)
    assert all(row["difference"] <= 10 * limit for row in encodes)  # latents reach from about -4 to 4
    assert all(row["peak_gib"] < 1.3 * decodes[0]["peak_gib"] / row["ranks"] + 0.3 for row in decodes)


def _render(server: BenchmarkServer, make: Callable[..., Any]) -> np.ndarray:
    """The picture of a workflow, levels 0 to 255."""
    _, entry = server.run(make(steps=6, cfg=4.5, width=104, height=72))
    assert entry["status"]["status_str"] == "success", entry["status"]
    return server.picture(entry).astype(int)


@pytest.mark.gpu
@pytest.mark.parametrize("flags,limit", [(FP32, 1), ((), 40)])
def test_whole_server(serve: Callable[..., BenchmarkServer], flags: tuple[str, ...], limit: int) -> None:
    """The whole server on one GPU and on all: the same picture, in fp32 at most 1/255 apart.

    In bf16 a random network amplifies rounding; that is seen as a mean difference of few levels, never another picture.
    """
    for make in (flux, with_areas):
        one = _render(serve(1, *flags), make)
        for ranks in (2, 3, 4):
            if ranks <= gpu_ranks():
                server = serve(ranks, *flags)
                many = _render(server, make)
                assert server.json("/taco_dit/status")["world_size"] == ranks
                assert abs(many - one).max() <= limit, f"{make.__name__} on {ranks} ranks"
                assert abs(many - one).mean() <= max(0.5, limit / 10), f"{make.__name__} on {ranks} ranks"


@pytest.mark.gpu
def test_a_lora_comes_and_goes_under_captured_calls(serve: Callable[..., BenchmarkServer]) -> None:
    """Pictures with a LoRA on, weaker and off equal those of a fresh process within 1/255, and graphs stay in use."""

    def prompt(strength: float, seed: int) -> dict[str, Any]:
        made = flux(steps=6, seed=seed)
        if strength:
            made["lora"] = node(
                "LoraLoaderModelOnly",
                model=["load", 0],
                lora_name="tiny_flux_kohya.safetensors",
                strength_model=strength,
            )
            made["sample"]["inputs"]["model"] = ["lora", 0]
        return made

    server = serve(1, *FP32)
    server.run(prompt(0.0, 90))
    pictures = {}
    for strength in (0.8, 0.5, 0.0):
        pictures[strength] = server.picture(server.run(prompt(strength, 91))[1]).astype(int)
        counts = server.json("/taco_dit/status")["last_prompts"][-1]["counts"]
        assert counts.get("calls_captured", 0) == 0, strength
        assert counts["calls_replayed"] == 6
    assert abs(pictures[0.8] - pictures[0.0]).max() > 8
    with BenchmarkServer(server.base, 1, "cuda", FP32) as fresh:
        for strength in (0.5, 0.0):
            again = fresh.picture(fresh.run(prompt(strength, 91))[1]).astype(int)
            assert abs(again - pictures[strength]).max() <= 1, strength


@pytest.mark.gpu
def test_a_gpu_tells_of_itself_and_its_clock_needs_no_waiting() -> None:
    """NVML answers for torch's device; times of calls come in while later ones run."""
    from comfy.taco_dit.utils.performance_monitor import Clock
    from comfy.taco_dit.utils.rank_sampler import RankSampler

    device = torch.device("cuda", 0)
    room = torch.empty(2**28, dtype=torch.uint8, device=device)
    read = RankSampler(device).read()
    assert room.numel() <= read["memory_used"] <= read["memory_total"]
    assert read["temperature"] is None or 0 < read["temperature"] < 120
    clock = Clock(device)
    for _ in range(3):
        with clock.call(), clock.exchange():
            torch.cuda._sleep(10_000_000)
        torch.cuda.synchronize()
    assert clock.run.calls == 2, "the third is read with the next one, or at the end"
    times = clock.read()
    assert times["calls"] == 3 and 0 < times["exchange"] <= times["total"]


@pytest.mark.gpu
def test_a_long_call_ends_soon_after_it_is_cancelled() -> None:
    """The host is at most a few blocks ahead of the GPU, so it hears of the cancel while the call is under way."""
    import threading

    import comfy.model_management as management
    from comfy.ldm.pace import AHEAD, Pace

    made, ran, half_a_second = torch.zeros(1, device="cuda"), [0], 900_000_000
    timer = threading.Timer(1.5, management.interrupt_current_processing)
    timer.start()
    pace = Pace(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            for ran[0] in range(40):
                torch.cuda._sleep(half_a_second)
                pace.step(made)
    finally:
        timer.cancel()
        management.interrupt_current_processing(False)
        torch.cuda.synchronize()
    assert ran[0] < 10 + AHEAD
