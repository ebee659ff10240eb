"""Time and memory of one denoiser call of models of several families, in true sizes with random weights, on one GPU.

    python -m benchmarks.families --models sdxl,sd35_large,pixart_sigma,hunyuan_dit,qwen_image,wan_14b
    python -m benchmarks.families --models sdxl --scale 8 --device cpu      (a check without a GPU)
    python -m benchmarks.families --peer compiled                           (the same call in diffusers)

A call evaluates the prompts that sampling with guidance has (two; one where the model has its guidance as an input), as a
KSampler's steps do. Prints a table, and the same as JSON in its last line: ms (median), GPU memory, and the difference of
the result in half precision from that of plain calls, without captured graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .denoise_step import measure

_WAN: dict[str, Any] = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "in_dim": 16, "out_dim": 16, "num_heads": 40,
    "ffn_dim": 13824, "num_layers": 40, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
_SD35: dict[str, Any] = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 38, "input_size": None, "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432},
    },
    "num_patches": 36864, "pos_embed_max_size": 192, "qk_norm": "rms", "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}  # fmt: skip
_SDXL: dict[str, Any] = {
    "image_size": 32, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "channel_mult": [1, 2, 4], "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
    "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model and one call of it.

    configuration, config: its class in `comfy.supported_models`, and the network's arguments. latent: channels, frames (none
    for pictures), rows, columns. text: tokens and width of the prompt's features; pooled: width of the pooled vector.
    prompts: evaluated in a call.
    """

    configuration: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    prompts: int = 2

    def fields(self, device: torch.device) -> dict[str, Any]:
        """What a conditioning has besides its text."""
        out: dict[str, Any] = {}
        if self.pooled:
            out["pooled_output"] = torch.randn(1, self.pooled, device=device)
        if self.configuration == "HunyuanDiT":
            out["attention_mask"] = torch.ones(1, 77, dtype=torch.long, device=device)
            out["conditioning_mt5xl"] = torch.randn(1, 256, 2048, device=device)
            out["attention_mask_mt5xl"] = torch.ones(1, 256, dtype=torch.long, device=device)
        return out


