"""Samplers that are not in the list of KSampler."""

from __future__ import annotations

from typing import Any

import torch

import comfy.samplers
import comfy.utils
from comfy.model_patcher_options import set_model_options_post_cfg_function
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

METHODS = ["bislerp", "nearest-exact", "bilinear", "area", "bicubic"]


def _sizes(total: float, steps: int, wanted: int | None) -> list[float]:
    """Scale after each of the first steps, growing evenly to `total`."""
    count = max((steps + 1) // 2, 1) if wanted is None else min(wanted, steps + 1)
    return [1.0 + (total - 1.0) * (i + 1) / count for i in range(count)]


@torch.no_grad()
def sample_lcm_upscale(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: Any = None,
    total_upscale: float = 2.0,
    upscale_method: str = "bislerp",
    upscale_steps: int | None = None,
) -> torch.Tensor:
    """Consistency sampling of x [B, C, H, W] that makes the prediction larger before it adds noise again.

    Noise comes from the CPU, so that all ranks have the same.
    """
    extra_args = extra_args or {}
    height, width = x.shape[-2:]
    sizes = _sizes(total_upscale, len(sigmas) - 1, upscale_steps)
    generator = torch.Generator().manual_seed(extra_args.get("seed") or 0)
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        x = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x})
        if i < len(sizes):
            x = comfy.utils.common_upscale(
                x, round(width * sizes[i]), round(height * sizes[i]), upscale_method, "disabled"
            )
        if following > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
            x = x + following * noise.to(x)
    return x


class SamplerLCMUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SamplerLCMUpscale",
            category="sampling/custom_sampling/samplers",
            inputs=[
                share("scale_ratio", 1.0, 20.0, 0.1),
                io.Int.Input("scale_steps", default=-1, min=-1, max=1000, step=1),
                io.Combo.Input("upscale_method", options=METHODS),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, scale_ratio: float, scale_steps: int, upscale_method: str):
        options = {
            "total_upscale": scale_ratio,
            "upscale_steps": None if scale_steps < 0 else scale_steps,
            "upscale_method": upscale_method,
        }
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_lcm_upscale, extra_options=options))


@torch.no_grad()
def sample_euler_pp(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: Any = None,
) -> torch.Tensor:
    """Euler steps along the noise of the negative prediction (CFG++, arXiv 2406.08070), the picture staying guided."""
    negative: list[torch.Tensor] = []

    def keep(arguments: dict[str, Any]) -> torch.Tensor:
        negative[:] = [arguments["uncond_denoised"]]
        return arguments["denoised"]

    extra_args = dict(extra_args or {})
    extra_args["model_options"] = set_model_options_post_cfg_function(
        dict(extra_args.get("model_options", {})), keep, disable_cfg1_optimization=True
    )
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        slope = (x - 2 * denoised + negative[0]) / sigma
        x = x + slope * (following - sigma)
    return x


class SamplerEulerCFGpp(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SamplerEulerCFGpp",
            display_name="SamplerEulerCFG++",
            category="_for_testing",
            is_experimental=True,
            inputs=[io.Combo.Input("version", options=["regular", "alternative"])],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, version: str):
        if version == "alternative":
            return io.NodeOutput(comfy.samplers.KSAMPLER(sample_euler_pp))
        return io.NodeOutput(comfy.samplers.ksampler("euler_cfg_pp"))


comfy_entrypoint = extension(SamplerLCMUpscale, SamplerEulerCFGpp)
