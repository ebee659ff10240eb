"""FreeU: less of the skips' low frequencies, more of the backbone, in a UNet's last levels (Si et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from comfy_nodes.fields import number


def scale_low_frequencies(x: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """x [B, C, h, w] with the frequencies below `threshold` in both directions times `scale`."""
    spectrum = torch.fft.fftn(x.float(), dim=(-2, -1))
    rows, columns = (torch.fft.fftfreq(n, 1.0 / n, device=x.device) for n in x.shape[-2:])
    low = [(axis >= -threshold) & (axis < threshold) for axis in (rows, columns)]
    factor = torch.where(low[0][:, None] & low[1], scale, 1.0)
    return torch.fft.ifftn(spectrum * factor, dim=(-2, -1)).real.to(x.dtype)


Boost = Callable[[torch.Tensor, float], Any]


def evenly(h: torch.Tensor, strength: float) -> float:
    """FreeU's first version: the same factor everywhere."""
    return strength


def by_structure(h: torch.Tensor, strength: float) -> torch.Tensor:
    """The second version: from 1 to `strength` where the mean over channels goes from least to most, [B, 1, h, w]."""
    mean = h.mean(dim=1, keepdim=True)
    low, high = mean.amin(dim=(2, 3), keepdim=True), mean.amax(dim=(2, 3), keepdim=True)
    return (strength - 1.0) * (mean - low) / (high - low) + 1.0


def with_free_lunch(model: Any, backbone: tuple[float, float], skips: tuple[float, float], boost: Boost) -> Any:
    """A clone whose output blocks of 4 and 2 times the model's width are changed by these strengths."""
    width = model.model.model_config.unet_config["model_channels"]
    strengths = {width * 4: (backbone[0], skips[0]), width * 2: (backbone[1], skips[1])}

    def change(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        found = strengths.get(h.shape[1])
        if found is None:
            return h, skip
        half = h.shape[1] // 2
        h = torch.cat([h[:, :half] * boost(h, found[0]), h[:, half:]], dim=1).to(h.dtype)
        return h, scale_low_frequencies(skip, 1, found[1])

    change.rows_independent = True  # type: ignore[attr-defined]
    model = model.clone()
    model.set_model_output_block_patch(change)
    return model


class FreeU:
    STRENGTHS = (1.1, 1.2, 0.9, 0.2)
    BOOST = staticmethod(evenly)

    @classmethod
    def INPUT_TYPES(cls):
        names = ("b1", "b2", "s1", "s2")
        return {
            "required": {
                "model": ("MODEL",),
                **{name: number(value, 0.0, 10.0, 0.01) for name, value in zip(names, cls.STRENGTHS)},
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/unet"

    def patch(self, model: Any, b1: float, b2: float, s1: float, s2: float):
        return (with_free_lunch(model, (b1, b2), (s1, s2), self.BOOST),)


class FreeU_V2(FreeU):  # noqa: N801 (ComfyUI's name)
    STRENGTHS = (1.3, 1.4, 0.9, 0.2)
    BOOST = staticmethod(by_structure)


NODE_CLASS_MAPPINGS = {"FreeU": FreeU, "FreeU_V2": FreeU_V2}
