"""Sampling runs with a step cache through the engine on several ranks, against the same on one."""

from __future__ import annotations

import types
from typing import Any

import torch

import comfy.k_diffusion.sampling as sampling
from comfy.denoiser_batch import DenoiserBatch
from comfy.extra_samplers import uni_pc
from comfy.taco_dit.core.config_manager import OptimizationConfig, ParallelConfig, TacoConfig
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.lockstep import RankLockstep

from .engine_cases import Model

SIGMAS = torch.cat([torch.linspace(1.0, 0.05, 14), torch.zeros(1)])
SAMPLERS = ("euler", "heun", "dpm_2", "euler_ancestral", "uni_pc")


class Denoiser:
    """What a sampler calls: the engine on one conditioning, or on two with guidance."""

    def __init__(self, engine: Any, model: Any, conds: int, height: int = 9) -> None:
        self.engine, self.model, self.conds, self.height = engine, model, conds, height
        generator = torch.Generator().manual_seed(5)
        self.conditioning = {
            "context": torch.randn(conds, 7, 40, generator=generator), "y": torch.randn(conds, 24, generator=generator),
            "guidance": torch.full((conds,), 3.5),
        }  # fmt: skip
        flow = types.SimpleNamespace(sigma_max=1.0, sigma_min=0.05)
        self.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=flow))

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        options = {"sample_sigmas": SIGMAS, "uuids": list(range(self.conds)), "cond_or_uncond": list(range(self.conds))}
        batch = DenoiserBatch(
            x.repeat(self.conds, 1, 1, 1), sigma[:1].repeat(self.conds),
            {**self.conditioning, "transformer_options": options}, list(range(self.conds)), 1,
        )  # fmt: skip
        outs = self.engine.evaluate(self.model, [batch], {})[0].chunk(self.conds)
        return 0.3 * (outs[0] if self.conds == 1 else outs[1] + 2 * (outs[0] - outs[1]))

    def run(self, sampler: str) -> torch.Tensor:
        """A whole run, from the same noise each time."""
        noise = torch.randn(1, 16, self.height, 13, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(9)
        self.engine.begin_run()
        with torch.inference_mode():
            if sampler == "uni_pc":
                out = uni_pc.sample_unipc(self, noise, SIGMAS, disable=True)
            else:
                out = getattr(sampling, f"sample_{sampler}")(self, noise, SIGMAS, disable=True)
        self.engine.end_run()
        if self.engine.step_cache is not None:
            self.engine.step_cache.end_run()
        return out


def engine(manager: Any, lockstep: Any, parallel: bool, **cache: Any) -> Any:
    """An engine with a step cache, or without where none is described."""
    optimization = OptimizationConfig(use_cache=bool(cache), **cache)
    config = TacoConfig(parallel=ParallelConfig(enabled=parallel), optimization=optimization)
    return TACODiTExecutionEngine(config, manager, lockstep)


def deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((one - other).abs().max() / one.abs().max()).item()


def sampled(manager: Any) -> dict[str, Any]:
    """{sampler: (deviation of ranks from one rank, decisions of ranks, of one rank, deviation of the cache)}."""
    lockstep, model, out = RankLockstep(manager), Model(), {}
    lockstep.begin("step cache")
    plain = engine(manager, lockstep, False)
    for name in SAMPLERS:
        cached = [engine(manager, lockstep, way, cache_threshold=0.7, cache_warm_up_steps=2) for way in (True, False)]
        many, one = (Denoiser(each, model, 1).run(name) for each in cached)
        exact = Denoiser(plain, model, 1).run(name)
        steps = [each.step_cache.steps for each in cached]
        out[name] = (deviation(one, many), steps[0], steps[1], deviation(exact, one))
    guided = engine(manager, lockstep, True, cache_threshold=0.7, cache_warm_up_steps=2)
    result = Denoiser(guided, model, 2).run("euler")
    out["guided"] = (
        guided._plan.dims.describe(),
        guided.step_cache.steps,
        deviation(Denoiser(plain, model, 2).run("euler"), result),
    )
    zero = engine(manager, lockstep, True, cache_threshold=0.0)
    without = engine(manager, lockstep, True)
    out["zero"] = (
        torch.equal(*(Denoiser(each, model, 2).run("dpm_2") for each in (zero, without))),
        zero.step_cache.steps,
    )
    interval = engine(manager, lockstep, True, cache_mode="interval", cache_interval=3, cache_warm_up_steps=2)
    Denoiser(interval, model, 1).run("euler")
    out["interval"] = interval.step_cache.steps
    lockstep.end()
    return out
