"""The TACO-DiT nodes: per-model parallel settings, a sampler that reports, and displays.

None of them is needed: every workflow runs parallel as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import nodes
from comfy.taco_dit import runtime
from comfy.taco_dit.core.config_manager import ConfigError, divisors
from comfy.taco_dit.core.plan import Workload, choose_plan

CATEGORY = "TACO-DiT"


class TACODiTModelLoader:
    """Sets how one model is spread over the ranks."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The diffusion model to configure."}),
                "enable_taco_dit": ("BOOLEAN", {"default": True, "tooltip": "Off: every rank computes everything."}),
                "auto_detect": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Choose degrees for each call; off: use the degree below."},
                ),
                "sequence_parallel_degree": (
                    "INT",
                    {"default": 3, "min": 1, "max": 64, "tooltip": "Ranks that share one picture's tokens."},
                ),
                "cfg_parallel": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Positive and negative prompt may run on different ranks."},
                ),
                "use_flash_attention": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Use the fastest fused attention there is."},
                ),
            }
        }

    RETURN_TYPES = ("MODEL", "TACO_DIT_INFO")
    RETURN_NAMES = ("model", "taco_dit_info")
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Sets how this model's denoising is spread over the GPUs. Workflows run parallel without it too."

    def load(
        self,
        model: Any,
        enable_taco_dit: bool,
        auto_detect: bool,
        sequence_parallel_degree: int,
        cfg_parallel: bool,
        use_flash_attention: bool,
    ) -> tuple[Any, dict[str, Any]]:
        """A clone of the model with its own parallel settings, and a description of them.

        Raises ConfigError when a fixed degree does not divide the ranks.
        """
        current = runtime.current()
        world = current.manager.world_size
        parallel = current.config.parallel
        changes: dict[str, Any] = {"enabled": parallel.enabled and enable_taco_dit, "cfg_parallel": cfg_parallel}
        if not auto_detect and enable_taco_dit:
            if world % sequence_parallel_degree:
                allowed = ", ".join(map(str, divisors(world)))
                raise ConfigError(
                    f"sequence_parallel_degree is {sequence_parallel_degree}, which does not divide the {world} ranks; "
                    f"use {allowed}, or turn auto_detect on"
                )
            degrees = {
                "sequence_parallel_degree": sequence_parallel_degree,
                "ulysses_degree": None,
                "ring_degree": None,
            }
            changes |= degrees
        patcher = model.clone()
        patcher.taco_parallel = dataclasses.replace(parallel, **changes)
        if not use_flash_attention:
            from comfy.ldm.modules.attention import attention_basic

            def override(original: Any, *args: Any, **kwargs: Any) -> Any:
                return attention_basic(*args, **kwargs, _inside_attn_wrapper=True)

            override.rows_independent = True  # type: ignore[attr-defined]
            patcher.model_options["transformer_options"]["optimized_attention_override"] = override
        return patcher, describe(patcher)


def describe(patcher: Any) -> dict[str, Any]:
    """What TACODiTInfoDisplay shows of a model."""
    current = runtime.current()
    parallel = getattr(patcher, "taco_parallel", None) or current.config.parallel
    network = patcher.model.diffusion_model
    work = Workload(2, 1, 4096, getattr(network, "num_heads", 1), getattr(network, "hidden_size", 1024))
    world = current.manager.world_size
    layout = current.engine.arranger.layout_of(patcher.model)
    with_cfg = choose_plan(parallel, work, world, layout)
    without = choose_plan(parallel, dataclasses.replace(work, conds=1), world, layout)
    return {
        "parallel_enabled": parallel.enabled and world > 1,
        "model_type": type(patcher.model).__name__,
        "world_size": world,
        "device": str(current.manager.device),
        "layout": layout.describe(),
        "plan": {"cfg above 1": with_cfg.dims.describe(), "cfg 1": without.dims.describe()},
        "engine": current.config.optimization.engine,
        "configuration": current.config.source,
    }


class TACODiTKSampler(nodes.KSampler):
    """KSampler that also returns how its time was spent."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = nodes.KSampler.INPUT_TYPES()
        required = {**inputs["required"], "enable_taco_dit": ("BOOLEAN", {"default": True})}
        return {**inputs, "required": required}

    RETURN_TYPES = ("LATENT", "TACO_DIT_STATS")
    RETURN_NAMES = ("latent", "taco_dit_stats")
    OUTPUT_TOOLTIPS = ("The denoised latent.", "Times of this run on each rank.")
    FUNCTION = "sample_with_statistics"
    CATEGORY = CATEGORY
    DESCRIPTION = "KSampler that also reports how its time was spent on each rank."

    def sample_with_statistics(self, model: Any, enable_taco_dit: bool = True, **inputs: Any) -> tuple[Any, Any]:
        """The latent, and the run's statistics as a dict."""
        current = runtime.current()
        if not enable_taco_dit:
            model = model.clone()
            model.taco_parallel = dataclasses.replace(current.config.parallel, enabled=False)
        (latent,) = self.sample(model, **inputs)
        run = current.engine.last_run
        return latent, {} if run is None else {**run.as_dict(), "text": run.text()}


class _Display:
    """Shows a text in the page and on the console of rank 0."""

    OUTPUT_NODE = True
    RETURN_TYPES = ()
    FUNCTION = "show"
    CATEGORY = CATEGORY

    @staticmethod
    def shown(title: str, text: str) -> dict[str, Any]:
        logging.info("%s\n%s", title, text)
        return {"ui": {"text": [text]}}


class TACODiTInfoDisplay(_Display):
    """Shows a TACO_DIT_INFO."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"taco_dit_info": ("TACO_DIT_INFO",)}}

    def show(self, taco_dit_info: dict[str, Any]) -> dict[str, Any]:
        """One line per fact."""
        plans = taco_dit_info.get("plan", {})
        lines = [
            f"parallel enabled: {'yes' if taco_dit_info['parallel_enabled'] else 'no'}",
            f"model type: {taco_dit_info['model_type']}",
            f"ranks: {taco_dit_info['world_size']}",
            *(f"plan at {case}: {plan}" for case, plan in plans.items()),
            f"engine: {taco_dit_info['engine']}",
            f"configuration: {taco_dit_info['configuration']}",
        ]
        return self.shown("TACO-DiT Info", "\n".join(lines))


class TACODiTStatsDisplay(_Display):
    """Shows a TACO_DIT_STATS."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"taco_dit_stats": ("TACO_DIT_STATS",)}}

    def show(self, taco_dit_stats: dict[str, Any]) -> dict[str, Any]:
        """The run's own text."""
        return self.shown("TACO-DiT Stats", taco_dit_stats.get("text", "nothing was sampled yet"))


NODE_CLASS_MAPPINGS = {
    "TACODiTModelLoader": TACODiTModelLoader,
    "TACODiTKSampler": TACODiTKSampler,
    "TACODiTInfoDisplay": TACODiTInfoDisplay,
    "TACODiTStatsDisplay": TACODiTStatsDisplay,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TACODiTModelLoader": "TACO-DiT Model Loader",
    "TACODiTKSampler": "TACO-DiT KSampler",
    "TACODiTInfoDisplay": "TACO-DiT Info Display",
    "TACODiTStatsDisplay": "TACO-DiT Stats Display",
}
