"""What only GPUs can show: `./run_tests.sh gpu` on a machine with NVIDIA GPUs; skipped without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
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
@needs_two
def test_ranks_agree_in_bf16(tmp_path: Path) -> None:
    """N ranks' bf16 result is no further from one rank's than bf16 is from itself (a few units in the last place)."""
    ranks = [r for r in (1, 2, 3, 4) if r <= torch.cuda.device_count()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.denoise_step", "--model", "flux-small", "--repeats", "2", "--warmup", "2",
         "--ranks", ",".join(map(str, ranks))],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert [row["ranks"] for row in rows] == ranks
    assert all(row["deviation"] < 2e-2 for row in rows[1:])


def _ask(port: int, path: str, body: object = None) -> object:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data=data, timeout=30) as answer:
        return json.loads(answer.read() or b"{}")


WORKFLOW = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "tiny_flux_dev.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle above a green square"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 104, "height": 72, "batch_size": 1}},
    "6": {"class_type": "KSampler", "inputs": {
        "model": ["1", 0], "seed": 5, "steps": 6, "cfg": 4.5, "sampler_name": "euler", "scheduler": "simple",
        "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["5", 0], "denoise": 1.0}},
    "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
    "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "gpu"}},
}  # fmt: skip


def _render(base: Path, ranks: int, port: int, flags: list[str]) -> tuple[bytes, dict[str, object]]:
    """Pixels of the workflow and the server's status, from a server of its own."""
    import numpy as np
    from PIL import Image

    gpus = ",".join(str(i) for i in range(ranks))
    server = subprocess.Popen(
        [sys.executable, "main.py", "--gpus", gpus, "--port", str(port), "--base-directory", str(base), *flags],
        cwd=ROOT, stdout=(base / f"log{ranks}.txt").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                _ask(port, "/prompt")
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, (base / f"log{ranks}.txt").read_text()
                time.sleep(0.3)
        prompt = _ask(port, "/prompt", {"prompt": WORKFLOW})["prompt_id"]
        while prompt not in (history := _ask(port, f"/history/{prompt}")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        entry = history[prompt]
        assert entry["status"]["status_str"] == "success", entry["status"]
        name = entry["outputs"]["8"]["images"][0]["filename"]
        return np.asarray(Image.open(base / "output" / name)).astype(int), _ask(port, "/taco_dit/status")
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("flags,limit", [(["--force-fp32", "--fp32-vae", "--fp32-text-enc"], 1), ([], 40)])
def test_whole_server(tmp_path: Path, flags: list[str], limit: int) -> None:
    """The whole server on one GPU and on all: the same picture, in fp32 at most 1/255 apart.

    In bf16 a random network amplifies rounding; that is seen as a mean difference of few levels, never another picture.
    """
    from tests.tiny_models import write_flux

    write_flux(str(tmp_path / "models"))
    one, _ = _render(tmp_path, 1, 18801, flags)
    for ranks in (2, 3, 4):
        if ranks <= torch.cuda.device_count():
            many, status = _render(tmp_path, ranks, 18800 + ranks, flags)
            assert status["world_size"] == ranks
            assert abs(many - one).max() <= limit, f"{ranks} ranks"
            assert abs(many - one).mean() <= max(0.5, limit / 10), f"{ranks} ranks"
    assert os.path.isdir(tmp_path / "output")


@pytest.mark.gpu
@needs_gpu
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
