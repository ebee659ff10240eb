"""One denoising step of each system, on this rank: ours, xDiT and diffusers.

Each function builds the network with random weights in true sizes and returns a callable `step() -> Tensor` that every
rank calls together. The peers are used as their own documentation starts them: Ulysses over all ranks, cuDNN attention.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from .models import Case

Step = Callable[[], torch.Tensor]


def _rank_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _randomise(network: torch.nn.Module, seed: int = 0) -> None:
    """The same small random weights on every rank; norm scales stay near 1."""
    device = next(network.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    network.eval().requires_grad_(False)


def _randomise_in_host_memory(network: torch.nn.Module, device: torch.device, seed: int = 0) -> None:
    """The same weights as `_randomise` on `device`, drawn there one by one, for a network that does not fit on it."""
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in list(network.named_parameters()):
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if value.ndim > 1:
            value.normal_(0, value.shape[-1] ** -0.5, generator=generator)
        elif "norm" in name:
            value.fill_(1.0)
        else:
            value.normal_(0, 0.02, generator=generator)
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, torch.nn.Parameter(value.cpu(), requires_grad=False))
    network.eval()


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def taco(case: Case, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Step:
    """Our engine on a Flux model: the path that every KSampler step takes."""
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    import comfy.model_management as management
    import comfy.samplers
    import comfy.supported_models
    from comfy.denoiser_batch import DenoiserBatch
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import MemoryConfig, OptimizationConfig, ParallelConfig, TacoConfig
    from comfy.taco_dit.core.distributed_manager import RankInfo, TACODiTDistributedManager
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy.taco_dit.core.measuring import agreed_profile
    from comfy.taco_dit.core.model_wrapper import TACODiTModelPatcher
    from comfy_execution.lockstep import Lockstep

    management.bind_device(device)
    layout = options.get("layout", "whole")
    config = TacoConfig(
        parallel=ParallelConfig(tensor_parallel=layout == "tensor", exchange=options.get("exchange", "collective")),
        memory=MemoryConfig(shard_weights=layout == "sharded"),
        optimization=OptimizationConfig(
            use_torch_compile=None if options.get("compile", True) else False,
            use_cuda_graph=None if options.get("graph", True) else False,
            engine=options.get("engine", "native"),
            linear_precision=options.get("linear", "bf16"),
            use_cache=options.get("cache", "off") != "off",
            cache_mode=options["cache"] if options.get("cache", "off") != "off" else "first_block",
            cache_threshold=options.get("threshold", 0.08),
            cache_interval=options.get("interval", 2),
        ),
    )
    manager = TACODiTDistributedManager(RankInfo.from_environment(os.environ), device)
    lockstep = RankLockstep(manager) if manager.world_size > 1 else Lockstep()
    engine = TACODiTExecutionEngine(config, manager, lockstep)
    engine.profile = agreed_profile(manager, options["machine"], engine.runner.cuda_graph, True)
    if lockstep.is_first:
        print(f"TACO-DiT measured: {engine.profile.describe()}", file=sys.stderr, flush=True)
    runtime.activate(runtime.Runtime(config, manager, lockstep, engine))
    family = comfy.supported_models.Flux({"image_model": "flux", **case.network})
    family.set_inference_dtype(dtype, None)
    model = family.get_model({}, device=device if layout == "whole" else torch.device("meta"))
    if layout == "whole":
        _randomise(model.diffusion_model)
    else:
        _randomise_in_host_memory(model.diffusion_model, device)
    patcher = TACODiTModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    if layout == "whole" and config.optimization.linear_precision != "bf16":
        patcher.patch_model(device)
    x = _draw(device, torch.float32, 1, 16, case.height // 8, case.width // 8)
    conditioning = {
        "c_crossattn": _draw(device, dtype, 1, case.text_tokens, case.network["context_in_dim"]),
        "y": _draw(device, dtype, 1, case.network["vec_in_dim"]),
        "guidance": torch.full((1,), 3.5, device=device),
        "transformer_options": {},
    }
    sigma_now = torch.full((1,), 0.7, device=device)
    batch = DenoiserBatch(x, sigma_now, conditioning, [0], 1)
    lockstep.begin("benchmark")
    if layout != "whole":
        management.load_models_gpu([patcher])

    def step() -> torch.Tensor:
        return patcher.evaluate_batches(model, [batch], {"transformer_options": {}})[0]

    def run() -> torch.Tensor:
        """Euler's method on the flow, from noise to the last sigma."""
        engine.begin_run()
        now = x
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
            schedule = {"transformer_options": {"sample_sigmas": sigmas}}
            at = DenoiserBatch(now, torch.full_like(sigma_now, sigma), {**conditioning, **schedule}, [0], 1)
            denoised = patcher.evaluate_batches(model, [at], {"transformer_options": {}})[0]
            now = now + (now - denoised) / sigma * (following - sigma)
        summary = engine.end_run()
        engine.runner.end_run()
        if summary.lossy and manager.rank == 0:
            print("TACO-DiT:", ", ".join(summary.lossy), file=sys.stderr)
        return now

    steps = int(options.get("steps", 0))
    sigmas = comfy.samplers.calculate_sigmas(model.model_sampling, "simple", max(1, steps))
    return run if steps else step


