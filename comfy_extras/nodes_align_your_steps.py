"""Schedules by Align Your Steps (Sabour et al. 2024, arXiv 2404.14507)."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_nodes.sigmas import SCHEDULERS
from comfy_nodes.step_tables import as_sigmas, loglinear_interp, stretched, tables  # noqa: F401 - packs
from comfy_nodes.v3 import extension, share


class AlignYourStepsScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kinds = io.Combo.Input("model_type", options=["SD1", "SDXL", "SVD"])
        return io.Schema(
            node_id="AlignYourStepsScheduler",
            category=SCHEDULERS,
            outputs=[io.Sigmas.Output()],
            inputs=[kinds, io.Int.Input("steps", default=10, min=1, max=10000), share("denoise", 1.0)],
        )

    @classmethod
    def execute(cls, model_type: str, steps: int, denoise: float):
        levels = stretched(tables()["align_your_steps"][model_type], steps)
        return io.NodeOutput(as_sigmas(levels, steps, denoise))

    def get_sigmas(self, model_type: str, steps: int, denoise: float):
        """What node packs call."""
        return type(self).execute(model_type, steps, denoise)


comfy_entrypoint = extension(AlignYourStepsScheduler)
