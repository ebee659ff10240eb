"""Stability AI's control networks for SD3.5: blocks of picture tokens only (2024).

It is under the module name that packs import.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.diffusionmodules.mmdit import DismantledBlock, MMDiT, VectorEmbedder
from comfy.ldm.modules.embedders import PatchEmbed, TimestepEmbedder

_ARGUMENTS = dit.BlockArguments(tokens={"x": ("img",)}, values={"c": "vec"}, first="x")


@dit.own_block
class PictureBlock(DismantledBlock):
    """One stream's half of a block of SD3, on its own."""

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on a state with the stream `img`."""
        img = state.streams["img"]
        mods = self.modulation(state.sample["vec"], call)
        meeting = meet(AttentionSpec(self.attn.num_heads, state.tokens("img"), layer=call.layer), call)
        meeting.send(*self.into_attention(img, mods))
        meeting.attend()
        meeting.send_back()
        return state.with_stream("img", self.after_attention(img, joined_heads(meeting.result()), None, mods))

    def forward(self, x: torch.Tensor, c: torch.Tensor, transformer_options: Any = None) -> torch.Tensor:
        """Whole picture tokens [B, L, C] and vector [B, C] -> picture tokens."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"img": x}, {}, {"vec": c}).shard(call.plan)
        return self.forward_state(state, call).whole("img")


class ControlNetEmbedder(nn.Module):
    """See the module. Sizes are those of a model of `depth` blocks.

    double_y_emb: the pooled text goes through the model's embedder first, and every block sees the same tokens; else
    blocks follow each other, and places are computed. `borrows` says which part is the model's own.
    """

    takes_call = True

    def __init__(
        self, depth: int, num_layers: int, double_y_emb: bool, adm_in_channels: int = 2048, in_chans: int = 16,
        patch_size: int = 2, dtype: Any = None, device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device, "operations": operations}
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads = width, heads = 64 * depth, depth
        self.main_model_double = depth
        self.double_y_emb = double_y_emb
        self.borrows = ("orig_y_embedder", "y_embedder") if double_y_emb else ("x_embedder", "x_embedder")
        self.x_embedder = PatchEmbed(patch_size, in_chans, width, **place)
        self.t_embedder = TimestepEmbedder(width, **place)
        if double_y_emb:
            self.orig_y_embedder = VectorEmbedder(adm_in_channels, width, **place)
        self.y_embedder = VectorEmbedder(width if double_y_emb else adm_in_channels, width, **place)
        self.transformer_blocks = nn.ModuleList(PictureBlock(width, heads, **place) for _ in range(num_layers))
        self.controlnet_blocks = nn.ModuleList(
            operations.Linear(width, width, dtype=dtype, device=device) for _ in range(num_layers)
        )
        self.pos_embed_input = PatchEmbed(patch_size, in_chans, width, **place)

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        return tuple(
            dit.Block(f"transformer_blocks.{i}", block, _ARGUMENTS, i)
            for i, block in enumerate(self.transformer_blocks)
        )

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        hint: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals `output` [B, L, C] for the model's blocks, of latents x [B, 16, h, w] and a hint's latents."""
        if hint is None:
            raise ValueError("a ControlNet needs a hint picture")
        call = dit.call_of(transformer_options)
        patch = self.patch_size
        x, hint = (comfy.ldm.common_dit.pad_to_patch_size(latent, (patch, patch)) for latent in (x, hint))
        img = self.x_embedder(x)
        if not self.double_y_emb:
            img = img + MMDiT.computed_positions(x.shape[2] // patch, x.shape[3] // patch, img)
        vec = self.t_embedder(timesteps, dtype=x.dtype)
        if y is not None:
            vec = vec + self.y_embedder(self.orig_y_embedder(y) if self.double_y_emb else y)
        first = state = dit.DiTState({"img": img + self.pos_embed_input(hint)}, {}, {"vec": vec}).shard(call.plan)
        found: list[torch.Tensor] = []
        for block in self.block_list():
            state = dit.run_blocks(self, first if self.double_y_emb else state, call, (block,))
            projected = self.controlnet_blocks[block.index](state.streams["img"])
            found.append(state.with_stream("img", projected).whole("img"))
        each = math.ceil(self.main_model_double / len(found))
        return {"output": [residual for residual in found for _ in range(each)]}
