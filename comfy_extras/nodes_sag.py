"""Guidance away from what a UNet predicts when what it attends to is blurred (Hong et al. 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

import comfy.samplers
from comfy.ldm.modules import attention
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

BLUR_CELLS = 9
THRESHOLD = 1.0
SMALLEST = 5  # cells of a side: the blur mirrors four of them at each edge


def attention_with_map(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[Any, torch.Tensor]:
    """q [B, L, C], k and v [B, S, C] -> (output [B, L, C], attention map [B, heads, L, S])."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2), weights


def gaussian_blur_2d(img: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """img [B, C, h, w] blurred, edges mirrored."""
    half = (kernel_size - 1) / 2
    line = torch.exp(-0.5 * (torch.linspace(-half, half, kernel_size) / sigma) ** 2)
    line = (line / line.sum()).to(img)
    kernel = torch.outer(line, line).expand(img.shape[1], 1, -1, -1)
    padded = F.pad(img, [kernel_size // 2] * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=img.shape[1])


def grid_of(cells: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) with `cells` of them in about the proportion of height and width."""
    guess = round(math.sqrt(height / width * cells))
    for step in range(math.floor(math.sqrt(cells / 2))):
        for rows in (guess + step, max(1, guess - step)):
            if rows and cells % rows == 0:
                return rows, cells // rows
    return 1, cells


def create_blur_map(
    x0: torch.Tensor, attn: torch.Tensor, sigma: float = 3.0, threshold: float = THRESHOLD
) -> torch.Tensor:
    """x0 [B, C, h, w] blurred where the map says that other cells attend to it more than on average.

    attn: [B * heads, L, L], or [B, heads, L, L]. A pack replaces this function.
    """
    attended = attn.reshape(x0.shape[0], -1, *attn.shape[-2:]).mean(dim=1).sum(dim=1) > threshold
    height, width = x0.shape[-2:]
    mask = attended.reshape(x0.shape[0], 1, *grid_of(attended.shape[-1], height, width)).to(x0.dtype)
    mask = F.interpolate(mask, (height, width))
    return gaussian_blur_2d(x0, BLUR_CELLS, sigma) * mask + x0 * (1 - mask)


class _Recorder:
    """Stands in for the middle's self-attention and keeps the negative prompt's attention map."""

    def __init__(self) -> None:
        self.weights: torch.Tensor | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        conds, heads = extra["cond_or_uncond"], extra["n_heads"]
        if 1 not in conds:
            return attention.optimized_attention(
                q, k, v, heads, attn_precision=extra["attn_precision"], transformer_options=extra
            )
        out, weights = attention_with_map(q, k, v, heads)
        self.weights = weights.chunk(len(conds))[conds.index(1)]
        return out


class SelfAttentionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SelfAttentionGuidance",
            display_name="Self-Attention Guidance",
            category="_for_testing",
            is_experimental=True,
            inputs=[io.Model.Input("model"), share("scale", 0.5, 5.0, -2.0), share("blur_sigma", 2.0, 10.0, step=0.1)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, scale: float, blur_sigma: float):
        recorder = _Recorder()

        def guide(arguments: dict[str, Any]) -> torch.Tensor:
            result, negative = arguments["denoised"], arguments["uncond_denoised"]
            if min(result.shape[2:]) < SMALLEST or recorder.weights is None:
                return result
            blurred = create_blur_map(negative, recorder.weights, blur_sigma)
            (weak,) = comfy.samplers.calc_cond_batch(
                arguments["model"], [arguments["uncond"]], blurred + arguments["input"] - negative,
                arguments["sigma"], arguments["model_options"],
            )  # fmt: skip
            return result + (blurred - weak) * scale

        model = model.clone()
        model.set_model_sampler_post_cfg_function(guide, disable_cfg1_optimization=True)
        model.set_model_attn1_replace(recorder, "middle", 0, 0)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(SelfAttentionGuidance)
