"""Whole prompts through the real server, as a person waits for them: from POST to the entry in the history.

    python -m benchmarks.whole_prompt --model flux-dev --ranks 1,2
    python -m benchmarks.whole_prompt --scale small --device cpu --ranks 1,2      on a machine without GPUs

Writes files in the real layouts with random weights (34 GB for flux-dev, made on the GPU), starts the server with each
number of ranks, posts the same prompts in the same order (cold, another seed, another text, LoRA on, stronger and off,
guidance, a batch, another size, back; then a second start), and compares the pictures between numbers of ranks. Prints a
table and, as the last line, JSON with every prompt's phases and counters as the server measured them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .prompt_files import SCALES, write_models
from .prompt_server import BenchmarkServer

Prompt = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One prompt of the benchmark."""

    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)


STEPS = (
    Step("cold", 1),
    Step("new seed", 2),
    Step("new seed again", 3),
    Step("new text", 3, {"text": "two dogs on a beach"}),
    Step("LoRA 0.8", 3, {"lora": 0.8}),
    Step("LoRA 0.5", 3, {"lora": 0.5}),
    Step("LoRA off", 4),
    Step("CFG 3.5", 5, {"cfg": 3.5}),
    Step("CFG 3.5 again", 6, {"cfg": 3.5}),
    Step("batch of 2", 7, {"batch": 2}),
    Step("new size", 8, {"scale": 1.125}),
    Step("back", 9),
)
SECOND_START = (Step("second start, cold", 1), Step("second start, new seed", 2))


def workflow(
    size: int,
    steps: int,
    seed: int,
    text: str = "a photograph of an astronaut riding a horse",
    cfg: float = 1.0,
    batch: int = 1,
    lora: float = 0.0,
    scale: float = 1.0,
) -> Prompt:
    """A text-to-image prompt for the files of `prompt_files`: `size` pixels square times `scale`, euler/simple."""
    side = int(size * scale)
    prompt: Prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors", "weight_dtype": "default"}},
        "c": {
            "class_type": "DualCLIPLoader",
            "inputs": {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl.safetensors", "type": "flux"},
        },
        "v": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["c", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["c", 0]}},
        "4": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["2", 0], "guidance": 3.5}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": side, "height": side, "batch_size": batch}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["4", 0], "negative": ["3", 0], "latent_image": ["5", 0], "seed": seed,
                "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["v", 0]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "whole_prompt"}},
    }  # fmt: skip
    if lora:
        prompt["l"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": "lora.safetensors", "strength_model": lora},
        }
        prompt["6"]["inputs"]["model"] = ["l", 0]
    return prompt


def run_steps(
    server: BenchmarkServer, steps: tuple[Step, ...], size: int, count: int, pictures: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Post prompts one after the other; rows for the table. `pictures` gets the picture of each step by name."""
    rows = []
    for step in steps:
        seconds, entry = server.run(workflow(size, count, step.seed, **step.changes))
        status = server.json("/taco_dit/status")
        record = status["last_prompts"][-1] if status.get("last_prompts") else {}
        run = status.get("last_run") or {}
        rows.append(
            {
                "prompt": step.name,
                "seconds": round(seconds, 3),
                "result": entry["status"]["status_str"],
                "plan": run.get("plan"),
                "step_ms": round(run.get("mean_call_ms", 0.0), 2),
                "predicted_ms": run.get("predicted_ms"),
                "phases": {name: round(value, 3) for name, value in record.get("phases", {}).items()},
                "other": round(record.get("other", 0.0), 3),
                "counts": record.get("counts", {}),
                "moved_by_rank": [
                    rank.get("prompt", {}).get("counts", {}).get("weight_bytes", 0) for rank in status["ranks"]
                ],
            }
        )
        if entry["status"]["status_str"] == "success":
            pictures[step.name] = server.picture(entry)
        print(_line(server.ranks, rows[-1]), flush=True)
    return rows


def _line(ranks: int, row: dict[str, Any]) -> str:
    phases = " ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases"].items() if seconds >= 0.01)
    counts = row["counts"]
    moved = f"{counts.get('weight_bytes', 0) / 1e9:.2f} GB"
    calls = "/".join(str(counts.get(f"calls_{kind}", 0)) for kind in ("plain", "captured", "replayed"))
    expected = "" if row["predicted_ms"] is None else f" (predicted {row['predicted_ms']:.1f})"
    return (
        f"[{ranks}] {row['prompt']:<22} {row['seconds']:7.2f} s  step {row['step_ms']:7.1f} ms{expected}  {row['plan']:<12} "
        f"moved {moved:>9}  plain/captured/replayed {calls:<8}  {phases} other {row['other']:.2f}"
    )


def compare(pictures: dict[int, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Largest and mean difference of each picture from that of the first number of ranks, in levels of 255."""
    first, *others = pictures
    rows = []
    for ranks in others:
        for name, picture in pictures[ranks].items():
            reference = pictures[first].get(name)
            if reference is not None:
                difference = np.abs(picture.astype(float) - reference.astype(float))
                rows.append(
                    {
                        "prompt": name,
                        "ranks": [first, ranks],
                        "max": difference.max(),
                        "mean": round(difference.mean(), 3),
                    }
                )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["flux-dev"], default="flux-dev")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full", help="size of the random network")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, separated by commas")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", type=int, default=0, help="pixels of a side (0: 1024, or 256 for --scale small)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--base", help="folder for models and pictures; kept if given, and its files are used again")
    parser.add_argument("--flags", default="", help="further flags for the server, as one string")
    arguments = parser.parse_args()
    size = arguments.size or (1024 if arguments.scale == "full" else 256)
    base = arguments.base or tempfile.mkdtemp(prefix="whole_prompt_")
    pictures: dict[int, dict[str, np.ndarray]] = {}
    result: dict[str, Any] = {"model": arguments.model, "scale": arguments.scale, "size": size, "runs": []}
    try:
        seconds = write_models(base, arguments.scale, arguments.device)
        print(f"models written in {seconds:.0f} s", flush=True)
        for ranks in [int(part) for part in arguments.ranks.split(",")]:
            pictures[ranks] = {}
            for steps in (STEPS, SECOND_START):
                with BenchmarkServer(base, ranks, arguments.device, arguments.flags.split()) as server:
                    print(f"[{ranks}] server up after {server.start_seconds:.1f} s", flush=True)
                    rows = run_steps(server, steps, size, arguments.steps, pictures[ranks])
                    result["runs"].append({"ranks": ranks, "start_seconds": server.start_seconds, "rows": rows})
        result["differences"] = compare(pictures)
        for row in result["differences"]:
            print(
                f"{row['prompt']}: ranks {row['ranks']} differ by at most {row['max']:.0f}, in the mean {row['mean']}"
            )
    finally:
        if not arguments.base:
            shutil.rmtree(base, ignore_errors=True)
    print(json.dumps(result))
    if any(row["result"] != "success" for run in result["runs"] for row in run["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
