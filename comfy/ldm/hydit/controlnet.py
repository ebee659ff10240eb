"""HunyuanDiT's control network: a copy of its first half, whose tokens are projected to the skips' residuals (2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
from comfy.ldm import dit

from .models import HunYuanDiT


class HunYuanControlNet(HunYuanDiT):
    """See the module. `depth` is the number of blocks here."""

    takes_call = True

    def __init__(self, dtype: Any = None, device: Any = None, operations: Any = None, **kwargs: Any) -> None:
        super().__init__(skips=False, dtype=dtype, device=device, operations=operations, **kwargs)
        width, place = self.hidden_size, {"dtype": dtype, "device": device}
        self.before_proj = operations.Linear(width, width, **place)
        self.after_proj_list = nn.ModuleList(operations.Linear(width, width, **place) for _ in range(self.depth))

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order, without skips."""
        return tuple(
            dit.Block(block.name, block.module, block.arguments, block.index) for block in super().block_list()
        )

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        hint: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        text_embedding_mask: torch.Tensor | None = None,
        encoder_hidden_states_t5: torch.Tensor | None = None,
        text_embedding_mask_t5: torch.Tensor | None = None,
        image_meta_size: torch.Tensor | None = None,
        style: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals `output` [B, L, C] for the model's skips, of latents x [B, 4, h, w] and a hint's latents with one row
        or B. Raises ValueError without mT5's features.
        """
        t5 = encoder_hidden_states_t5
        if t5 is None:
            raise ValueError(
                "HunyuanDiT's ControlNet needs mT5's features; load both text encoders with DualCLIPLoader"
            )
        call = dit.call_of(transformer_options)
        height, width = x.shape[2:]
        if image_meta_size is None:
            sizes = [[8 * height, 8 * width, 8 * height, 8 * width, 0, 0]]
            image_meta_size = x.new_tensor(sizes).expand(x.shape[0], -1)
        patch = (self.patch_size, self.patch_size)
        x, hint = (comfy.ldm.common_dit.pad_to_patch_size(latent, patch) for latent in (x, hint))
        text = self._text(context, text_embedding_mask, t5, text_embedding_mask_t5)
        state = self.embed(x, timesteps, text, t5, image_meta_size, None if style is None else style.long())
        state = state.with_stream("img", state.streams["img"] + self.before_proj(self.x_embedder(hint)))
        found: list[torch.Tensor] = []

        def collect(block: dit.Block, state: dit.DiTState) -> None:
            projected = self.after_proj_list[block.index](state.streams["img"])
            found.append(state.with_stream("img", projected).whole("img"))

        dit.run_blocks(self, state, call, after=collect)
        return {"output": found}