def _diffusers_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rows, cols = case.height // 16, case.width // 16
    ids = torch.zeros(rows, cols, 3, device=device, dtype=dtype)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(cols, device=device)[None]
    return {
        "hidden_states": _draw(device, dtype, 1, rows * cols, 64),
        "encoder_hidden_states": _draw(device, dtype, 1, case.text_tokens, case.network["context_in_dim"]),
        "pooled_projections": _draw(device, dtype, 1, case.network["vec_in_dim"]),
        "timestep": torch.full((1,), 0.7, device=device, dtype=dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(case.text_tokens, 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
    }


def _diffusers_sizes(case: Case) -> dict[str, Any]:
    network = case.network
    return {
        "in_channels": 64,
        "num_layers": network["depth"],
        "num_single_layers": network["depth_single_blocks"],
        "attention_head_dim": network["hidden_size"] // network["num_heads"],
        "num_attention_heads": network["num_heads"],
        "joint_attention_dim": network["context_in_dim"],
        "pooled_projection_dim": network["vec_in_dim"],
        "guidance_embeds": network["guidance_embed"],
        "axes_dims_rope": tuple(network["axes_dim"]),
    }


def _init_torch_distributed(device: torch.device) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def diffusers(case: Case, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Step:
    """diffusers' FluxTransformer2DModel with context parallelism, blocks compiled."""
    from diffusers import ContextParallelConfig, FluxTransformer2DModel

    _, world = _rank_world()
    with torch.device(device):
        network = FluxTransformer2DModel(**_diffusers_sizes(case)).to(dtype)
    _randomise(network)
    if device.type == "cuda":
        network.set_attention_backend("_native_cudnn")
    if world > 1:
        _init_torch_distributed(device)
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    if options.get("compile", True) and device.type == "cuda":
        network.compile_repeated_blocks(fullgraph=True)
    inputs = _diffusers_inputs(case, device, dtype)

    def step() -> torch.Tensor:
        return network(**inputs, return_dict=False)[0]

    return step


def xdit(case: Case, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Step:
    """xfuser's Flux wrapper with Ulysses, compiled with its default mode, reduce-overhead."""
    import xfuser.core.distributed.runtime_state as state
    from xfuser.config.args import xFuserArgs
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel
    from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

    rank, world = _rank_world()
    init_distributed_environment(rank=rank, world_size=world)
    initialize_model_parallel(sequence_parallel_degree=world, ulysses_degree=world)
    config, _ = xFuserArgs(model="random", ulysses_degree=world).create_config()

    class Runtime(state.RuntimeState):
        """The part of xfuser's runtime that its attention reads."""

    state._RUNTIME = Runtime(config)
    state._RUNTIME.split_text_embed_in_sp = True
    state._RUNTIME.max_condition_sequence_length = case.text_tokens
    with torch.device(device):
        network = xFuserFlux1Transformer2DWrapper(**_diffusers_sizes(case)).to(dtype)
    _randomise(network)
    call = network
    if options.get("compile", True):
        call = torch.compile(network, mode="reduce-overhead")
    inputs = _diffusers_inputs(case, device, dtype)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(**inputs, return_dict=False)[0]

    return step


SYSTEMS: dict[str, Callable[..., Step]] = {"taco": taco, "xdit": xdit, "diffusers": diffusers}
