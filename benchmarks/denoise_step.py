"""Time of one denoising step with true-size random weights, ours beside other systems in the same run.

    python -m benchmarks.denoise_step --model flux-dev --ranks 1,2,4 --peers xdit,diffusers
    python -m benchmarks.denoise_step --model flux-32b --ranks 2 --layout tensor       (or sharded: parts of the weights)
    python -m benchmarks.denoise_step --model flux-small --ranks 1,2 --device cpu      (a check without a GPU)

Prints a table, and the same as JSON in its last line: ms per step (median), share of the roofline (work over the
measured bf16 rate of a large matrix product), largest deviation of our result from one rank's, and what our planner
predicted from what it measured of the machine just before.

    python -m benchmarks.denoise_step --ranks 1,2 --linear fp8
    python -m benchmarks.denoise_step --ranks 1,2 --cache first_block --steps 50 --repeats 3

Lossy settings are compared with one rank that computes everything in `--dtype`. With `--steps` a row is a whole denoising
run of so many steps, and its milliseconds are those of the run.
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
from typing import Any

import torch

from comfy.taco_dit.core.distributed_manager import RankInfo, rank_device

from .models import CASES


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step: Any, device: torch.device, warmup: int, repeats: int) -> tuple[list[float], torch.Tensor]:
    """Milliseconds from the end of each step to the end of the next, and the last result.

    Steps are issued one after the other without waiting, as a sampler does, and timed on the device.
    """
    for _ in range(warmup):
        out = step()
    _synchronise(device)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            out = step()
            mark.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(stop) for start, stop in zip(marks, marks[1:])]
    else:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            out = step()
            times.append((time.perf_counter() - start) * 1e3)
    return times, out.float().cpu()


def profile(step: Any, path: str) -> None:
    """Write the kernels of one step, largest total time first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    with open(path, "w", encoding="utf-8") as file:
        file.write(trace.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product on random data."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    _synchronise(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start) / 1e12


def predicted_ms(system: str) -> float | None:
    """What our planner expected of the last call, with this machine's measured numbers."""
    if system != "taco":
        return None
    from comfy.taco_dit import runtime

    expected: float | None = runtime.current().engine.status()["predicted_ms"]
    return expected


def work(options: argparse.Namespace) -> None:
    """One rank of one system; rank 0 writes the result."""
    from .systems import SYSTEMS

    info = RankInfo.from_environment(os.environ)
    rank, device = info.rank, rank_device(info, options.device == "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(torch, options.dtype)
    settings = {"compile": not options.eager, "graph": not options.eager and not options.no_graph,
                "engine": options.engine, "layout": options.layout, "exchange": options.exchange,
                "machine": options.out + ".machine",
                "linear": options.linear, "cache": options.cache, "threshold": options.threshold,
                "interval": options.interval, "steps": options.steps}  # fmt: skip
    with torch.inference_mode() if options.worker == "taco" else torch.no_grad():
        step = SYSTEMS[options.worker](CASES[options.model], device, dtype, settings)
        start = time.perf_counter()
        times, out = measure(step, device, options.warmup, options.repeats)
        spent = time.perf_counter() - start
        if options.profile:
            profile(step, f"{options.profile}/{options.worker}-{os.environ.get('WORLD_SIZE', '1')}-{rank}.txt")
    if rank == 0:
        torch.save(out, options.out + ".pt")
        result = {
            "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "seconds": spent,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            "tflops": matmul_rate(device, dtype), "predicted_ms": predicted_ms(options.worker),
        }  # fmt: skip
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file)
    # Peers leave process groups behind whose teardown can wait for ever.
    sys.stdout.flush()
    os._exit(0)


def run_system(name: str, ranks: int, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Start `ranks` processes of a system; returns its result, or `{"error": last lines}`."""
    out = os.path.join(folder, f"{name}-{ranks}.json")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "benchmarks.denoise_step",
        "--worker", name, "--out", out, "--model", options.model, "--device", options.device, "--dtype", options.dtype,
        "--warmup", str(options.warmup), "--repeats", str(options.repeats), "--engine", options.engine,
        "--layout", options.layout, "--exchange", options.exchange,
    ]  # fmt: skip
    command += ["--linear", options.linear if name == "taco" else "bf16", "--cache", options.cache]
    command += [
        "--threshold",
        str(options.threshold),
        "--interval",
        str(options.interval),
        "--steps",
        str(options.steps),
    ]
    command += ["--eager"] if options.eager else []
    command += ["--no-graph"] if options.no_graph else []
    command += ["--profile", options.profile] if options.profile else []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, env=environment)
        text = done.stderr
        print("".join(line + "\n" for line in text.splitlines() if "TACO-DiT" in line), end="")
    except subprocess.TimeoutExpired as error:
        text = f"no result within {options.timeout} s\n" + str(error.stderr or "")[-2000:]
    with contextlib.suppress(FileNotFoundError), open(out, encoding="utf-8") as file:
        return {**json.load(file), "wall_s": time.perf_counter() - started, "tensor": out + ".pt"}
    lines = [line for line in text.strip().splitlines() if "Error" in line or "no result" in line]
    return {"error": lines[0] if lines else text.strip()[-500:]}


def deviation(result: dict[str, Any], reference: dict[str, Any] | None) -> float | None:
    """Largest difference from one rank's result, as a share of its largest value."""
    if reference is None or "tensor" not in result or "tensor" not in reference:
        return None
    one, many = torch.load(reference["tensor"]), torch.load(result["tensor"])
    return ((many - one).abs().max() / one.abs().max()).item()


def add_roofline(rows: list[dict[str, Any]], tera_flop: float) -> None:
    """Share of the ideal time, at the best matrix rate that any run saw: a GPU that just worked hard is slower."""
    good = [row for row in rows if "error" not in row]
    best = max((row["tflops"] for row in good), default=1.0)
    for row in good:
        row["roofline"] = tera_flop / (best * row["ranks"]) * 1e3 / row["ms"]


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    how = "eager" if options.eager else "each system as it is by default"
    print(f"\n{options.model}, {options.dtype}, {how}, torch {torch.__version__}")
    print(
        f"{'system':<12}{'ranks':>6}{'ms/step':>10}{'min':>9}{'max':>9}{'roofline':>10}{'deviation':>12}{'GiB':>7}"
        f"{'predicted':>11}"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['system']:<12}{row['ranks']:>6}  failed: {row['error'].splitlines()[-1][:80]}")
            continue
        roof = f"{row['roofline'] * 100:.0f}%"
        off = "-" if row["deviation"] is None else f"{row['deviation']:.1e}"
        memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.0f}"
        expected = "-" if row["predicted_ms"] is None else f"{row['predicted_ms']:.2f}"
        print(
            f"{row['system']:<12}{row['ranks']:>6}{row['ms']:>10.2f}{row['min_ms']:>9.2f}{row['max_ms']:>9.2f}"
            f"{roof:>10}{off:>12}{memory:>7}{expected:>11}"
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(json.dumps({"model": options.model, "dtype": options.dtype, "device": gpu, "torch": torch.__version__,
                      "rows": rows}))  # fmt: skip


def main() -> int:
    """Command line; returns 1 when one of our own runs failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CASES), default="flux-dev")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, for example 1,2,4")
    parser.add_argument("--peers", default="", help="other systems to measure: xdit,diffusers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None)
    parser.add_argument("--engine", choices=("native", "xfuser"), default="native")
    parser.add_argument(
        "--layout", choices=("whole", "tensor", "sharded"), default="whole", help="where ours keeps the weights"
    )
    parser.add_argument(
        "--exchange",
        choices=("collective", "peer", "auto"),
        default="collective",
        help="ours: how tokens go between GPUs",
    )
    parser.add_argument("--linear", choices=("bf16", "fp8", "int8"), default="bf16", help="ours: linears of blocks")
    parser.add_argument("--cache", choices=("off", "first_block", "interval"), default="off", help="ours: step cache")
    parser.add_argument("--threshold", type=float, default=0.08, help="of --cache first_block")
    parser.add_argument("--interval", type=int, default=2, help="of --cache interval")
    parser.add_argument("--steps", type=int, default=0, help="ours: each call is a whole run of so many Euler steps")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs, in any system")
    parser.add_argument("--no-graph", action="store_true", help="ours without a CUDA graph")
    parser.add_argument("--profile", metavar="FOLDER", help="also write each rank's kernels of one step there")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one system and number of ranks")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.worker:
        work(options)
    systems = ["taco", *(peer for peer in options.peers.split(",") if peer)]
    rows, alone = [], {}
    lossy = options.linear != "bf16" or options.cache != "off"
    options.steps = options.steps or (50 if options.cache != "off" else 0)
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(folder + "/exact")
        for ranks in (int(r) for r in options.ranks.split(",")):
            for name in systems:
                result = run_system(name, ranks, options, folder)
                if lossy and name == "taco" and name not in alone:
                    exact = argparse.Namespace(**{**vars(options), "linear": "bf16", "cache": "off"})
                    alone[name] = run_system(name, 1, exact, folder + "/exact")
                row = {"system": name, "ranks": ranks, **result}
                if "error" not in result:
                    alone.setdefault(name, result)
                    row["deviation"] = deviation(result, alone[name]) if ranks > 1 or lossy else None
                row.pop("tensor", None)
                rows.append(row)
                print(f"{name} on {ranks}: {row.get('ms', row.get('error'))}", flush=True)
        add_roofline(rows, CASES[options.model].tera_flop() * max(1, options.steps))
        report(rows, options)
    return int(any("error" in row for row in rows if row["system"] == "taco"))


if __name__ == "__main__":
    sys.exit(main())
