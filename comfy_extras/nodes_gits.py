"""Schedules by GITS, from the geometry of sampling trajectories (Chen et al. 2024, arXiv 2405.11326)."""

from __future__ import annotations

from comfy_api.latest import io
from comfy_nodes.sigmas import SCHEDULERS
from comfy_nodes.step_tables import as_sigmas, stretched, tables
from comfy_nodes.v3 import extension, share

NOISE_LEVELS: dict[float, list[list[float]]] = {float(coeff): rows for coeff, rows in tables()["gits"].items()}


class GITSScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="GITSScheduler",
            category=SCHEDULERS,
            outputs=[io.Sigmas.Output()],
            inputs=[
                share("coeff", 1.2, 1.5, 0.8, 0.05),
                io.Int.Input("steps", default=10, min=2, max=1000),
                share("denoise", 1.0),
            ],
        )

    @classmethod
    def execute(cls, coeff: float, steps: int, denoise: float):
        """Up to 20 steps are tabulated; more follow the curve of 20."""
        rows = NOISE_LEVELS.get(round(coeff, 2))
        if rows is None:
            raise ValueError(
                f"coeff is {coeff:g}, for which there is no schedule; use a multiple of 0.05 from 0.8 to 1.5"
            )
        return io.NodeOutput(as_sigmas(stretched(rows[min(steps, 20) - 2], steps), steps, denoise))

    def get_sigmas(self, coeff: float, steps: int, denoise: float):
        """What node packs call."""
        return type(self).execute(coeff, steps, denoise)


comfy_entrypoint = extension(GITSScheduler)
