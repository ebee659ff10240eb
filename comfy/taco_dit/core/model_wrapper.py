"""The patcher of every diffusion model: a ModelPatcher whose denoiser calls go through the engine."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management
import comfy.patcher_extension
from comfy import accounting
from comfy.model_patcher import ModelPatcher
from comfy.taco_dit import runtime

from .agreement import agree_on
from .config_manager import OptimizationConfig

WRAPPER_KEY = "taco_dit"


class TACODiTModelPatcher(ModelPatcher):
    """ModelPatcher that spreads denoiser calls over the ranks. Clones, patches, LoRA and hooks work as in any other.

    Clones that a pack makes of a class of its own do so, too. `taco_parallel` overrides the configuration's `parallel`
    section for this model; None uses it as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = TACODiTModelPatcher
        active = runtime.active()
        optimization = OptimizationConfig() if active is None else active.config.optimization
        self.weight_store.linear_precision = optimization.linear_precision
        self.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, _sample_together)

    def evaluate_batches(self, model: Any, batches: list[Any], model_options: dict[str, Any]) -> list[torch.Tensor]:
        """See `TACODiTExecutionEngine.evaluate`."""
        return runtime.current().engine.evaluate(model, batches, model_options, self.taco_parallel)

    def denoiser_memory_budget(self, device: torch.device) -> int:
        """The smallest free memory of all ranks decides for all how many conditionings run together.

        It is asked at the first call of a run, when all weights are loaded, and kept for the run.
        """
        if getattr(self.model, "taco_memory_budget", None) is None:
            free = comfy.model_management.get_free_memory(device)
            self.model.taco_memory_budget = min(runtime.current().lockstep.gather("memory", free))
        return self.model.taco_memory_budget


def _sample_together(
    executor: Any, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """Around a whole sampling run: agree on the inputs, keep the statistics."""
    current = runtime.current()
    guider = executor.class_obj
    patcher = guider.model_patcher
    if current.lockstep.world_size > 1:
        inputs = {"noise": noise, "latent": latent_image, "sigmas": sigmas, "conditioning": guider.conds,
                  "others": [a for a in args if isinstance(a, torch.Tensor)]}  # fmt: skip
        agree_on(current.lockstep, inputs, patcher)
    patcher.model.taco_memory_budget = None
    current.engine.begin_run()
    try:
        with accounting.phase("denoise"):
            result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            run = current.engine.end_run()
    finally:
        current.engine.runner.end_run()
        current.engine.pipelines.end_run()
        if current.engine.step_cache is not None:
            current.engine.step_cache.end_run()
    accounting.move("denoise", "exchange", run.ranks[current.manager.rank]["exchange"] / 1e3)
    return result
