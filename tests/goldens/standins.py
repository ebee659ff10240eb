"""Models with a closed form in place of a network, for tests of sampling alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import comfy.conds
import comfy.model_patcher
import comfy.model_sampling as ms

_KINDS = {
    "eps": (ms.ModelSamplingDiscrete, ms.EPS),
    "v": (ms.ModelSamplingDiscrete, ms.V_PREDICTION),
    "flow": (ms.ModelSamplingDiscreteFlow, ms.CONST),
    "flux": (ms.ModelSamplingFlux, ms.CONST),
}
_SETTINGS: dict[str, dict[str, Any]] = {"flow": {"shift": 3.0, "multiplier": 1000}, "flux": {"shift": 1.15}}


def make_sampling(schedule: type, prediction: type, settings: dict[str, Any] | None = None) -> Any:
    """A model_sampling object of two classes."""

    class Sampling(schedule, prediction):
        pass

    return Sampling(SimpleNamespace(sampling_settings=settings or {}))


class ClosedFormModel(torch.nn.Module):
    """denoised[b, c, ...] = tanh(0.8 x + 0.1 c + m[b]) / (1 + 0.3 sigma), m the mean of the row's text context."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model_sampling = make_sampling(*_KINDS[kind], _SETTINGS.get(kind))
        self.latent_format = SimpleNamespace(latent_channels=4, latent_dimensions=2)
        self.current_patcher: Any = None
        self.calls: list[float] = []
        self.batches: list[list[int]] = []

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, c_crossattn=None, transformer_options=None, **kwargs):
        """Remember sigma and conditionings of the call; return the prediction."""
        self.calls.append(float(t[0]))
        self.batches.append(transformer_options["cond_or_uncond"])
        ones = (1,) * (x.ndim - 2)
        channel = torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, *ones)
        m = c_crossattn.mean(dim=(1, 2)).view(-1, 1, *ones)
        return torch.tanh(0.8 * x + 0.1 * channel + m) / (1 + 0.3 * t.view(-1, 1, *ones))

    def extra_conds(self, cross_attn=None, **kwargs):
        return {"c_crossattn": comfy.conds.CONDCrossAttn(cross_attn)}

    def process_latent_in(self, latent):
        return latent

    def process_latent_out(self, latent):
        return latent

    def scale_latent_inpaint(self, sigma, noise, latent_image, **kwargs):
        return self.model_sampling.noise_scaling(sigma, noise, latent_image)

    def memory_required(self, input_shape, cond_shapes=None):
        return 0

    def patcher(self) -> Any:
        """A patcher of this model on the CPU."""
        return comfy.model_patcher.ModelPatcher(self, torch.device("cpu"), torch.device("cpu"))


def text(mean: float, tokens: int = 3, rows: int = 1) -> torch.Tensor:
    """A context [rows, tokens, 8] of one number."""
    return torch.full((rows, tokens, 8), mean)
