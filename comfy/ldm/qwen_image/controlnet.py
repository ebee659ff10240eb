"""Qwen-Image's control networks (InstantX 2025): a copy of its first blocks with projections of the picture tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from comfy.ldm import dit
from comfy.ldm.common_dit import patches_of

from .model import QwenImageTransformer2DModel

# blocks of Qwen-Image, for which these networks were trained
MAIN_BLOCKS = 60


class QwenImageControlNetModel(QwenImageTransformer2DModel):
    """See the module. Between blocks its picture tokens may be sharded; residuals are gathered, once each.

    extra_condition_channels: channels of a hint's patches beyond those of a latent (four of a mask, for inpainting).
    """

    takes_call = True

    def __init__(
        self, extra_condition_channels: int = 0, dtype: Any = None, device: Any = None, operations: Any = None, **kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(final_layer=False, dtype=dtype, device=device, operations=operations, **kwargs)
        place, dim = {"dtype": dtype, "device": device}, self.hidden_size
        self.controlnet_blocks = nn.ModuleList(operations.Linear(dim, dim, **place) for _ in self.transformer_blocks)
        self.controlnet_x_embedder = operations.Linear(self.in_channels + extra_condition_channels, dim, **place)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        hint: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals of latents x [B, 16, 1, h, w], with a hint [1 or B, 16 or 17, 1, h, w], as whole tokens [B, L, C]:
        `input` for each block of Qwen-Image, of which neighbours have one in common. Prompts are not masked.
        """
        if hint is None:
            raise ValueError("a ControlNet needs a hint picture")
        call = dit.call_of(transformer_options)
        tokens, ids, shape = self.process_img(x)
        start = max(shape[-2], shape[-1]) // self.patch_size // 2
        state = self.embed(tokens, ids, timesteps, context, None, 0, start, call)
        hinted = self.controlnet_x_embedder(patches_of(hint, self.patch_size)[0])
        state = state.with_stream("img", state.streams["img"] + hinted)
        residuals: list[torch.Tensor] = []

        def collect(block: dit.Block, state: dit.DiTState) -> None:
            projected = self.controlnet_blocks[block.index](state.streams["img"])
            residuals.append(state.with_stream("img", projected).whole("img"))

        dit.run_blocks(self, state, call, after=collect)
        each = math.ceil(MAIN_BLOCKS / len(residuals))
        return {"input": [residual for residual in residuals for _ in range(each)][:MAIN_BLOCKS]}
