"""Denoiser calls with linears in eight bits on several ranks, against the same on one."""

from __future__ import annotations

from typing import Any

import torch

from comfy.ldm.modules.eight_bit import FORMATS
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.lockstep import RankLockstep

from .cache_cases import deviation
from .engine_cases import Model, batch
from .tiny import tiny_flux

KEY = "diffusion_model.double_blocks.0.img_mlp.0.weight"


class Loaded(torch.nn.Module):
    """A tiny Flux with a store of its own."""

    network_runner: Any = None
    apply_model = Model.apply_model

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = tiny_flux()


def results(manager: Any) -> dict[str, Any]:
    """{format: {case: (plan, deviation from one rank, deviation from full precision)}}."""
    lockstep, out = RankLockstep(manager), {}
    cases = {
        "tokens": batch(1, 9, 13, [0]),
        "conditionings": batch(2, 9, 13, [0, 1]),
        "pictures": batch(1, 6, 5, [0], 3),
    }
    exact = Model()
    for form in FORMATS:
        model = Loaded()
        patcher = ModelPatcher(model, manager.device, manager.device)
        patcher.weight_store.linear_precision = form
        patcher.add_patches({KEY: ("diff", (torch.ones(model.state_dict()[KEY].shape) * 1e-3,))}, 0.5)
        patcher.patch_model(manager.device)
        engines = {}
        for parallel in (ParallelConfig(), ParallelConfig(ring_degree=manager.world_size)):
            engines[parallel.ring_degree] = TACODiTExecutionEngine(TacoConfig(parallel=parallel), manager, lockstep)
        lockstep.begin(form)
        found = {}
        with torch.inference_mode():
            for name, work in cases.items():
                one = torch.cat([model.apply_model(work.x, work.sigma, **work.conditioning)])
                full = exact.apply_model(work.x, work.sigma, **work.conditioning)
                for ring, engine in engines.items():
                    many = engine.evaluate(model, [work], {})[0]
                    found[name, ring] = (engine._plan.dims.describe(), deviation(one, many), deviation(full, one))
        lockstep.end()
        out[form] = found
    return out
