"""Time and memory of the image VAE in its true size with random weights, on several ranks as inside a prompt.

    python -m benchmarks.vae --ranks 1,2 --size 2048
    python -m benchmarks.vae --ranks 1,2 --size 128 --base 32 --device cpu      (a check without a GPU)

Prints a table, and the same as JSON in its last line: ms of a whole decode and encode (median; copies to and from host
memory included), largest GPU memory of a rank in them, largest difference of the result from one rank's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT_S = 400.0


def _weights(base: int) -> dict[str, torch.Tensor]:
    """Random weights of the VAE of Flux, whose `base` is 128; they keep activations near unit size."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    sizes = {"ch": base, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3, "out_ch": 3, "z_channels": 16}
    generator = torch.Generator().manual_seed(1)
    out = {}
    with torch.device("meta"):
        shapes = AutoencoderKL(sizes).state_dict()
    for key, shape in shapes.items():
        noise = torch.randn(shape.shape, generator=generator)
        if noise.ndim > 1:
            out[key] = noise * noise[0].numel() ** -0.5
        else:
            out[key] = 1 + 0.1 * noise if "norm" in key and key.endswith("weight") else 0.02 * noise
    return out


def _measure(
    call: Callable[[], torch.Tensor], device: torch.device, repeats: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Milliseconds of each call from its start until the result is in host memory, and the result."""
    cuda = device.type == "cuda"
    for _ in range(2):
        out = call()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        out = call().cpu()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
    return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "peak_gib": peak}, out


def work(options: argparse.Namespace) -> None:
    """One rank; rank 0 writes results and the measurements of all ranks' slowest and largest."""
    from comfy.cli_args import args

    args.cpu = options.device == "cpu"
    import comfy.model_management as management
    from comfy.sd import VAE
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import TacoConfig
    from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager, rank_device
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy_execution.lockstep import Lockstep

    info = RankInfo.from_environment(os.environ)
    device = rank_device(info, args.cpu)
    management.bind_device(device)
    manager = TACODiTDistributedManager(info, device)
    lockstep = RankLockstep(manager) if info.world_size > 1 else Lockstep()
    runtime.activate(
        runtime.Runtime(TacoConfig(), manager, lockstep, TACODiTExecutionEngine(TacoConfig(), manager, lockstep))
    )
    vae = VAE(sd=_weights(options.base), device=device, dtype=getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn((options.batch, 16, options.size // 8, options.size // 8), generator=generator)
    if options.channels_last:
        latent = latent.contiguous(memory_format=torch.channels_last)
    picture = torch.rand((options.batch, options.size, options.size, 3), generator=generator)
    calls = {"decode": lambda: vae.decode(latent), "encode": lambda: vae.encode(picture)}
    if options.tiled:
        calls["decode tiled"] = lambda: vae.decode_tiled(latent)
    lockstep.begin("benchmark")
    rows, tensors = {}, {}
    with torch.inference_mode():
        for name, call in calls.items():
            mine, tensors[name] = _measure(call, device, options.repeats)
            everyone = lockstep.gather(name, mine)
            rows[name] = {
                key: max((rank[key] for rank in everyone if rank[key] is not None), default=None) for key in mine
            }
    if info.rank == 0:
        torch.save(tensors, options.out + ".pt")
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(rows, file)
    lockstep.gather("over", None)
    sys.stdout.flush()
    os._exit(0)  # without waiting for the other ranks' streams to close


def run(ranks: int, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Start `ranks` processes; their results by name, or `{"error": last line}`."""
    out = os.path.join(folder, f"{ranks}.json")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "benchmarks.vae", "--worker", "--out", out,
        "--size", str(options.size), "--batch", str(options.batch), "--base", str(options.base), "--dtype", options.dtype,
        "--device", options.device, "--repeats", str(options.repeats), *(["--tiled"] if options.tiled else []),
        *(["--channels-last"] if options.channels_last else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment).stderr
    except subprocess.TimeoutExpired:
        text = f"no result within {TIMEOUT_S} s"
    with contextlib.suppress(FileNotFoundError), open(out, encoding="utf-8") as file:
        return {"rows": json.load(file), "tensors": torch.load(out + ".pt")}
    lines = [line for line in text.strip().splitlines() if "Error" in line or "no result" in line]
    return {"error": lines[0] if lines else text.strip()[-500:]}


def report(found: dict[int, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    print(
        f"\nimage VAE, {options.size} x {options.size}, batch {options.batch}, {options.dtype}, torch {torch.__version__}"
    )
    print(f"{'ranks':>5}  {'what':<13}{'ms':>9}{'min':>9}{'max':>9}{'times':>7}{'GiB':>7}{'difference':>12}")
    for ranks, result in found.items():
        if "error" in result:
            print(f"{ranks:>5}  failed: {result['error'][:100]}")
            rows.append({"ranks": ranks, "error": result["error"]})
            continue
        first = first or result
        for name, row in result["rows"].items():
            one = first["tensors"][name]
            row = {
                "ranks": ranks, "what": name, **row, "times": first["rows"][name]["ms"] / row["ms"],
                "difference": (result["tensors"][name] - one).abs().max().item(),
            }  # fmt: skip
            rows.append(row)
            memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            print(
                f"{ranks:>5}  {name:<13}{row['ms']:>9.1f}{row['min_ms']:>9.1f}{row['max_ms']:>9.1f}"
                f"{row['times']:>7.2f}{memory:>7}{row['difference']:>12.1e}"
            )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(json.dumps({"size": options.size, "batch": options.batch, "dtype": options.dtype, "device": gpu,
                      "torch": torch.__version__, "rows": rows}))  # fmt: skip


def main() -> int:
    """Command line; returns 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks; differences are from the first")
    parser.add_argument("--size", type=int, default=2048, help="pixels of a side, a multiple of 8")
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--base", type=int, default=128, help="channels at full resolution; 128 is the true size")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None)
    parser.add_argument("--tiled", action="store_true", help="also decode in tiles")
    parser.add_argument("--channels-last", action="store_true", help="latents in that order of memory, which rows keep")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.worker:
        work(options)
    with tempfile.TemporaryDirectory() as folder:
        found = {ranks: run(ranks, options, folder) for ranks in map(int, options.ranks.split(","))}
        report(found, options)
    return int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
