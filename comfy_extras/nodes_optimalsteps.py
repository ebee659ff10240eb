"""Schedules by optimal stepsize search (Pei et al. 2025, arXiv 2503.21774)."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_nodes.sigmas import SCHEDULERS
from comfy_nodes.step_tables import as_sigmas, stretched, tables
from comfy_nodes.v3 import extension, share


class OptimalStepsScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kinds = io.Combo.Input("model_type", options=["FLUX", "Wan", "Chroma"])
        return io.Schema(
            node_id="OptimalStepsScheduler",
            category=SCHEDULERS,
            outputs=[io.Sigmas.Output()],
            inputs=[kinds, io.Int.Input("steps", default=20, min=3, max=1000), share("denoise", 1.0)],
        )

    @classmethod
    def execute(cls, model_type: str, steps: int, denoise: float):
        levels = stretched(tables()["optimal_steps"][model_type], steps)
        return io.NodeOutput(as_sigmas(levels, steps, denoise))


comfy_entrypoint = extension(OptimalStepsScheduler)
