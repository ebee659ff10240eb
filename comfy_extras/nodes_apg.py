"""Adaptive projected guidance (arXiv 2410.02416)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

SPACE = (-1, -2, -3)


def project(vector: torch.Tensor, onto: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of `vector` [B, C, H, W] along and across `onto`, per sample."""
    direction = torch.nn.functional.normalize(onto, dim=SPACE)
    along = (vector * direction).sum(dim=SPACE, keepdim=True) * direction
    return along, vector - along


class _Guidance:
    """The function put before guidance; it remembers the average of one run."""

    def __init__(self, eta: float, norm_threshold: float, momentum: float) -> None:
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self.average: torch.Tensor | None = None
        self.last_sigma: torch.Tensor | None = None

    def _averaged(self, guidance: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if self.last_sigma is not None and sigma > self.last_sigma:
            self.average = None  # noise went up: another run
        self.last_sigma = sigma
        if self.momentum == 0:
            return guidance
        before = self.average
        self.average = guidance if before is None else self.momentum * before + guidance
        return self.average

    def __call__(self, arguments: dict[str, Any]) -> list[Any]:
        predictions = arguments["conds_out"]
        if len(predictions) < 2:
            return predictions
        positive, negative = predictions[:2]
        difference = positive - negative
        guidance = self._averaged(difference, arguments["sigma"][0])
        if self.norm_threshold > 0:
            length = torch.linalg.vector_norm(guidance, dim=SPACE, keepdim=True)
            guidance = guidance * (self.norm_threshold / length).clamp(max=1.0)
        along, across = project(guidance, positive)
        # guidance proper adds scale * (this - negative): the positive prediction plus scale * the changed guidance
        changed = negative + across + self.eta * along + difference / arguments["cond_scale"]
        return [changed, negative, *predictions[2:]]


class APG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APG",
            display_name="Adaptive Projected Guidance",
            category="sampling/custom_sampling",
            inputs=[
                io.Model.Input("model"),
                share("eta", 1.0, 10.0, -10.0, tooltip="Weight of the part along the prediction; 1 is plain guidance."),
                share("norm_threshold", 5.0, 50.0, 0.0, 0.1, tooltip="Longest guidance vector; 0 for any length."),
                share("momentum", 0.0, 1.0, -5.0, tooltip="Share of the guidance of earlier steps; 0 for none."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, eta: float, norm_threshold: float, momentum: float):
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(_Guidance(eta, norm_threshold, momentum))
        return io.NodeOutput(model)


comfy_entrypoint = extension(APG)
