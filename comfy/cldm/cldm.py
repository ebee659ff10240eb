"""The control network of a UNet (Zhang et al. 2023, arXiv 2302.05543): its input and middle blocks, once more.

It is under the module name that packs import. Xinsir's union network (ControlNet++, 2024) knows several kinds of hints: the
kind is added to the time embedding, and a transformer over the hint's mean and the kind's embedding shifts its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.clip_model import ACTIVATIONS, merge_heads, split_heads
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, forward_timestep_embed
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

# (channels in, channels out, stride) of the convolutions from a hint picture to the latent's size
_HINT = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2))
_KIND_FEATURES, _KIND_HEADS = 256, 8


class _UnionAttention(nn.Module):
    """Self-attention with one linear for queries, keys and values."""

    def __init__(self, width: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.in_proj = operations.Linear(width, 3 * width, **place)
        self.out_proj = operations.Linear(width, width, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = (split_heads(part, _KIND_HEADS) for part in self.in_proj(x).chunk(3, dim=-1))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class _UnionLayer(nn.Module):
    """Pre-norm transformer layer with OpenAI CLIP's weight names."""

    def __init__(self, width: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (operations.LayerNorm(width, **place) for _ in range(2))
        self.attn = _UnionAttention(width, place, operations)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": operations.Linear(width, 4 * width, **place),
                "c_proj": operations.Linear(4 * width, width, **place),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](ACTIVATIONS["quick_gelu"](self.mlp["c_fc"](self.ln_2(x))))


class _KindEmbedding(nn.Module):
    """Which kinds of hints there are, as a time embedding."""

    def __init__(self, kinds: int, out: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.kinds = kinds
        self.linear_1 = operations.Linear(_KIND_FEATURES * kinds, out, **place)
        self.linear_2 = operations.Linear(out, out, **place)

    def forward(self, control_type: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Kinds -> [1, out], in the dtype of `like`."""
        present = torch.zeros(self.kinds, device=like.device)
        present[list(control_type)] = 1.0
        features = timestep_embedding(present, _KIND_FEATURES).to(like.dtype).reshape(1, -1)
        return self.linear_2(F.silu(self.linear_1(features)))


class ControlNet(UNetModel):
    """See the module. Arguments are those of `UNetModel`, whose output blocks it has not.

    hint_channels: channels of hint pictures. union_controlnet_num_control_type: kinds of hints of a union network.
    """

    def __init__(
        self, *, hint_channels: int = 3, union_controlnet_num_control_type: int | None = None,
        dtype: Any = None, device: Any = None, operations: Any = comfy.ops.disable_weight_init, **kwargs: Any,
    ) -> None:  # fmt: skip
        kwargs.setdefault("out_channels", 0)
        super().__init__(dtype=dtype, device=device, operations=operations, **kwargs)
        place = {"dtype": dtype, "device": device}

        def projection(width: int) -> nn.Sequential:
            return nn.Sequential(operations.Conv2d(width, width, 1, **place))

        self.zero_convs = nn.ModuleList(projection(width) for width in self._widths[:-1])
        self.middle_block_out = None if self.middle_block is None else projection(self._widths[-1])
        layers: list[nn.Module] = [operations.Conv2d(hint_channels, 16, 3, padding=1, **place)]
        for inner, outer, stride in (*_HINT, (256, self.model_channels, 1)):
            layers += [nn.SiLU(), operations.Conv2d(inner, outer, 3, stride=stride, padding=1, **place)]
        self.input_hint_block = nn.Sequential(*layers)
        self.num_control_type = kinds = union_controlnet_num_control_type
        if kinds is not None:
            width = self.model_channels
            self.task_embedding = nn.Parameter(torch.empty(kinds, width, **place), requires_grad=False)
            self.transformer_layes = nn.Sequential(_UnionLayer(width, place, operations))  # the files' spelling
            self.spatial_ch_projs = operations.Linear(width, width, **place)
            self.control_add_embedding = _KindEmbedding(kinds, 4 * width, place, operations)

    def _build(self, emb: int) -> None:
        width, skips = self._build_down(emb)
        self._widths = [*skips, width]

    def _hint_of_kind(self, hint: torch.Tensor, control_type: Sequence[int]) -> torch.Tensor:
        """A hint's features [B, C, h, w], shifted by what the union's transformer makes of their mean and kind."""
        mean = hint.mean(dim=(2, 3)) + self.task_embedding[control_type[0]].to(hint)
        shift = self.spatial_ch_projs(self.transformer_layes(mean.unsqueeze(1))[:, 0])
        return hint + shift[:, :, None, None]

    def _check_kinds(self, control_type: Sequence[int]) -> None:
        unknown = [kind for kind in control_type if not 0 <= kind < (self.num_control_type or 0)]
        if unknown or len(control_type) > 1:
            raise ValueError(
                f"this union ControlNet takes one kind of hint of 0 to {(self.num_control_type or 0) - 1}, not "
                f"{list(control_type)}; choose another type, or auto"
            )

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        hint: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control_type: Sequence[int] = (),
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Residuals of latents x [B, in_channels, h, w] and hints of one row or B [n, hint_channels, 8h, 8w].

        `output`: for each skip, in the order of the input blocks; `middle`: for the middle block. Raises ValueError for
        a kind of hint that the network does not know.
        """
        emb = self._embed(x, timesteps, y, {})
        guide: torch.Tensor | None = self.input_hint_block(hint)
        if self.num_control_type is not None:
            self._check_kinds(control_type)
            emb = emb + self.control_add_embedding(control_type, emb)
            if control_type:
                guide = self._hint_of_kind(self.input_hint_block(hint), control_type)
        h, residuals = x, []
        for block, projection in zip(self.input_blocks, self.zero_convs):
            h = forward_timestep_embed(block, h, emb, context)
            if guide is not None:
                h, guide = h + guide, None
            residuals.append(projection(h))
        if self.middle_block is None or self.middle_block_out is None:
            return {"middle": [], "output": residuals}
        h = forward_timestep_embed(self.middle_block, h, emb, context)
        return {"middle": [self.middle_block_out(h)], "output": residuals}
