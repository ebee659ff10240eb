"""The control network of SD3 in diffusers' layout: a copy of its first blocks, with their text.

It is under the module name that packs import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
from comfy.ldm import dit
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.embedders import PatchEmbed


class ControlNet(MMDiT):
    """See the module. `depth` is that of the diffusion model, `num_blocks` how many blocks there are here.

    The pooled text is not seen: these networks were trained with zeros in its place.
    """

    takes_call = True

    def __init__(
        self, num_blocks: int, depth: int, control_latent_channels: int, dtype: Any = None, device: Any = None,
        operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        place = {"dtype": dtype, "device": device, "operations": operations}
        super().__init__(num_blocks=num_blocks, depth=depth, final_layer=False, **place, **kwargs)
        width = self.hidden_size
        self.depth = depth
        self.controlnet_blocks = nn.ModuleList(
            operations.Linear(width, width, dtype=dtype, device=device) for _ in range(num_blocks)
        )
        self.pos_embed_input = PatchEmbed(self.patch_size, control_latent_channels, width, **place)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        hint: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals `output` [B, L, C] for the model's blocks but the last, of latents x [B, 16, h, w] and a hint's
        latents [n, C, h, w] with one row or B.
        """
        if hint is None:
            raise ValueError("a ControlNet needs a hint picture")
        call = dit.call_of(transformer_options)
        size = (self.patch_size, self.patch_size)
        x, hint = (comfy.ldm.common_dit.pad_to_patch_size(latent, size) for latent in (x, hint))
        state = self.embed(x, timesteps, context, None if y is None else torch.zeros_like(y))
        state = state.with_stream("img", state.streams["img"] + self.pos_embed_input(hint))
        found: list[torch.Tensor] = []

        def collect(block: dit.Block, state: dit.DiTState) -> None:
            projected = self.controlnet_blocks[block.index](state.streams["img"])
            found.append(state.with_stream("img", projected).whole("img"))

        dit.run_blocks(self, state, call, after=collect)
        each = self.depth // len(found)
        return {"output": [residual for residual in found for _ in range(each)][:-1]}
