"""Tangential damping of guidance (arXiv 2503.18137)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def score_tangential_damping(cond_score: torch.Tensor, uncond_score: torch.Tensor) -> torch.Tensor:
    """The negative score along the main direction of both, per sample.

    The main right singular vector of two rows comes from the 2 x 2 matrix of their products, which is the same on
    every device.
    """
    rows = torch.stack([uncond_score.flatten(1), cond_score.flatten(1)], dim=1).double()
    _, vectors = torch.linalg.eigh((rows @ rows.transpose(1, 2)).cpu())
    main = (vectors[:, None, :, -1].to(rows.device) @ rows)[:, 0]
    main = torch.nn.functional.normalize(main, dim=1)
    along = (rows[:, 0] * main).sum(1, keepdim=True) * main
    return along.view_as(uncond_score).to(uncond_score.dtype)


def _damp(arguments: dict[str, Any]) -> list[Any]:
    predictions, x = arguments["conds_out"], arguments["input"]
    if len(predictions) < 2 or any(cond is None for cond in arguments["conds"][:2]):
        return predictions
    positive, negative = predictions[:2]
    return [positive, x - score_tangential_damping(x - positive, x - negative), *predictions[2:]]


class TCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TCFG",
            display_name="Tangential Damping CFG",
            category="advanced/guidance",
            description="Takes out of the negative prediction what is not in line with the positive one.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(display_name="patched_model")],
        )

    @classmethod
    def execute(cls, model: Any):
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(_damp)
        return io.NodeOutput(model)


comfy_entrypoint = extension(TCFG)