# Sizes as published with the weights (model cards, config.json of the networks); pictures of 1024 x 1024, the video of
# 832 x 480 with 33 frames.
MODELS = {
    "sdxl": Model("SDXL", _SDXL, (4, 128, 128), (77, 2048), 1280),
    "sd35_large": Model("SD3", _SD35, (16, 128, 128), (154, 4096), 2048),
    "pixart_sigma": Model(
        "PixArtSigma",
        {
            "image_model": "pixart_sigma", "num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4,
            "depth": 28, "model_max_length": 300, "micro_condition": False,
        },
        (4, 128, 128), (300, 4096),
    ),
    "hunyuan_dit": Model(
        "HunyuanDiT", {"image_model": "hydit", "depth": 40, "hidden_size": 1408, "mlp_ratio": 4.3637}, (4, 128, 128),
        (77, 1024),
    ),
    "qwen_image": Model("QwenImage", {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, (16, 1, 128, 128),
                        (200, 3584)),
    "wan_14b": Model("WAN21_T2V", _WAN, (16, 9, 60, 104), (512, 4096)),
}  # fmt: skip


def _randomise(network: torch.nn.Module) -> None:
    """Random weights that keep activations at the size they have: of variance 1 over what a weight sums up."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, (parameter[0].numel()) ** -0.5)
        elif "norm" in name or name.endswith(("scale", "layers.0.weight")):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02)
    network.eval().requires_grad_(False)


def _engine(device: torch.device, captured: bool) -> Any:
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import OptimizationConfig, TacoConfig
    from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy_execution.lockstep import Lockstep

    config = TacoConfig(optimization=OptimizationConfig(use_cuda_graph=None if captured else False))
    manager = TACODiTDistributedManager(RankInfo(0, 1, 0, 1), device)
    engine = TACODiTExecutionEngine(config, manager, Lockstep())
    runtime.activate(runtime.Runtime(config, manager, engine.lockstep, engine))
    return engine


def run(case: Model, device: torch.device, dtype: torch.dtype, scale: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a call and bytes of GPU memory of one model."""
    import comfy.supported_models
    from comfy.denoiser_batch import DenoiserBatch
    from comfy.taco_dit.core.model_wrapper import TACODiTModelPatcher

    torch.manual_seed(0)
    kind = getattr(comfy.supported_models, case.configuration)(dict(case.config))
    kind.set_inference_dtype(dtype, None)
    model = kind.get_model({}, device=device)
    _randomise(model.diffusion_model)
    patcher = TACODiTModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    patcher.patch_model(device)
    channels, *frames, rows, columns = case.latent
    x = torch.randn(1, channels, *frames, rows // scale, columns // scale, device=device)
    text = torch.randn(1, *case.text, device=device).to(dtype)
    conds = model.extra_conds(cross_attn=text, noise=x, device=device, **case.fields(device))
    conditioning = {name: value.process_cond(case.prompts).cond for name, value in conds.items()}
    conditioning = {name: v.to(device) if torch.is_tensor(v) else v for name, v in conditioning.items()}
    sigma = torch.full((case.prompts,), 0.7, device=device)
    latents = x.expand(case.prompts, *x.shape[1:]).contiguous()
    prompts = list(range(case.prompts))
    batch = DenoiserBatch(latents, sigma, {**conditioning, "transformer_options": {}}, prompts, 1)
    found: dict[str, Any] = {}
    outs = []
    for way in ("plain", "captured"):
        engine = _engine(device, way == "captured")
        engine.begin_run()
        times, out = measure(
            lambda: patcher.evaluate_batches(model, [batch], {"transformer_options": {}})[0], device, 3, repeats
        )
        found[f"{way}_ms"] = statistics.median(times)
        outs.append(out)
        engine.end_run()
        engine.runner.forget()
    found["parameters"] = sum(p.numel() for p in model.diffusion_model.parameters())
    found["difference"] = ((outs[0] - outs[1]).abs().max() / outs[0].abs().max()).item()
    found["finite"] = bool(torch.isfinite(outs[1]).all())
    return found


def run_peer(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and parameters of diffusers' network of the same model."""
    from .family_peers import call_of

    torch.manual_seed(0)
    dtype, prompts = getattr(torch, options.dtype), MODELS[name].prompts
    with torch.no_grad():  # torch.compile does not take inference mode's tensors everywhere
        call, parameters = call_of(
            name, device, dtype, prompts, options.scale, options.peer == "compiled", _randomise
        )  # fmt: skip
        times, out = measure(call, device, 3, options.repeats)
    return {"ms": statistics.median(times), "parameters": parameters, "finite": bool(torch.isfinite(out).all())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=", ".join(MODELS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--scale", type=int, default=1, help="latents so many times smaller each way")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--peer", choices=("eager", "compiled"), help="diffusers instead of ours: as it is, or its blocks compiled"
    )
    options = parser.parse_args()
    unknown = [name for name in options.models.split(",") if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; known: {', '.join(MODELS)}")
    from comfy.cli_args import args

    args.cpu = options.device == "cpu"
    import comfy.model_management as management

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    management.bind_device(device)
    if options.peer:
        rows = peers(options, device)
    else:
        rows = ours(options, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__, "dtype": options.dtype, "rows": rows}))


def _peak_gib(device: torch.device) -> float:
    """The most GPU memory since it was asked for last, in GiB; what can be freed is freed."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def peers(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of diffusers."""
    rows = []
    print(f"{'model':14}{'billions':>9}{'ms':>10}{'GiB':>7}   diffusers, {options.peer}")
    for name in options.models.split(","):
        row = {"model": name, "peer": options.peer, **run_peer(name, device, options)}
        row["peak_gib"] = _peak_gib(device)
        rows.append(row)
        print(f"{name:14}{row['parameters'] / 1e9:9.2f}{row['ms']:10.2f}{row['peak_gib']:7.1f}", flush=True)
    return rows


def ours(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Our rows."""
    rows = []
    print(f"{'model':14}{'billions':>9}{'ms':>10}{'plain':>10}{'GiB':>7}{'difference':>12}")
    for name in options.models.split(","):
        with torch.inference_mode():
            row = run(MODELS[name], device, getattr(torch, options.dtype), options.scale, options.repeats)
        row["peak_gib"] = _peak_gib(device)
        rows.append({"model": name, **row})
        print(
            f"{name:14}{row['parameters'] / 1e9:9.2f}{row['captured_ms']:10.2f}{row['plain_ms']:10.2f}"
            f"{row['peak_gib']:7.1f}{row['difference']:12.1e}{'' if row['finite'] else '  not finite'}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
